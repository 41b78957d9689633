"""The fast path is its twin: the same samples from the same noise, for fewer rows."""

import pytest
import torch
from cases import ones, table
from twin import svdd_plain

from tropism.align.rollout import sample
from tropism.core import Batch, Draw
from tropism.guide.best_of_n import best_of_n
from tropism.guide.svdd import svdd
from tropism.guide.values import posterior_mean
from tropism.models.load import load_model
from tropism.models.masked_lm import Convolutions, MaskedModel, Shape
from tropism.worlds import utr

ARGMAX = posterior_mean("argmax")


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_same_samples_on_the_table(alpha):
    slow = svdd_plain(table(), ones, 40, steps=4, m=5, seed=2, alpha=alpha)
    fast = svdd(table(), ones, Batch([""]), 40, steps=4, m=5, seed=2, alpha=alpha, value=ARGMAX, select_start=False)
    assert torch.equal(fast.samples, slow)


def test_the_same_samples_of_a_network_for_fewer_rows():
    torch.manual_seed(0)
    model = MaskedModel(
        Convolutions(Shape(tuple("ACGU"), 50, hidden=8, kernel=3, dilations=(1, 2), repeats=1)).double()
    )
    model.dtype = torch.float64
    reward = lambda tokens, batch: (tokens == 3).double().sum(1) + (tokens[:, 0] == 1)
    steps, m, n = 128, 10, 8
    slow = svdd_plain(model, reward, n, steps=steps, m=m)
    rows = model.calls["network"]
    assert rows == n * (steps * (1 + m) - m), "the released loop, but for the last step's candidates, which are clean"
    fast = svdd(model, reward, Batch([""]), n, steps=steps, m=m, value=ARGMAX, select_start=False)
    assert torch.equal(fast.samples, slow)
    assert rows > 2 * fast.costs.network


def test_rna_takes_two_and_a_half_times_fewer_rows():
    """50 bases, 128 steps, 10 children, by the share of ribosomes that reach the start."""
    model, steps, m, n = load_model("utr", lora=None), 128, 10, 16
    share = lambda tokens, batch: torch.tensor([utr.scanned(s) for s in utr.text(tokens)])
    found = svdd(model, share, Batch([""]), n, steps=steps, m=m, value=ARGMAX, select_start=False)
    assert n * steps * (1 + m) > 2.5 * found.costs.network
    assert found.costs.rewards_computed < 0.7 * n * steps * m


def test_plain_samples_use_outputs_again():
    """The chain's own samples, bit for bit, for fewer rows: a row for every state that differs from the one before."""
    torch.manual_seed(0)
    model = MaskedModel(Convolutions(Shape(tuple("ACGU"), 12, hidden=8, kernel=3, dilations=(1,), repeats=1)).double())
    model.dtype = torch.float64
    reward, n, steps = (lambda tokens, batch: (tokens == 3).double().sum(1)), 16, 64
    found = best_of_n(model, reward, Batch([""]), n, m=1, steps=steps)
    rows = model.calls["network"]
    chain = sample(model, Batch([""] * n), Draw(0, 0, tuple(range(n))), steps=steps, guidance=1.0)
    assert torch.equal(found.samples, chain)
    assert rows == found.costs.network <= n * 12 + 1, "a place is filled in at most 12 steps, and all start alike"
    assert model.calls["network"] - rows == n * steps


class Aging(MaskedModel):
    """A network whose answers change with time, so that none may be used again."""

    uses_time = True

    def predict(self, x_t, t, cond, guidance):
        return super().predict(x_t, t, cond, guidance) * (3 * float(t) - 1)


def test_a_network_with_a_time_input_is_asked_anew():
    torch.manual_seed(0)
    model = Aging(Convolutions(Shape(tuple("ACGU"), 12, hidden=8, kernel=3, dilations=(1,), repeats=1)).double())
    model.dtype = torch.float64
    reward, n, steps = (lambda tokens, batch: (tokens == 3).double().sum(1)), 16, 24
    found = best_of_n(model, reward, Batch([""]), n, m=1, steps=steps)
    chain = sample(model, Batch([""] * n), Draw(0, 0, tuple(range(n))), steps=steps, guidance=1.0)
    assert torch.equal(found.samples, chain)
