"""Resampling: unbiased, as even as a scheme promises, a prompt among itself."""

from dataclasses import replace

import pytest
import torch
from cases import ALPHA, ones, table

from tropism.core import Batch
from tropism.guide.lineages import begin, setting
from tropism.guide.resample import SCHEMES, resampled
from tropism.guide.steps import effective
from tropism.guide.svdd import pick

W = torch.tensor([0.05, 0.31, 0.0, 0.2, 0.27, 0.17], dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEMES)
def test_copies_are_unbiased(name):
    u = torch.rand(20_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies = torch.stack([torch.bincount(SCHEMES[name](W, row), minlength=6) for row in u]).double()
    assert (copies.sum(1) == 6).all()
    error = (copies.mean(0) - 6 * W).abs() / (copies.std(0) / len(u) ** 0.5).clamp_min(1e-9)
    assert (error < 4.5).all()
    if name in ("systematic", "ssp"):
        assert ((copies == (6 * W).floor()) | (copies == (6 * W).ceil())).all()
    if name == "residual":
        assert (copies >= (6 * W).floor()).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_equal_weights_and_a_single_heir(name):
    u = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name != "multinomial":
        assert SCHEMES[name](torch.full((5,), 0.2, dtype=torch.float64), u).sort().values.tolist() == [0, 1, 2, 3, 4]
    heir = torch.tensor([0, 0, 1, 0, 0], dtype=torch.float64)
    assert SCHEMES[name](heir, u).tolist() == [2] * 5


def test_effective_sample_size():
    assert effective(torch.zeros(7)).item() == pytest.approx(1)
    assert effective(torch.tensor([0.0, -1e9, -1e9, -1e9])).item() == pytest.approx(0.25)
    assert effective(torch.tensor([1e5, 1e5, 1e5 - 1e3])).item() == pytest.approx(2 / 3)


def test_prompts_keep_to_themselves_and_weights_are_carried():
    run = setting(table(), ones, Batch(["x", "y", "z"]), 4, steps=2, guidance=1.0, seed=0, alpha=ALPHA)
    log_w = torch.tensor([[0, 0, 0, 9.0], [0, 0.1, 0, 0], [-torch.inf] * 4], dtype=torch.float64)
    state = replace(begin(run), log_w=log_w.flatten(), value=torch.arange(12.0))
    after = resampled(run, state, "systematic", 0.5)
    rows = after.ancestors.reshape(3, 4)
    assert (rows[0] == 3).sum() >= 3 and (rows[0] < 4).all()
    assert rows[1].tolist() == [4, 5, 6, 7] and rows[2].tolist() == [8, 9, 10, 11]
    assert torch.equal(after.value, after.ancestors.float()), "everything of a lineage goes with it"
    assert after.log_w.reshape(3, 4)[0].tolist() == [0] * 4
    assert torch.equal(after.log_w.reshape(3, 4)[1:], log_w[1:])
    assert after.log_z[0].item() == pytest.approx(torch.logsumexp(log_w[0], 0).item() - torch.tensor(4.0).log().item())
    assert after.log_z[1:].tolist() == [0, 0]


def test_picking():
    v = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64).expand(60_000, 3)
    u = torch.rand(60_000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    share = torch.bincount(pick(v, 0.7, u), minlength=3).double() / len(v)
    torch.testing.assert_close(share, (v[0] / 0.7).softmax(0), rtol=0, atol=0.01)
    assert (pick(v, 0.0, u) == 2).all()
    ties = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64).expand(60_000, 3)
    assert torch.bincount(pick(ties, 0.0, u), minlength=3)[:2].double().div(60_000).tolist() == pytest.approx(
        [0.5, 0.5], abs=0.01
    )
    none = torch.full((1000, 3), -torch.inf, dtype=torch.float64)
    assert len(pick(none, 0.5, u[:1000]).unique()) == 3, "no finite value: at random"


def test_picking_never_overflows():
    u = torch.rand(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    huge = torch.tensor([[1e4, -1e4, 1e4 - 1]], dtype=torch.float32).expand(4, 3)
    assert (pick(huge.double(), 1e-3, u) == 0).all()
    torch.testing.assert_close(pick(huge.double() + 1e4, 0.5, u), pick(huge.double(), 0.5, u))
