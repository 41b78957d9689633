"""Guided laws on the table of all sequences, against dynamic programming."""

import math
from dataclasses import replace

import pytest
import torch
from cases import ALPHA, STEPS, histogram, ones, table, variation

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, UserError
from tropism.guide.dps import dps, slope
from tropism.guide.lineages import begin, setting
from tropism.guide.nested import nested
from tropism.guide.search import refine
from tropism.guide.smc import smc
from tropism.guide.svdd import refreshed, svdd
from tropism.guide.twisted import twisted
from tropism.guide.values import exact, posterior_mean

MODEL = table()
COUNT = ones(MODEL.states[MODEL.clean])
VALUES = MODEL.soft_values(COUNT, ALPHA, STEPS)
TILTED, LOG_Z = MODEL.tilted(COUNT, ALPHA, STEPS)
EXACT = exact(lambda x, t: MODEL.value_at(VALUES, x, t, STEPS))
ONE, MANY = Batch(["x"]), Batch(["x"] * 40)
RUN = {"steps": STEPS, "max_batch": 10**6}


def test_the_chain_is_not_the_data():
    assert MODEL.chain_law(STEPS).sum().item() == pytest.approx(1, abs=1e-12)
    assert 0.02 < variation(MODEL.chain_law(STEPS), MODEL.law) < 0.3
    assert variation(MODEL.chain_law(64), MODEL.law) < 0.02


def test_tilting_every_step_tilts_the_chain():
    """p(x_s | x_t) exp((v_s - v_t) / alpha) is a chain, and ends in the chain's law times exp(r / alpha) / Z."""
    probability = torch.zeros(len(MODEL.states), dtype=torch.float64)
    probability[MODEL.index(torch.full((1, 4), MODEL.process.mask))] = 1.0
    for transition, before, after in zip(MODEL.transitions(STEPS), VALUES, VALUES[1:], strict=False):
        tilted = transition * ((after[None] - before[:, None]) / ALPHA).exp()
        torch.testing.assert_close(tilted.sum(1), torch.ones(len(tilted), dtype=torch.float64), rtol=1e-12, atol=0)
        probability = probability @ tilted
    torch.testing.assert_close(probability[MODEL.clean], TILTED.flatten(), rtol=1e-12, atol=1e-15)
    masked = MODEL.index(torch.full((1, 4), MODEL.process.mask))
    assert VALUES[0][masked].item() / ALPHA == pytest.approx(LOG_Z, abs=1e-12)


def test_one_child_is_the_plain_sampler_bit_for_bit():
    found = svdd(MODEL, ones, Batch(["x"]), 1, m=1, seed=5, **RUN)
    assert torch.equal(found.samples, sample(MODEL, Batch(["x"]), Draw(5, 0, (0,)), steps=STEPS, guidance=1.0))
    many = svdd(MODEL, ones, ONE, 20_000, m=1, **RUN)
    assert variation(histogram(many.samples, MODEL), MODEL.chain_law(STEPS)) < 0.06


@pytest.mark.slow
def test_svdd_by_the_kind_of_value():
    """Exact values lead to the tilted law, four completions near it, the likeliest completion somewhere else."""
    far = {}
    for name, value in (
        ("exact", EXACT),
        ("sample", posterior_mean("sample", 4)),
        ("argmax", posterior_mean("argmax")),
    ):
        found = svdd(MODEL, ones, ONE, 4000, m=32, alpha=ALPHA, value=value, **RUN)
        far[name] = variation(histogram(found.samples, MODEL), TILTED)
    assert far["exact"] < 0.11
    assert far["sample"] < 0.14
    assert far["argmax"] > far["sample"] + 0.05


@pytest.mark.parametrize("mode", ["sample", "argmax"])
def test_weights_lead_to_the_tilted_law_whatever_the_value(mode):
    for method, more in ((smc, {}), (nested, {"m": 3})):
        unbiased(method(MODEL, ones, MANY, 500, alpha=ALPHA, value=posterior_mean(mode), **RUN, **more))


def unbiased(found):
    """The estimates of Z have its mean, and their samples the tilted law."""
    z = found.log_z.exp()
    assert abs(z.mean() - math.exp(LOG_Z)) < 4 * z.std() / len(z) ** 0.5
    assert variation(histogram(found.samples, MODEL), TILTED) < 0.1


def test_twisted_proposals_are_taken_back_by_their_weights():
    linear = lambda x, batch: (x[..., 1] if x.is_floating_point() else (x == 1).to(torch.float64)).sum(1)
    for through in (True, False):
        unbiased(twisted(MODEL, linear, MANY, 500, alpha=ALPHA, through_denoiser=through, **RUN))
    assert dps(MODEL, linear, ONE, 2000, steps=STEPS, scale=2.0).rewards.mean() > COUNT.mean() + 0.5


def test_a_token_gradient_is_the_difference_of_a_substitution():
    """For a linear reward, exactly: g_token - g_mask is what the expected reward gains when a masked place is decoded so."""
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    linear = lambda x, batch: (weights * x).sum((1, 2))
    run = setting(MODEL, linear, ONE, 3, steps=STEPS, guidance=1.0, seed=0)
    x = torch.tensor([[4, 1, 4, 2], [4, 4, 4, 4], [0, 1, 2, 3]])
    g, out, _ = slope(run, x, 0.5, torch.arange(3), through=False)
    for row in range(3):
        for place in (x[row] == 4).nonzero()[:, 0].tolist():
            gain = weights[place] - (out[row, place] * weights[place]).sum()
            torch.testing.assert_close(g[row, place, :4] - g[row, place, 4], gain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("through", [True, False])
def test_the_slope_is_that_of_finite_differences(through):
    from cases import CENTRE, LAW

    from tropism.worlds.mixture import MixtureModel

    model = MixtureModel(LAW, exact=False)
    run = setting(model, CENTRE, ONE, 4, steps=10, guidance=1.0, seed=0)
    x, t = begin(run).x, 5.0
    g, out, _ = slope(run, x, t, torch.arange(4), through)
    h, alpha, sigma = 1e-6, float(model.process.alpha(t)), float(model.process.sigma(t))
    noise = (x - alpha * out) / sigma

    def value(y):
        clean = model.predict(y, t, None, 1.0) if through else (y - sigma * noise) / alpha
        return CENTRE(clean)

    measured = (value(x + h) - value(x - h)) / (2 * h)
    torch.testing.assert_close(g[:, 0], measured, rtol=1e-4, atol=1e-8)


def test_equal_states_are_looked_at_once():
    """Rows through the network: the distinct (prompt, state) pairs of every step, those of the parents not again."""
    seen, original = [], MODEL.predict

    class Watched(type(MODEL)):
        def predict(self, x, *rest):
            seen.append(x)
            return original(x, *rest)

    watched = Watched(MODEL.law)
    svdd(watched, ones, ONE, 50, m=8, value=posterior_mean("argmax"), **RUN)
    for calls in seen:
        assert len(calls.unique(dim=0)) == len(calls)
    assert len(seen[0]) == 1, "all start as masks"
    assert sum(map(len, seen)) < 0.35 * 50 * (1 + 3 * 8)


def test_rewards_are_computed_once_a_sequence():
    scored = []
    counted = lambda x, batch: scored.append(len(x)) or ones(x)
    found = svdd(MODEL, counted, Batch(["x", "y"]), 20, m=8, value=posterior_mean("argmax"), **RUN)
    assert sum(scored) == found.costs.rewards_computed <= 2 * 256 < found.costs.rewards


def test_chunks_and_reuse_change_nothing():
    class Forgetful(type(MODEL)):
        uses_time = True

    for value in (posterior_mean("argmax"), posterior_mean("sample", 3)):
        how = {"m": 5, "alpha": ALPHA, "value": value, "steps": STEPS}
        found = [
            svdd(model, ones, Batch(["x", "y"]), 6, max_batch=b, **how)
            for model, b in ((MODEL, 1), (MODEL, 10**6), (Forgetful(MODEL.law), 10**6))
        ]
        for other in found[1:]:
            assert torch.equal(found[0].samples, other.samples)
            assert torch.equal(found[0].rewards, other.rewards)
        assert found[2].costs.network >= found[1].costs.network == found[0].costs.network


def test_fixed_tokens_stay():
    fixed = torch.tensor([-1, 2, -1, 0])
    for method, more in ((svdd, {"m": 4}), (smc, {"alpha": ALPHA}), (nested, {"alpha": ALPHA}), (refine, {"m": 2})):
        found = method(MODEL, ones, ONE, 50, fixed=fixed, **RUN, **more)
        assert (found.samples[:, 1] == 2).all() and (found.samples[:, 3] == 0).all()
        assert len(found.samples[:, 0].unique()) > 1
    with pytest.raises(UserError, match=r"length 4.*-1: free"):
        svdd(MODEL, ones, ONE, 5, fixed=torch.tensor([1, 2]), **RUN)


def test_only_the_worst_lineages_are_refreshed():
    """A quarter of each prompt's: the three best of four stay where they are, the worst becomes a copy of the best."""
    run = setting(MODEL, ones, Batch(["x", "y"]), 4, steps=STEPS, guidance=1.0, seed=0, alpha=0.01)
    values = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.5, 0.1, 0.9, 0.7], dtype=torch.float64)
    state = refreshed(run, replace(begin(run), value=values), 0.25)
    assert state.ancestors.tolist() == [0, 1, 2, 0, 4, 6, 6, 7]


def test_refreshing_copies_the_better_lineages():
    plain = svdd(MODEL, ones, ONE, 400, m=2, alpha=0.2, **RUN)
    fresh = svdd(MODEL, ones, ONE, 400, m=2, alpha=0.2, refresh=0.3, **RUN)
    assert fresh.rewards.mean() > plain.rewards.mean() + 0.2


@pytest.mark.parametrize("mode", ["sample", "argmax", "auto"])
def test_the_value_of_what_is_decoded_is_its_reward(mode):
    """Completions of a state without masks are the state."""
    run = setting(MODEL, ones, ONE, 3, steps=STEPS, guidance=1.0, seed=0, alpha=ALPHA)
    x = torch.tensor([[0, 1, 1, 3], [1, 1, 1, 1], [2, 2, 0, 0]])
    v = posterior_mean(mode)(run)(x, 0.5, torch.arange(3), MODEL.predict(x, 0.5))
    torch.testing.assert_close(v, ones(x))
