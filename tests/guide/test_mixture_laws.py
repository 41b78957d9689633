"""Guided laws on a Gaussian mixture, against the closed form."""

import math

import pytest
import torch
from cases import ALPHA, CENTRE, LAW, ks

from tropism.core import Batch, UserError
from tropism.guide.best_of_n import best_of_n
from tropism.guide.dps import dps
from tropism.guide.nested import nested
from tropism.guide.search import blockwise, refine
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
from tropism.guide.twisted import twisted
from tropism.guide.values import exact
from tropism.worlds.mixture import Law, Linear, MixtureModel

TILTED = CENTRE.tilted(LAW, ALPHA)
MODEL = MixtureModel(LAW)
EXACT = exact(lambda x, t: MODEL.soft_value(x, t, CENTRE, ALPHA))
ONE = Batch(["x"])
RUN = {"steps": 10, "max_batch": 10**6}


def test_the_reference_case():
    assert TILTED.weights.tolist() == pytest.approx([0.03940, 0.96060], abs=1e-5)
    assert TILTED.means[:, 0].tolist() == pytest.approx([-0.66667, 1.37879], abs=1e-5)
    assert TILTED.mean().item() == pytest.approx(1.29820, abs=1e-5)
    assert MODEL.log_z(CENTRE, ALPHA) == pytest.approx(-1.4920, abs=1e-4)


def test_the_tilted_law_is_the_law_times_the_weight():
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)[:, None]
    for reward in (CENTRE, Linear(torch.tensor([0.7], dtype=torch.float64))):
        log = LAW.log_prob(x) + reward(x) / ALPHA - MODEL.log_z(reward, ALPHA)
        torch.testing.assert_close(reward.tilted(LAW, ALPHA).log_prob(x), log, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [0, 4, 7, 9])
def test_soft_bellman(step):
    """alpha log mean exp(v(child) / alpha) over 200,000 children is the parent's value."""
    times = MODEL.process.times(10).tolist()
    x = torch.tensor([[0.3]], dtype=torch.float64).expand(200_000, 1)
    kernel, _ = MODEL.kernel(x, times[step], times[step + 1], None, 1.0)
    children = kernel.sample(torch.randn(len(x), 2, generator=torch.Generator().manual_seed(step)))
    v = MODEL.soft_value(children, times[step + 1], CENTRE, ALPHA)
    mean = ALPHA * (torch.logsumexp(v / ALPHA, 0) - math.log(len(v)))
    assert mean.item() == pytest.approx(MODEL.soft_value(x[:1], times[step], CENTRE, ALPHA).item(), abs=0.01)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_one_child_is_the_pre_trained_law(alpha):
    found = svdd(MODEL, CENTRE, ONE, 20_000, m=1, alpha=alpha, **RUN)
    assert found.samples.mean().item() == pytest.approx(-0.6, abs=0.03)
    assert (found.samples > 0).double().mean().item() == pytest.approx(0.30, abs=0.02)
    assert ks(found.samples, LAW) < 0.015


def test_svdd_with_exact_values_tends_to_the_tilted_law():
    far = [
        ks(svdd(MODEL, CENTRE, ONE, n, m=m, alpha=ALPHA, value=EXACT, **RUN).samples, TILTED)
        for m, n in ((1, 8000), (4, 8000), (16, 8000), (64, 4000))
    ]
    assert far[:3] == pytest.approx([0.66, 0.15, 0.03], abs=0.015)
    assert far[3] < 0.03
    assert far == sorted(far, reverse=True)


def test_posterior_means_lead_svdd_to_another_law_and_weights_back():
    plateau = svdd(MODEL, CENTRE, ONE, 4000, m=64, alpha=ALPHA, **RUN)
    assert ks(plateau.samples, TILTED) == pytest.approx(0.065, abs=0.02)
    assert ks(smc(MODEL, CENTRE, ONE, 20_000, alpha=ALPHA, threshold=1.0, **RUN).samples, TILTED) < 0.02
    assert ks(nested(MODEL, CENTRE, ONE, 10_000, m=4, alpha=ALPHA, **RUN).samples, TILTED) < 0.03


def test_one_gaussian_and_a_linear_reward_need_no_exact_values():
    """v - r(x_0 as expected) is then the same for every state, so the same children are chosen."""
    model, reward = MixtureModel(Law.of([1], [0.4], [0.3])), Linear(torch.tensor([0.7], dtype=torch.float64))
    known = exact(lambda x, t: model.soft_value(x, t, reward, ALPHA))
    by_mean, by_value = (
        svdd(model, reward, ONE, 500, m=8, alpha=ALPHA, **RUN, **value) for value in ({}, {"value": known})
    )
    assert torch.equal(by_mean.samples, by_value.samples)


def test_the_ends_of_alpha():
    cold, colder = (svdd(MODEL, CENTRE, ONE, 500, m=16, alpha=a, **RUN) for a in (1e-13, 0.0))
    assert torch.equal(cold.samples, colder.samples)
    assert colder.samples.mean().item() == pytest.approx(1.0, abs=0.01)
    assert colder.samples.var().item() < 0.01
    hot = svdd(MODEL, CENTRE, ONE, 20_000, m=8, alpha=1e6, **RUN)
    assert ks(hot.samples, LAW) < 0.015


def test_log_z():
    """The mean of 200 estimates is Z; those of exact values are close."""
    many, z = Batch(["x"] * 200), math.exp(-1.49199)
    for method, more in ((smc, {}), (nested, {"m": 4})):
        found = method(MODEL, CENTRE, many, 64, alpha=ALPHA, value=EXACT, **RUN, **more)
        assert found.log_z.exp().mean().item() == pytest.approx(z, rel=0.02)
    rough = smc(MODEL, CENTRE, many, 64, alpha=ALPHA, **RUN).log_z.exp()
    assert abs(rough.mean() - z) < 4 * rough.std() / 200**0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nested_at_a_hundred_thousand(seed):
    """Four children, 64 lineages a prompt, exact values: below the 99 % quantile of a perfect sampler of as many draws."""
    many = Batch(["x"] * 1563)
    found = nested(MODEL, CENTRE, many, 64, m=4, alpha=ALPHA, value=EXACT, seed=seed, **RUN)
    assert ks(found.samples[:100_000], TILTED) < 1.628 / 100_000**0.5


def test_nested_with_one_child_is_smc():
    one, other = (
        f(MODEL, CENTRE, ONE, 100, alpha=ALPHA, seed=3, **RUN, **m) for f, m in ((nested, {"m": 1}), (smc, {}))
    )
    assert torch.equal(one.samples, other.samples)
    assert one.log_z.item() == pytest.approx(other.log_z.item(), rel=1e-12)


@pytest.mark.parametrize("potential", ["diff", "max", "add", "now"])
@pytest.mark.parametrize("more", [{}, {"gamma": 0.2}])
def test_every_potential_ends_with_the_true_reward(potential, more, monkeypatch):
    """Without resampling the weights are exp(r / alpha), whatever was spent on the way."""
    monkeypatch.setattr("tropism.guide.smc.resampled", lambda run, state, *_: state)
    found = smc(MODEL, CENTRE, ONE, 50, alpha=ALPHA, potential=potential, **RUN, **more)
    torch.testing.assert_close(found.log_w, found.rewards / ALPHA, rtol=1e-9, atol=1e-9)


def test_smc_at_alpha_0_is_svdd():
    """K particles that all follow the best one are one lineage with K children: the same law."""
    many = Batch(["x"] * 400)
    followed = smc(MODEL, CENTRE, many, 8, alpha=1e-7, scheme="multinomial", threshold=1.0, **RUN)
    chosen = svdd(MODEL, CENTRE, many, 1, m=8, alpha=0.0, **RUN)
    best = followed.rewards.reshape(400, 8).amax(1)
    apart = best.mean() - chosen.rewards.mean()
    assert abs(apart) < 4 * ((best.var() + chosen.rewards.var()) / 400).sqrt() + 1e-6


def test_twisted_is_consistent_and_dps_is_not():
    """On the chain that DDIM runs, held against its own weighted draws."""
    model = MixtureModel(LAW, exact=False)
    base = svdd(model, CENTRE, Batch(["x"] * 2), 20_000, m=1, select_start=False, **RUN)
    weights = (base.rewards / ALPHA).softmax(0)
    mean = (weights * base.samples[:, 0]).sum().item()
    found = twisted(model, CENTRE, ONE, 10_000, alpha=ALPHA, max_batch=10**6, steps=10)
    assert found.samples.mean().item() == pytest.approx(mean, abs=0.03)
    assert found.costs.backward == found.costs.network == 10 * 10_000
    moved = dps(model, CENTRE, ONE, 5000, scale=2.0, max_batch=10**6, steps=10)
    assert moved.rewards.mean() > base.rewards.mean()
    assert abs(moved.samples.mean().item() - mean) > 0.05


def test_best_of_n_keeps_the_best_of_each():
    found = best_of_n(MODEL, CENTRE, Batch(["x", "y"]), 3, m=8, seed=1, **RUN)
    pool = best_of_n(MODEL, CENTRE, Batch(["x", "y"]), 24, m=1, seed=1, **RUN)
    each = pool.rewards.reshape(2, 3, 8)
    assert torch.equal(found.rewards, each.amax(2).flatten())
    pooled = best_of_n(MODEL, CENTRE, Batch(["x", "y"]), 3, m=8, seed=1, pooled=True, **RUN)
    assert torch.equal(pooled.rewards.reshape(2, 3), each.reshape(2, 24).sort(1, descending=True).values[:, :3])
    assert (found.costs.network, found.costs.rewards) == (10 * 48, 48)


def test_soft_best_of_n_tends_to_the_tilted_law():
    far = [ks(best_of_n(MODEL, CENTRE, ONE, 1000, m=m, alpha=ALPHA, **RUN).samples, TILTED) for m in (1, 8, 64)]
    assert far[0] > 0.6
    assert far == sorted(far, reverse=True)
    assert far[2] < 0.06


def test_blocks_lie_between_svdd_and_best_of_n():
    single = blockwise(MODEL, CENTRE, ONE, 300, m=8, block=1, **RUN)
    plain = svdd(MODEL, CENTRE, ONE, 300, m=8, select_start=False, **RUN)
    assert torch.equal(single.samples, plain.samples)
    best = [blockwise(MODEL, CENTRE, ONE, 300, m=8, block=b, **RUN) for b in (1, 2, 5, 10)]
    means = [b.rewards.mean().item() for b in best]
    assert means == sorted(means, reverse=True)
    assert [b.costs.rewards for b in best] == [300 * 8 * 10 // b for b in (1, 2, 5, 10)]


def test_loops_never_lower_a_reward():
    before, after = (refine(MODEL, CENTRE, ONE, 200, m=3, loops=k, **RUN) for k in (0, 3))
    assert (after.rewards >= before.rewards).all()
    assert after.rewards.mean() > before.rewards.mean() + 0.001


def test_more_children_are_better():
    medians = [svdd(MODEL, CENTRE, ONE, 500, m=m, **RUN).rewards.median().item() for m in (1, 2, 5, 10)]
    assert medians == sorted(medians)
    best = best_of_n(MODEL, CENTRE, ONE, 500, m=5, **RUN).rewards.median().item()
    assert medians[0] < best < medians[2]


def test_costs_are_the_closed_forms():
    n, m, steps = 7, 4, 10
    found = svdd(MODEL, CENTRE, ONE, n, m=m, select_start=False, **RUN).costs
    assert (found.network, found.rewards) == (n * (1 + (steps - 1) * m), n * steps * m)
    found = svdd(MODEL, CENTRE, ONE, n, m=m, **RUN).costs
    assert (found.network, found.rewards) == (n * steps * m, n * (steps + 1) * m)
    found = svdd(MODEL, CENTRE, ONE, n, m=m, value=EXACT, select_start=False, **RUN).costs
    assert (found.network, found.rewards) == (n * steps, n * m)
    found = smc(MODEL, CENTRE, ONE, n, alpha=ALPHA, **RUN).costs
    assert (found.network, found.rewards) == (n * steps, n * (steps + 1))


def test_chunks_change_nothing():
    for method, more in ((svdd, {"m": 3}), (nested, {"m": 3, "alpha": ALPHA}), (smc, {"alpha": ALPHA})):
        one, all_ = (method(MODEL, CENTRE, Batch(["x", "y"]), 6, steps=10, max_batch=b, **more) for b in (1, 10**6))
        assert torch.equal(one.samples, all_.samples)
        assert torch.equal(one.rewards, all_.rewards)
        assert one.costs == all_.costs


def test_shift_and_scale():
    shifted = lambda x, batch: CENTRE(x) + 1e4
    scaled = lambda x, batch: 1e3 * CENTRE(x)
    plain = svdd(MODEL, CENTRE, ONE, 100, m=6, alpha=ALPHA, **RUN).samples
    assert torch.equal(svdd(MODEL, shifted, ONE, 100, m=6, alpha=ALPHA, **RUN).samples, plain)
    assert torch.equal(svdd(MODEL, scaled, ONE, 100, m=6, alpha=1e3 * ALPHA, **RUN).samples, plain)


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        (svdd, {"m": 0}, "m is 0; it must be at least 1"),
        (svdd, {"alpha": -1.0}, "alpha is -1"),
        (svdd, {"refresh": 1.0, "alpha": 0.1}, "refresh is 1"),
        (svdd, {"refresh": 0.1}, "above 0"),
        (smc, {"alpha": 0.0}, "alpha is 0"),
        (smc, {"potential": "rise"}, "no potential 'rise'"),
        (smc, {"scheme": "roulette"}, "no resampling scheme 'roulette'"),
        (nested, {"alpha": float("nan")}, "alpha is nan"),
        (best_of_n, {"m": 0}, "m is 0"),
        (blockwise, {"block": 0}, "block is 0"),
        (refine, {"back": 0.0}, "back is 0"),
    ],
)
def test_numbers_that_cannot_be(method, more, says):
    with pytest.raises(UserError, match=says):
        method(MODEL, CENTRE, ONE, 4, **RUN, **more)


def test_what_cannot_guide():
    nothing = lambda x, batch: torch.full((len(x),), float("nan"))
    for method, more in ((svdd, {}), (smc, {"alpha": ALPHA}), (nested, {"alpha": ALPHA}), (best_of_n, {})):
        with pytest.raises(UserError, match="all 4 samples is -inf or NaN"):
            method(MODEL, nothing, ONE, 4, **RUN, **more)
    still = MixtureModel(LAW, exact=False)
    still.process = type(still.process)(still.process.alpha_bars, "trailing", 0, 0.0, 1.0)
    with pytest.raises(UserError, match=r"sampler is deterministic.*--eta 1"):
        svdd(still, CENTRE, ONE, 4, **RUN)
    with pytest.raises(UserError, match="n is 0"):
        svdd(MODEL, CENTRE, ONE, 0, **RUN)
    with pytest.raises(UserError, match="no gradient to guide by"):
        dps(MODEL, lambda x, batch: x.detach()[:, 0], ONE, 4, steps=10)


def test_a_reward_that_is_rarely_finite_still_guides():
    rare = lambda x, batch: torch.where(x[:, 0] > 1, 0.0, -torch.inf)
    found = svdd(MODEL, rare, ONE, 100, m=8, **RUN)
    plain = (svdd(MODEL, CENTRE, ONE, 1000, m=1, **RUN).samples > 1).double().mean()
    assert torch.isfinite(found.rewards).double().mean() > plain + 0.2
