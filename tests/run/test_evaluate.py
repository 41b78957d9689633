"""Evaluation on fixed seeds: the same pictures whatever the batch size, and measures that mean what they say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy import ToyModel

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, UserError
from tropism.run.evaluate import columns_of, diversity, evaluate


def brightness(images, batch):
    return images.mean((1, 2, 3))


class Pair:
    name, differentiable = "pair", True

    def parts(self, samples, batch):
        return {"bright": brightness(samples, batch), "length": torch.tensor([float(len(p)) for p in batch.prompts])}

    def total(self, parts, batch):
        return parts["bright"] + 2 * parts["length"]

    def __call__(self, samples, batch):
        return self.total(self.parts(samples, batch), batch)


PROMPTS = ["a", "bb", "ccc"]


def run(reward=brightness, **options):
    return evaluate(ToyModel(eta=1.0), reward, PROMPTS, **{"steps": 4, "guidance": 3.0, "seed": 1, **options})


def test_pictures_do_not_depend_on_the_batch_size():
    whole, pieces = run(per_prompt=2), run(per_prompt=2, batch_size=4)
    assert whole.prompts == ["a", "a", "bb", "bb", "ccc", "ccc"]
    torch.testing.assert_close(whole.images, pieces.images, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole.images, run(per_prompt=2, seed=2).images)
    assert whole.images.dtype == torch.float32
    assert not whole.images.requires_grad


def test_negative_prompts_and_metadata_reach_the_reward():
    seen = []
    asked = Batch(["a", "b"], negative_prompts=["c", "d"], meta=[{"n": 1}, {"n": 2}])

    def wanted(images, batch):
        seen.extend(zip(batch.negative_prompts, [m["n"] for m in batch.meta], strict=True))
        return brightness(images, batch)

    found = evaluate(ToyModel(), wanted, asked, steps=2, guidance=1.0, seed=0, per_prompt=2, batch_size=3)
    assert seen == [("c", 1), ("c", 1), ("d", 2), ("d", 2)]
    assert not torch.equal(found.images[0], found.images[1])


def test_evaluation_shares_no_noise_with_training():
    model, batch = ToyModel(eta=1.0), Batch(PROMPTS)
    for update in (0, 1):
        trained = sample(model, batch, Draw(1, update, batch.index), steps=4, guidance=3.0)
        assert (run().images - trained.float()).abs().amax((1, 2, 3)).min() > 1e-3


def test_columns_hold_reward_parts_and_measures():
    found = run(
        Pair(),
        measures={
            "dark": lambda images, _: {"dark": 1 - images.mean((1, 2, 3))},
            "said": lambda _, batch: {"n": torch.tensor([float(len(p)) for p in batch.prompts])},
        },
    )
    assert found.columns.keys() == {"reward", "bright", "length", "dark", "said/n"}
    torch.testing.assert_close(found.columns["reward"], found.columns["bright"] + 2 * found.columns["length"])
    assert found.columns["said/n"].tolist() == [1, 2, 3]
    assert found.numbers()["held_out/length"] == 2
    assert found.numbers()["diversity"] == found.diversity


def test_drift_is_zero_against_itself_and_grows_with_the_adapter():
    model = ToyModel(eta=1.0)
    with model.base():
        base = evaluate(model, brightness, PROMPTS, steps=4, guidance=3.0, seed=1).images
    after = evaluate(model, brightness, PROMPTS, steps=4, guidance=3.0, seed=1, base=base)
    torch.testing.assert_close(after.columns["drift"], (after.images - base).pow(2).mean((1, 2, 3)))
    assert after.numbers()["drift"] > 1e-4
    assert (
        evaluate(model, brightness, PROMPTS, steps=4, guidance=3.0, seed=1, base=after.images).numbers()["drift"] == 0
    )


def test_diversity_is_the_mean_pairwise_distance():
    images = torch.rand(4, 3, 5, 5)
    pairs = [(images[i] - images[j]).pow(2).mean().sqrt() for i in range(4) for j in range(i)]
    assert diversity(images) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    within = [(images[i] - images[i + 1]).pow(2).mean().sqrt() for i in (0, 2)]
    assert diversity(images, 2) == pytest.approx(torch.stack(within).mean().item(), rel=1e-5)
    assert diversity(images[:1].expand(4, -1, -1, -1)) == 0
    assert diversity(images[:1]) is None
    assert diversity(torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])) == pytest.approx(1)


def test_no_prompts():
    with pytest.raises(UserError, match="no prompts"):
        evaluate(ToyModel(), brightness, [], steps=4, guidance=1.0, seed=0)


def test_a_reward_that_writes_into_its_pictures_changes_no_other_measure():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before, red = images.clone(), lambda images, batch: images[:, 0].mean((1, 2))

    def writing(images, batch):
        images.mul_(0.5)
        images.numpy()[:, 0] = 0  # which leaves no trace in the tensor's version
        return images.mean((1, 2, 3))

    found = columns_of(images, Batch(["a", "b"]), writing, {"m": lambda i, _: {"m": red(i, _)}}, {"red": red})
    assert torch.equal(images, before)
    assert torch.equal(found["m"], red(before, None)) and torch.equal(found["watch/red"], red(before, None))
