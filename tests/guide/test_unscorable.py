"""Rewards and values that are sometimes -inf or NaN: a docking that timed out must not blind a run."""

import math

import pytest
import torch
from cases import STEPS, histogram, ones, table, variation

from tropism.core import Batch, UserError
from tropism.guide.best_of_n import best_of_n
from tropism.guide.nested import nested
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
from tropism.guide.values import exact, posterior_mean

MODEL, ALPHA = table(), 1.0
"""A higher temperature than elsewhere: the estimates of Z have lighter tails."""
RUN = {"steps": STEPS, "max_batch": 10**6}
BAD = {"-inf": -torch.inf, "NaN": torch.nan}


def forbidding(bad):
    """The count of ones, but `bad` where the sequence begins with 0: about a quarter of the plain chain's."""
    return lambda samples, batch=None: torch.where(samples[:, 0] == 0, bad, ones(samples))


CLEAN = MODEL.states[MODEL.clean]
TILTED, LOG_Z = MODEL.tilted(forbidding(-torch.inf)(CLEAN), ALPHA, STEPS)


@pytest.mark.parametrize(
    ("method", "more", "mode", "bad"),
    [
        (smc, {"threshold": 0.5}, "argmax", "NaN"),
        (smc, {"threshold": 0.9}, "argmax", "-inf"),
        (smc, {"threshold": 0.5}, "sample", "-inf"),
        (nested, {"m": 3}, "argmax", "-inf"),
        (nested, {"m": 3}, "sample", "NaN"),
    ],
)
def test_weights_still_lead_to_the_tilted_law(method, more, mode, bad):
    """Early values of -inf (the likeliest completion is forbidden) must not bury what can still end well."""
    how = {"alpha": ALPHA, "value": posterior_mean(mode), **more, **RUN}
    found = method(MODEL, forbidding(BAD[bad]), Batch(["x"] * 20), 300, **how)
    assert not found.log_w.isnan().any()
    assert (found.samples[:, 0] != 0).all(), "the last weight uses the true reward"
    z = found.log_z.exp()
    assert abs(z.mean() - math.exp(LOG_Z)) < 4 * z.std() / len(z) ** 0.5
    off = variation(histogram(found.samples, MODEL), TILTED)
    assert off < 0.15 < 0.5 * variation(MODEL.chain_law(STEPS), TILTED)
    assert found.ess.min() > 0


def test_few_particles_go_on_competing():
    """With 32 a prompt the forbidden ones are gone in nearly every prompt, and the others are better than plain ones."""
    found = smc(MODEL, forbidding(-torch.inf), Batch(["x"] * 100), 32, alpha=ALPHA, **RUN)
    plain = best_of_n(MODEL, forbidding(-torch.inf), Batch(["x"] * 100), 32, m=1, **RUN)
    mean = lambda f: f.rewards[f.rewards.isfinite()].mean()
    assert found.rewards.isinf().double().mean() < 0.01 < plain.rewards.isinf().double().mean()
    assert mean(found) > mean(plain) + 0.5


def test_one_failed_completion_does_not_hide_the_others():
    """SVDD takes the best child by four completions each, of which a quarter fail."""
    reward = forbidding(-torch.inf)
    value = posterior_mean("sample", 4)
    guided = svdd(MODEL, reward, Batch(["x"]), 2000, m=8, value=value, select_start=False, **RUN)
    free = svdd(MODEL, ones, Batch(["x"]), 2000, m=8, value=value, select_start=False, **RUN)
    assert guided.rewards.isinf().double().mean() < 0.02
    assert guided.rewards[guided.rewards.isfinite()].mean() > free.rewards.mean() - 0.5


def test_a_method_without_weights_has_no_estimate_of_z():
    for method in (svdd, best_of_n):
        assert method(MODEL, ones, Batch(["x"] * 2), 4, m=2, **RUN).log_z.isnan().all()


@pytest.mark.parametrize("method", [svdd, smc, nested, best_of_n])
def test_nothing_is_better_than_infinity(method):
    infinite = lambda samples, batch: torch.where(samples[:, 0] == 0, torch.inf, 0.0)
    with pytest.raises(UserError, match=r"\+inf for"):
        method(MODEL, infinite, Batch(["x"]), 64, **RUN)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, t: x.double(), "shape"),
        (lambda x, t: 1.0, "shape"),
        (lambda x: x, "failed on states"),
        (lambda x, t: [1] * (len(x) + 1), "shape"),
        (lambda x, t: x / "a", "TypeError"),
        (lambda x, t: torch.full((len(x),), math.nan), "cannot guide"),
        (lambda x, t: torch.full((len(x),), math.inf), "cannot guide"),
        (3, "not callable"),
    ],
)
def test_values_that_are_none(function, says):
    with pytest.raises(UserError, match=says):
        svdd(MODEL, ones, Batch(["x"]), 4, m=2, value=exact(function), **RUN)


def test_values_as_lists_and_arrays_will_do():
    plain = svdd(MODEL, ones, Batch(["x"]), 8, m=3, value=exact(lambda x, t: ones(x)), **RUN)
    for form in (lambda v: v.tolist(), lambda v: v.numpy(), lambda v: v.long()):
        same = svdd(MODEL, ones, Batch(["x"]), 8, m=3, value=exact(lambda x, t, form=form: form(ones(x))), **RUN)
        assert torch.equal(plain.samples, same.samples)
