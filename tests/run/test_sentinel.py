"""The rule of over-optimisation on evaluations made by hand; the proof on 100 runs is recipes/sentinel.py."""

import pytest
import torch

from tropism.run.sentinel import PATIENCE, Seen, assess, scores


def run(means, trained=None, n=64, noise=0.3, seed=0, **others):
    """Evaluations whose held-out reward has these means; the pictures keep their own level, as on fixed noise."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, generator=g, dtype=torch.float64)
    own, trained = draw(), trained or [float(i) for i in range(len(means))]
    held = lambda m: m + own + noise * draw()
    rows = zip(means, trained, *others.values(), strict=True)
    return [Seen(10 * i, t + draw(), {"judge": held(m), **{k: held(v) for k, v in zip(others, more, strict=True)}})
            for i, (m, t, *more) in enumerate(rows)]  # fmt: skip


def test_a_reward_that_goes_on_while_its_judge_falls():
    rise, fall = [0, 0.5, 1.0, 1.5], [1.1, 0.7, 0.3]
    for count in range(1, 4):
        found = assess(run(rise + fall[:count]))
        assert found.best == 30
        assert found.falling == count
        assert bool(found.alarm) == (count >= PATIENCE)
    assert "since update 30 the trained reward rose by" in found.alarm
    assert "while judge fell by 1." in found.alarm


@pytest.mark.parametrize(
    ("means", "trained"),
    [
        ([0, 0.5, 1.0, 1.0, 1.0, 1.0], None),  # a plateau
        ([0, 0.5, 1.0, 0.97, 0.95, 0.97], None),  # less than a little
        ([0, 0.5, 1.0, 0.5, 1.0, 0.5], None),  # never twice in a row
        ([0, 0.5, 1.0, 0.5, 0.0, -0.5], [0, 1, 2, 1, 0, -1]),  # a run that fails, but does not cheat
    ],
)
def test_no_false_alarm(means, trained):
    for seed in range(20):
        assert not assess(run(means, trained, seed=seed)).alarm


def test_chance_is_not_a_fall():
    """With eight noisy pictures a fall of a fifth of the gain is within four standard errors."""
    alarms = sum(bool(assess(run([0, 1.0, 0.9, 0.8], n=8, noise=1.0, seed=s)).alarm) for s in range(100))
    assert alarms <= 2


def test_each_judge_counts_in_its_own_units():
    seen = run([0, 1.0, 1.0, 1.0], other=[0, 1.0, -1.0, -2.0])
    scaled = [
        Seen(s.update, s.trained, {"judge": s.held_out["judge"], "other": 1e3 * s.held_out["other"] + 7}) for s in seen
    ]
    torch.testing.assert_close(scores(seen), scores(scaled))
    assert scores(seen)[0].mean().abs() < 1e-12
    found = assess(seen)
    assert found.best == 10 and "other fell by 2." in found.alarm


def test_without_a_judge_the_trained_reward_chooses_and_nothing_is_alarmed():
    seen = [Seen(s.update, s.trained) for s in run([0, 1, 0, 0], [0.0, 3.0, 1.0, 2.0])]
    assert assess(seen) == assess(seen[:3]).__class__(10, "", 0)
