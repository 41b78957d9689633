"""Children, prompts, conditions and noise belong together: the two tiling bugs of released code, and what catches them."""

import pytest
import torch
from cases import LAW

from tropism.core import Batch
from tropism.guide import steps
from tropism.guide.search import blockwise
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
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


def test_the_layout_bugs_of_released_code_are_caught(monkeypatch):
    """Prompts tiled [1, 4, 9, 1, 4, 9, ...] against children [1, 1, 1, 1, 4, ...]: as batched guidance and molecule masks did it."""

    original = steps.predicted

    def tiled(run, x, s, rows, parents=None):
        m = len(rows) // len(run.batch)
        return original(run, x, s, torch.arange(len(run.batch)).repeat(m), parents)

    monkeypatch.setattr(steps, "predicted", tiled)
    wrong = drawn(svdd, m=2)
    assert (wrong - torch.tensor([1, 1, 4, 4, 9, 9.0]).double()).abs().max() > 1


def test_a_lineage_is_the_same_in_other_company():
    alone = svdd(MixtureModel(LAW), lambda x, b: x[:, 0], Batch(["x"]), 2, m=3, steps=10)
    among = svdd(MixtureModel(LAW), lambda x, b: x[:, 0], Batch(["x", "y"]), 5, m=3, steps=10)
    assert torch.equal(alone.samples, among.samples[:2])


def test_samples_are_prompt_major_and_keyed():
    found = svdd(Told(LAW, exact=False), near, PROMPTS, 2, m=2, steps=10, seed=1)
    assert found.batch.prompts == ["1", "1", "4", "4", "9", "9"]
    assert found.batch.index == (0, 1, 65536, 65537, 131072, 131073)
    assert len(found.samples.unique()) == 6
