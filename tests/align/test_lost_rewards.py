"""DDPO with samples whose reward is not finite: they take no part, are counted, and too many of them end the run."""

import json

import pytest
import torch
from toy import ToyModel, batch, smooth_reward

from tropism.align.advantage import ADVANTAGES, judged
from tropism.align.ddpo import ddpo
from tropism.core import UserError

N, SEED = 4, 4


def steps_of(reward, b=None, advantage="batch"):
    model, found = ToyModel(eta=1.0), []
    run = ddpo(model, reward, b or batch(8), state={}, update=3, seed=SEED, steps=N, guidance=2.0, advantage=advantage)
    while True:
        try:
            loss, info = next(run)
        except StopIteration as end:
            return found, end.value
        for p in model.trainable().values():
            p.grad = None
        loss.backward()
        found.append((torch.cat([p.grad.flatten() for p in model.trainable().values()]), info))


def losing(lost, value=float("nan")):
    """The smooth reward, but for samples of these places in the batch."""

    def partly(images, b):
        found = smooth_reward(images, b).clone()
        for i, n in enumerate(b.index):
            if n in lost:
                found[i] = value
        return found

    return partly


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
def test_those_without_a_score_take_no_part(advantage, value):
    prompts, rewards = list("aabbaabb"), torch.arange(8, dtype=torch.float64).square()
    lost = torch.tensor([False, True, False, False, False, False, True, True])
    found, past = judged(advantage, rewards.masked_fill(lost, value), prompts, {"a": [1.0]})
    own = [p for p, out in zip(prompts, lost.tolist(), strict=True) if not out]
    expected, memory = judged(advantage, rewards[~lost], own, {"a": [1.0]})
    assert torch.equal(found[~lost], expected) and (found[lost] == 0).all()
    assert past == memory and len(past["a"]) == 4 and len(past["b"]) == 2
    assert judged(advantage, torch.full((8,), value, dtype=torch.float64), prompts, {})[0].tolist() == [0] * 8


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("value", [0.1, -1e6 / 3, 0.0])
def test_equal_rewards_teach_exactly_nothing(advantage, value):
    """0.1 eight times has a mean that is not 0.1: what is left of it, divided by epsilon, would pass for a gradient."""
    rewards = torch.full((7,), value, dtype=torch.float64)
    past = {}
    for _ in range(3):
        found, past = judged(advantage, rewards, list("aabbccc"), past)
        assert found.tolist() == [0] * 7
    different = rewards + 1e-3 * torch.arange(7, dtype=torch.float64)
    assert judged(advantage, different, ["a"] * 7, {})[0].std() > 0.5
    assert steps_of(lambda images, b: torch.full((len(b),), value))[0][0][0].norm() == 0


def test_the_gradient_is_finite_and_the_lost_are_counted():
    found, state = steps_of(losing({1, 4, 6}))
    assert all(g.isfinite().all() and g.norm() > 0 for g, _ in found)
    for _, info in found:
        assert info.scalars["reward/nonfinite"] == 3
        assert info.samples == 4, "the sum still runs over all samples, of which three add nothing"
        assert all(len(v) == 5 and v.isfinite().all() for v in info.columns.values())
    assert sum(map(len, state["rewards"].values())) == 5
    assert "NaN" not in json.dumps(state)
    whole, _ = steps_of(smooth_reward)
    assert whole[0][1].scalars["reward/nonfinite"] == 0 and len(whole[0][1].columns["reward"]) == 8


def test_up_to_half_and_no_more():
    steps_of(losing({0, 1, 2, 3}))
    with pytest.raises(UserError, match=r"Update 3: reward 'partly' is not finite for 5 of 8 samples.*above 50%"):
        steps_of(losing({0, 1, 2, 3, 4}))
