"""Children, prompts, conditions and noise belong together: the two tiling bugs of released code, and what catches them."""

import pytest
import torch
from cases import LAW

from tropism.core import Batch
from tropism.guide import steps, values
from tropism.guide import svdd as svdd_module
from tropism.guide.search import blockwise
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
from tropism.models.latent import Latent
from tropism.models.load import load_model
from tropism.worlds.mixture import MixtureModel

PROMPTS = Batch(["1", "4", "9"])


class Told(MixtureModel):
    """Draws the number that its prompt names, with a little noise of its own."""

    def encode(self, batch, draw=None):
        return Numbers(torch.tensor([[float(p)] for p in batch.prompts], dtype=torch.float64))

    def predict(self, x_t, t, cond, guidance):
        super().predict(x_t, t, cond, guidance)
        return cond.numbers + 0.01 * torch.tanh(x_t)


class Numbers:
    shape = (1,)

    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, rows):
        return Numbers(self.numbers[rows])


def near(samples, batch):
    return -(samples[:, 0] - torch.tensor([float(p) for p in batch.prompts], dtype=samples.dtype)).abs()


def drawn(method, **more):
    return method(Told(LAW, exact=False), near, PROMPTS, 2, steps=10, max_batch=5, **more).samples[:, 0]


@pytest.mark.parametrize(
    ("method", "more"), [(svdd, {"m": 4}), (smc, {"alpha": 0.1}), (blockwise, {"m": 4, "block": 3})]
)
def test_every_sample_has_its_own_prompt(method, more):
    torch.testing.assert_close(drawn(method, **more), torch.tensor([1, 1, 4, 4, 9, 9.0]).double(), rtol=0, atol=0.1)


# ------------------------------------------------------------------------------------------------ bugs of released code


class Timed(Told):
    """Remembers the time of every call, and of every x_0."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.seen, self.clean = [], []

    def x0(self, x_t, out, t):
        self.clean.append(float(t))
        return super().x0(x_t, out, t)

    def predict(self, x_t, t, cond, guidance):
        self.seen.append(float(t))
        return super().predict(x_t, t, cond, guidance)


def prompts_stay():
    """Every sample is that of its own prompt."""
    torch.testing.assert_close(drawn(svdd, m=2), torch.tensor([1, 1, 4, 4, 9, 9.0]).double(), rtol=0, atol=0.1)


def guidance_halves_stay():
    """Two prompts with guidance, drawn together and alone, are the same pictures."""
    model, texts = load_model("shapes", lora=None, eta=1.0), ["one red circle on sand", "three blue stars on grass"]
    bright = lambda images, batch: images.mean((1, 2, 3))
    how = {"m": 2, "steps": 2, "guidance": 3.0}
    together = svdd(model, bright, Batch(texts), 1, **how).samples
    alone = torch.cat([svdd(model, bright, Batch([t], index=(i,)), 1, **how).samples for i, t in enumerate(texts)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def children_have_their_own_time():
    """The network is asked for children at the time that they stand at, not at their parent's."""
    model = Timed(LAW, exact=False)
    svdd(model, near, PROMPTS, 1, steps=4, m=2)
    times = model.process.times(4).tolist()[:-1]
    assert model.seen == times, "the start's, then each child's own, which is the next step's"
    assert model.clean == [t for t in times for _ in range(2)], "of the value and of the step"


def mix_prompts(monkeypatch):
    """Molecules' masks, batch after batch, against children, sample after sample."""
    original = steps.predicted

    def tiled(run, x, s, rows, parents=None):
        return original(run, x, s, torch.arange(len(run.batch)).repeat(len(rows) // len(run.batch)), parents)

    monkeypatch.setattr(steps, "predicted", tiled)


def mix_guidance(monkeypatch):
    """Embeddings [free, prompt, free, prompt, ...] against latents [all, all]."""

    def predict(self, x_t, t, cond, guidance):
        text = {k: torch.stack([cond.negative[k], v], 1).flatten(0, 1) for k, v in cond.positive.items()}
        free, conditional = self.counted(torch.cat([x_t, x_t]), t, text).chunk(2)
        return free + guidance * (conditional - free)

    monkeypatch.setattr(Latent, "predict", predict)


def parents_time(monkeypatch):
    """x_0 of children at their parent's time."""
    original = svdd_module.valued

    def valued(run, value, x, s, parents=None):
        return original(run, value, x, s if parents is None else run.times[parents.step], parents)

    monkeypatch.setattr(svdd_module, "valued", valued)


def clean_at_parents_time(monkeypatch):
    """The network is asked at the right time, but what it says is read as of the parent's."""
    original, last = values._PosteriorMean.__call__, []

    def valued(self, x_t, t, rows, out):
        last.append(t)
        return original(self, x_t, last[-2] if len(last) > 1 and out is not None else t, rows, out)

    monkeypatch.setattr(values._PosteriorMean, "__call__", valued)


@pytest.mark.parametrize(
    ("check", "bug"),
    [
        (prompts_stay, mix_prompts),
        (guidance_halves_stay, mix_guidance),
        (children_have_their_own_time, parents_time),
        (children_have_their_own_time, clean_at_parents_time),
    ],
)
def test_the_bugs_of_released_code_are_caught(check, bug, monkeypatch):
    check()
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# ------------------------------------------------------------------------------------------------ company


def test_a_lineage_is_the_same_in_other_company():
    alone = svdd(MixtureModel(LAW), lambda x, b: x[:, 0], Batch(["x"]), 2, m=3, steps=10)
    among = svdd(MixtureModel(LAW), lambda x, b: x[:, 0], Batch(["x", "y"]), 5, m=3, steps=10)
    assert torch.equal(alone.samples, among.samples[:2])


def test_samples_are_prompt_major_and_keyed():
    found = svdd(Told(LAW, exact=False), near, PROMPTS, 2, m=2, steps=10, seed=1)
    assert found.batch.prompts == ["1", "1", "4", "4", "9", "9"]
    assert found.batch.index == (0, 1, 65536, 65537, 131072, 131073)
    assert len(found.samples.unique()) == 6
