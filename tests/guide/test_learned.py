"""Learned values: what each loss is best at, by exact expectations; and that a fitted judge guides."""

import pytest
import torch
from cases import ALPHA, LAW, STEPS, histogram, ones, table, variation

from tropism.core import Batch, UserError
from tropism.guide.best_of_n import best_of_n
from tropism.guide.learned import LOSSES, RollOuts, TokenValue, fitted, learned, regression, roll_outs, standardised
from tropism.guide.lineages import setting
from tropism.guide.svdd import svdd
from tropism.worlds.mixture import MixtureModel

MODEL = table()
COUNT = ones(MODEL.states[MODEL.clean])


def ends(step):
    """p(x_0 | x_t) (states, sequences) of the chain from a step on."""
    found = torch.eye(len(MODEL.states), dtype=torch.float64)
    for transition in MODEL.transitions(STEPS)[step:]:
        found = found @ transition
    return found[:, MODEL.clean]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_best_fit_of_each_loss(loss):
    """Of a table of numbers, under the exact joint law: E[r | x_t], or the soft value, to 1e-3."""
    law = ends(1)
    mean = law @ COUNT
    f = (
        (mean[:, None] if loss == "soft" else torch.ones(len(MODEL.states), 1, dtype=torch.float64))
        .clone()
        .requires_grad_()
    )
    optimiser = torch.optim.LBFGS(
        [f], lr=0.5, max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-14
    )

    def closure():
        optimiser.zero_grad()
        value = (law * regression(f, COUNT[None], ALPHA, loss, COUNT.max().item())).sum()
        (1e4 * value).backward()
        return 1e4 * value

    for _ in range(4):
        optimiser.step(closure)
    soft = MODEL.soft_values(COUNT, ALPHA, STEPS)[1]
    best = mean if loss == "mean" else soft
    if loss == "soft":  # it is flat where exp(r / alpha) is small, so that is where it is compared
        torch.testing.assert_close(
            ((f.detach()[:, 0] - 4) / ALPHA).exp(), ((best - 4) / ALPHA).exp(), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(f.detach()[:, 0], best, rtol=0, atol=0.02)
    else:
        torch.testing.assert_close(f.detach()[:, 0], best, rtol=0, atol=1e-3)
    assert (soft >= mean - 1e-9).all() and (soft - mean).max() > 0.1, "Jensen's gap"


def test_linex_does_not_overflow():
    f, r = torch.tensor([-1e4, 0.0, 3.0], requires_grad=True), torch.tensor([1e4, 0.0, 1.0])
    value = regression(f, r, 1e-2, "linex")
    assert torch.isfinite(value).all() and value[1] == 0 and (value[[0, 2]] > 0).all()
    (g,) = torch.autograd.grad(value.sum(), f)
    assert torch.isfinite(g).all() and g[0] < 0 < g[2]


def test_roll_outs_are_the_plain_chain():
    data = roll_outs(MODEL, ones, Batch(["x", "y"]), 3000, steps=STEPS)
    assert data.states.shape == (6000, STEPS, 4)
    assert (data.states[:, 0] == MODEL.process.mask).all()
    share = (data.states == MODEL.process.mask).double().mean((0, 2))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64), rtol=0, atol=0.02)
    assert data.rewards.mean().item() == pytest.approx(
        (MODEL.chain_law(STEPS).flatten() * COUNT).sum().item(), abs=0.05
    )


def test_roll_outs_share_no_noise_with_guided_samples():
    mixture = MixtureModel(LAW)
    reward = lambda samples, batch: samples[:, 0]
    data = roll_outs(mixture, reward, Batch(["x"]), 5, steps=4)
    plain = best_of_n(mixture, reward, Batch(["x"]), 5, m=1, steps=4)
    starts = setting(mixture, reward, Batch(["x"]), 5, steps=4, guidance=1.0, seed=0).start
    assert not torch.isclose(data.states[:, 0], starts).any()
    assert not torch.isclose(data.rewards, plain.rewards).any()


def test_a_fitted_judge_guides_at_one_row_a_step():
    data = roll_outs(MODEL, ones, Batch(["x"]), 4000, steps=STEPS)
    torch.manual_seed(0)
    judge = fitted(TokenValue(4, hidden=16, kernel=3, layers=2), data, alpha=ALPHA, loss="linex", updates=400, lr=5e-3)
    seen = torch.cat(list(data.states[:200].unbind(1)))
    t = torch.tensor(data.times, dtype=torch.float64).repeat_interleave(200)
    exact = torch.cat(
        [MODEL.value_at(MODEL.soft_values(COUNT, ALPHA, STEPS), seen[t == s], s, STEPS) for s in data.times]
    )
    assert (judge(seen, t).double() - exact).abs().mean() < 0.15
    found = svdd(MODEL, ones, Batch(["x"]), 4000, m=16, alpha=ALPHA, value=learned(judge), steps=STEPS, max_batch=10**6)
    tilted = MODEL.tilted(COUNT, ALPHA, STEPS)[0]
    assert variation(histogram(found.samples, MODEL), tilted) < 0.2 < variation(MODEL.chain_law(STEPS), tilted)
    assert found.costs.network == found.costs.distinct < 1000, (
        "one row a sample and step would be 16,000; equal states share theirs"
    )


def test_each_prompt_is_measured_by_its_own_mean():
    rewards = torch.tensor([1.0, 2, 3, 2, 101, 103, 99, -torch.inf])
    found, mean, scale = standardised(RollOuts(torch.zeros(8, 1, 4), (1.0,), rewards), 2)
    each = found.rewards.reshape(2, 4)
    torch.testing.assert_close(each.mean(1), torch.zeros(2))
    torch.testing.assert_close((each[1] * scale), torch.tensor([25.0, 27, 23, -75]))
    assert found.rewards.std().item() == pytest.approx(1) and mean == pytest.approx(39)
    few, mean, scale = standardised(RollOuts(torch.zeros(8, 1, 4), (1.0,), rewards[:7].repeat(2)[:8]), 4)
    torch.testing.assert_close(few.rewards * scale + mean, rewards[:7].repeat(2)[:8])


def test_what_cannot_be_fitted():
    data = RollOuts(torch.zeros(2, 3, 4, dtype=torch.long), (1.0, 0.5, 0.25), torch.tensor([1.0, torch.inf]))
    net = TokenValue(4)
    with pytest.raises(UserError, match="not finite"):
        fitted(net, data, alpha=1.0)
    with pytest.raises(UserError, match="loss is 'square'"):
        fitted(net, data, alpha=1.0, loss="square")
    with pytest.raises(UserError, match="alpha above 0"):
        fitted(net, data, alpha=0.0, loss="soft")
