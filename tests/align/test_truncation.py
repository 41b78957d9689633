"""Truncation policies: marginals, contiguity, determinism, errors."""

import math

import numpy as np
import pytest

from tropism.align import truncation as T
from tropism.core import Stream, UserError, generator

N, DRAWS = 50, 8_000


def simulate(policy, n=N, draws=DRAWS):
    rng = np.random.default_rng(0)
    return np.array([policy(n, rng) for _ in range(draws)])


def near(frequency, p):
    """Within 3.7 sigma: all of some sixty frequencies at once stay inside 99 times in 100."""
    return np.all(np.abs(frequency - p) <= 3.7 * np.sqrt(p * (1 - p) / DRAWS) + 1e-12)


@pytest.mark.parametrize(
    ("policy", "marginal"),
    [
        (T.suffix_uniform, (np.arange(N) + 1) / N),
        (T.bernoulli, (np.arange(N) + 1) / N),
        (T.bernoulli_released, (np.arange(N) + 1) / (N + 1)),
    ],
)
def test_marginals(policy, marginal):
    assert near(simulate(policy).mean(0), marginal)


@pytest.mark.parametrize("policy", [T.suffix_uniform, T.suffix_gaussian])
def test_suffixes_are_contiguous_and_never_empty(policy):
    drawn = simulate(policy, draws=2000)
    assert np.all(np.diff(drawn.astype(int), axis=1) >= 0)
    assert drawn[:, -1].all()


def test_bernoulli_is_never_empty_and_hardly_ever_a_suffix():
    drawn = simulate(T.bernoulli, draws=2000)
    assert drawn.any(1).all()
    assert np.all(np.diff(drawn.astype(int), axis=1) >= 0, axis=1).mean() < 0.01


def test_the_released_code_can_leave_the_last_step_out():
    assert 1 - simulate(T.bernoulli_released)[:, -1].mean() == pytest.approx(1 / 51, rel=0.3)


def test_gaussian_depth():
    """m = int(N(42, 5)) of 50 steps, kept in 1..49: the mean depth is that of the exact law."""
    below = lambda x: 0.5 * (1 + math.erf((x - 42) / 5 / math.sqrt(2)))
    m = np.arange(1, 50)
    law = np.array([below(i + 1) - below(i) for i in m])
    assert simulate(T.suffix_gaussian).sum(1).mean() == pytest.approx(50 - (m * law).sum() / law.sum(), abs=0.1)


def test_the_gaussian_never_reaches_the_whole_of_a_short_chain():
    """n = 2: m = 0 has a chance of 3e-4, is drawn again, and leaves the last step alone."""
    assert set(map(tuple, simulate(T.suffix_gaussian, n=2, draws=40_000).tolist())) == {(False, True)}


def test_a_users_policy_must_answer_for_every_step():
    assert T.active_steps(lambda n, rng: [0, 1, 2], 3, np.random.default_rng(0)) == (False, True, True)
    for wrong in (2, 4):
        with pytest.raises(UserError, match=f"{wrong} entries for 3 steps"):
            T.active_steps(lambda n, rng, wrong=wrong: [True] * wrong, 3, np.random.default_rng(0))


@pytest.mark.parametrize("k", [1, 3, N])
def test_fixed(k):
    assert sum(T.active_steps(k, N, np.random.default_rng(0))) == k
    assert T.active_steps("full", N, np.random.default_rng(0)) == (True,) * N


@pytest.mark.parametrize("k", [0, -1, 51, "51"])
def test_a_depth_that_cannot_be_is_refused(k):
    with pytest.raises(UserError, match="50 steps"):
        T.active_steps(k, N, np.random.default_rng(0))


def test_unknown_name_suggests():
    with pytest.raises(UserError, match="Did you mean 'suffix-uniform'"):
        T.active_steps("sufix-uniform", N, np.random.default_rng(0))


def test_the_draw_is_a_function_of_seed_and_update():
    one = [T.active_steps("bernoulli", N, generator(7, Stream.TRUNCATION, u)) for u in range(20)]
    two = [T.active_steps("bernoulli", N, generator(7, Stream.TRUNCATION, u)) for u in range(20)]
    assert one == two
    assert len(set(one)) == 20


def test_one_step_chains():
    for policy in T.POLICIES.values():
        assert len(policy(1, np.random.default_rng(0))) == 1
    assert math.isclose(sum(T.suffix_gaussian(1, np.random.default_rng(0))), 1)
