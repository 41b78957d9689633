import numpy as np
import pytest
import torch
from torch import nn

from tropism.commands import align, pretrain
from tropism.core import Batch
from tropism.models.load import load_model
from tropism.rewards.aesthetic import shapes_aesthetic
from tropism.rewards.clip import shapes_alignment
from tropism.rewards.count import shapes_count
from tropism.run.pretrain_loop import QUICK, another, drawn, train
from tropism.run.pretrain_rewards import _spoiled
from tropism.worlds import shapes, weights


def fitted(folder, updates, stop=None):
    """A line regressed on keyed points; `stop` raises in that update."""
    torch.manual_seed(0)
    line = nn.Linear(3, 1)

    def loss(update):
        if update == stop:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(update))
        return (line(x) - x.sum(1, keepdim=True)).square().mean()

    train("line", line, loss, folder, updates=updates, lr=0.05, ema=0.9, every=7)
    return line


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    whole = fitted(tmp_path / "a", 400)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "b", 400, stop=170)
    again = fitted(tmp_path / "b", 400)
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True))
    assert (whole.weight - 1).abs().max() < 0.2


@pytest.mark.slow
def test_quick_pretraining_gives_a_model_and_rewards_that_work(tmp_path, monkeypatch):
    out = pretrain("shapes", out=tmp_path / "shapes", quick=True)
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "aesthetic.safetensors",
        "clip",
        "counter.safetensors",
        "model",
        "samples",
    ]
    assert len(list((out / "samples").glob("denoiser-*.png"))) == QUICK.denoiser
    monkeypatch.setattr(weights, "path", lambda name: tmp_path / name)
    images, prompts = torch.rand(2, 3, 64, 64), ["one red circle on sand", "two blue stars on sky"]
    batch = Batch(prompts)
    for make in (shapes_count, shapes_alignment, shapes_aesthetic):
        assert make()(images, batch).shape == (2,)
    run = align("alignprop", model=str(out / "model"), reward="jpeg", prompts=prompts * 5, out=tmp_path / "run",
                updates=1, batch=2, options={"steps": 2, "truncation": "1"}, evaluate_prompts=1)  # fmt: skip
    assert run.reload_difference < 1e-4
    assert load_model(str(out / "model")).network.config.sample_size == 16


def test_changed_twins_stand_in_the_same_places(tmp_path):
    pictures, scenes = drawn(tmp_path, 40, 9)
    twins, others = drawn(tmp_path, 40, 9, twin="changed")
    for s, o in zip(scenes, others, strict=True):
        assert s.count == o.count
        assert sum(getattr(s, a) != getattr(o, a) for a in ("shape", "colour", "background")) == 1
    read = shapes.read(twins / 255)
    assert read == others
    recoloured = [i for i, (s, o) in enumerate(zip(scenes, others, strict=True)) if s.colour != o.colour]
    moved = (pictures[recoloured].int() - twins[recoloured].int()).abs().amax(1) > 3
    ground = torch.tensor([shapes.BACKGROUNDS[scenes[i].background] for i in recoloured])[:, :, None, None]
    objects = ((pictures[recoloured] - ground).float().norm(dim=1) > 62) | (
        (twins[recoloured] - ground).float().norm(dim=1) > 62
    )
    assert (moved & ~objects).float().mean() < 0.02


def test_odd_objects_spoil_a_picture(tmp_path):
    _, scenes = drawn(tmp_path, 40, 9)
    twins, others = drawn(tmp_path, 40, 9, twin="odd")
    read = shapes.read(twins / 255)
    assert others == scenes
    assert sum((r.count or s.count) < s.count for r, s in zip(read, scenes, strict=True)) > 5  # left out
    assert sum(r.shape != s.shape for r, s in zip(read, scenes, strict=True)) > 10  # another shape
    assert (
        sum(r == s for r, s in zip(read, scenes, strict=True)) < 8
    )  # halfway to another shape may still be read as its own


def test_spoiled_pictures_are_worse_for_the_bundled_score():
    scenes, rng = shapes.scenes(held_out=True), np.random.default_rng(0)
    x, twins = (shapes.pictures(some, 5) for some in (scenes, [another(s, "shape", rng) for s in scenes]))
    batch, score = Batch([s.prompt for s in scenes]), shapes_alignment()
    with torch.no_grad():
        better = score(x, batch) > score(_spoiled(x, twins, rng), batch)
    assert better.float().mean() > 0.9
