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
    assert scores(seen)[:, 0].mean().abs() < 1e-12
    found = assess(seen)
    assert found.best == 10 and "other fell by 2." in found.alarm


def test_a_judge_that_rises_hides_none_that_falls():
    """The mean of the two goes on rising, and the run is still sent back to where neither had fallen."""
    judge, other = [0, 1.0, 0.7, 0.4], [0, 1.0, 2.0, 3.0]
    for count in range(2, 5):
        found = assess(run(judge[:count], other=other[:count]))
        assert (found.best, found.falling, bool(found.alarm)) == (10, max(0, count - 2), count == 4)
    assert "since update 10" in found.alarm and "while judge fell by 0." in found.alarm


@pytest.mark.parametrize("other", [[0, 0, 0, 0, 0, 0], [0, 0.3, 0.6, 0.8, 0.9, 1.0], [0, 0.4, 0.3, 0.4, 0.3, 0.4]])
def test_several_judges_that_do_not_fall_sound_no_alarm(other):
    for seed in range(20):
        found = assess(run([0, 0.5, 1.0, 0.97, 0.95, 0.97], other=other, third=[0, 1, 1, 1, 1, 1], seed=seed))
        assert not found.alarm


def test_a_judge_to_whom_all_pictures_of_the_base_are_alike_counts_like_the_others():
    """It was 0 for every picture of the base model, and is 1 for a half of them later; as one that has no unit it silenced all others."""
    seen = run([0, 1.0, 0.6, 0.2])
    half, none = torch.arange(64) % 2.0, torch.zeros(64)
    told = lambda columns: [
        Seen(s.update, s.trained, {**s.held_out, "rare": c}) for s, c in zip(seen, columns, strict=True)
    ]
    found = told([none, none, half, half])
    assert scores(found).abs().max() < 10
    assert assess(found).best == 10 and "since update 10" in assess(found).alarm and "judge fell" in assess(found).alarm
    assert scores(told([none + 3.7] * 4))[1].abs().max() < 1e-6  # one that never says anything
    assert assess(told([none + 3.7] * 4)).alarm == assess(seen).alarm


@pytest.mark.parametrize(("lost", "is_heard"), [(0.12, False), (0.18, True)])
def test_a_fall_is_heard_from_a_share_of_the_gain(lost, is_heard):
    held = [0, 0.5, 1.0, 1.0 - lost, 1.0 - lost]
    assert bool(assess(run(held, noise=1e-3)).alarm) == is_heard


def test_without_a_judge_the_trained_reward_chooses_and_nothing_is_alarmed():
    seen = [Seen(s.update, s.trained) for s in run([0, 1, 0, 0], [0.0, 3.0, 1.0, 2.0])]
    assert assess(seen) == assess(seen[:3]).__class__(10, "", 0)
