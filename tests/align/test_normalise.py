"""Rewards on scales of their own and weights on their way: by hand, resumable, and refused where there is nothing to scale."""

import json
from functools import partial

import pytest
import torch
from toy import ToyModel, batch

from tropism.align.alignprop import alignprop
from tropism.align.normalise import DECAY, Scaled
from tropism.align.rollout import sample
from tropism.core import Draw, UserError
from tropism.rewards.combine import weighted
from tropism.rewards.named import Named

SMALL = Named("small", True, lambda images, b: 1e-3 * torch.tanh(images[:, 0].mean((1, 2))))
LARGE = Named("large", True, lambda images, b: 50 + 40 * images[:, 1].mean((1, 2)))
HOW = {"steps": 6, "guidance": 2.0}


def scaled(model, reward=None, updates=5, **more):
    reward = reward or weighted([(SMALL, 1.0), (LARGE, -0.5)])
    bound = lambda r: partial(alignprop, model, r, truncation="full", **HOW)
    return Scaled(bound, model, reward, updates, **HOW, **more)


def once(step, model, update=0, state=None):
    run = step(batch(6), state=state or {}, update=update, seed=4, micro_batch=None)
    loss, info = next(run)
    for p in model.trainable().values():
        p.grad = None
    loss.backward()
    with pytest.raises(StopIteration) as end:
        next(run)
    return torch.cat([p.grad.flatten() for p in model.trainable().values()]), info, end.value.value


def base_samples(model):
    with model.base():
        return sample(model, batch(6), Draw(4, 0, batch(6).index), **HOW)


def test_the_scales_are_the_base_models():
    model = ToyModel()
    images = base_samples(model)
    gradient, info, state = once(scaled(model, kind="base"), model)
    spreads = {r.name: r(images, batch(6)).std(correction=0) for r in (SMALL, LARGE)}
    means = {r.name: r(images, batch(6)).mean() for r in (SMALL, LARGE)}
    for name, (mean, spread) in state["scales"].items():
        assert mean == pytest.approx(means[name].item())
        assert spread == pytest.approx(spreads[name].item())
        assert info.scalars[f"scale/{name}"] == spread
    by_hand = weighted([(SMALL, 1 / spreads["small"].item()), (LARGE, -0.5 / spreads["large"].item())])
    plain, *_ = once(scaled(model, by_hand), model)
    torch.testing.assert_close(gradient, plain)
    expected = (info.columns["small"] - means["small"]) / spreads["small"]
    expected = expected - 0.5 * (info.columns["large"] - means["large"]) / spreads["large"]
    torch.testing.assert_close(info.columns["reward_normalised"], expected)
    torch.testing.assert_close(info.columns["reward"], info.columns["small"] - 0.5 * info.columns["large"])


def test_later_updates_keep_them_or_follow_the_samples():
    model = ToyModel()
    _, info, first = once(scaled(model, kind="base"), model)
    _, _, kept = once(scaled(model, kind="base"), model, 1, first)
    assert kept["scales"] == first["scales"]
    _, info, running = once(scaled(model, kind="running"), model)
    _, info, later = once(scaled(model, kind="running"), model, 1, running)
    for name in ("small", "large"):
        m, s = info.columns[name].mean().item(), info.columns[name].std(correction=0).item()
        mean, spread = running["scales"][name]
        assert later["scales"][name][0] == pytest.approx(DECAY * mean + (1 - DECAY) * m)
        assert later["scales"][name][1] == pytest.approx((DECAY * spread**2 + (1 - DECAY) * s**2) ** 0.5)
        assert later["scales"][name] != running["scales"][name]
    assert json.loads(json.dumps(later)) == later


def test_a_weight_goes_to_its_end():
    model = ToyModel()
    for update, weight in ((0, -0.5), (2, 0.25), (4, 1.0)):
        found, *_ = once(scaled(model, ramps={"large": 1.0}), model, update)
        fixed, *_ = once(scaled(model, weighted([(SMALL, 1.0), (LARGE, weight)])), model, update)
        torch.testing.assert_close(found, fixed)


def test_a_weight_follows_the_budget_where_that_is_spent_first():
    """`fit` tells the share that is done; an update's own share counts where it is larger."""
    model = ToyModel()
    for update, done, weight in ((0, 0.5, 0.25), (1, 1.0, 1.0), (4, 0.1, 1.0)):
        step = scaled(model, ramps={"large": 1.0})
        step.pace(done)
        found, *_ = once(step, model, update)
        fixed, *_ = once(scaled(model, weighted([(SMALL, 1.0), (LARGE, weight)])), model, update)
        torch.testing.assert_close(found, fixed)


def test_without_either_the_algorithm_is_itself():
    model = ToyModel()
    run = alignprop(model, weighted([(SMALL, 1.0), (LARGE, -0.5)]), batch(6), state={}, update=0, seed=4,
                    truncation="full", **HOW)  # fmt: skip
    assert torch.equal(next(run)[0], next(scaled(model)(batch(6), state={}, update=0, seed=4, micro_batch=None))[0])


FLAT = Named("flat", True, lambda images, b: 0 * images.sum((1, 2, 3)) + 3)


@pytest.mark.parametrize(
    ("reward", "more", "says"),
    [
        (None, {"kind": "std"}, "no normalisation 'std'"),
        (SMALL, {"kind": "base"}, "for a sum of rewards"),
        (SMALL, {"ramps": {"small": 1.0}}, "for a sum of rewards"),
        (None, {"ramps": {"tall": 1.0}}, "'tall', which is none of the rewards small, large"),
        (weighted([(SMALL, 1), (FLAT, 1)]), {"kind": "base"}, "'flat' says .* no scale of its own"),
    ],
)
def test_what_cannot_be_scaled(reward, more, says):
    model = ToyModel()
    with pytest.raises(UserError, match=says):
        once(scaled(model, reward, **more), model)
