import math
from dataclasses import replace

import pytest
import torch

from tropism.core import Batch, UserError, scored_parts
from tropism.rewards.combine import hinge, minimum, product, target, weighted
from tropism.rewards.load import load_reward, load_rewards
from tropism.rewards.named import Named

BATCH = Batch(["a", "b"])


def part(name, differentiable=True, value=lambda x: x.mean((1, 2, 3)), calls=None):
    def function(samples, batch):
        if calls is not None:
            calls.append(name)
        return value(samples)

    return Named(name, differentiable, function)


def test_the_sum_and_its_unweighted_parts(images):
    x = images[:2]
    a, b = part("a"), part("b", value=lambda x: x.square().sum((1, 2, 3)))
    both = weighted({a: 1, b: -0.25})
    parts = both.parts(x, BATCH)
    assert list(parts) == ["a", "b"]
    torch.testing.assert_close(parts["b"], x.square().sum((1, 2, 3)))
    torch.testing.assert_close(both(x, BATCH), x.mean((1, 2, 3)) - 0.25 * x.square().sum((1, 2, 3)))
    torch.testing.assert_close(both.total(parts, BATCH), both(x, BATCH))


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ((1, 0.3), "a + 0.3 b"),
        ((1, -1), "a - b"),
        ((-0.5, 2), "-0.5 a + 2 b"),
        ((-1, 1), "-a + b"),
    ],
)
def test_names(weights, name):
    assert weighted(zip((part("a"), part("b")), weights, strict=True)).name == name


def test_each_part_is_computed_once(images):
    calls = []
    weighted([(part("a", calls=calls), 1), (part("b", calls=calls), 2)])(images[:2], BATCH)
    assert calls == ["a", "b"]


def test_a_combination_inside_is_taken_apart():
    inner = weighted([(part("a"), 2), (part("b"), 1)])
    assert weighted([(inner, 0.5), (part("c"), 1)]).name == "a + 0.5 b + c"


def test_one_part_without_gradient_takes_it_from_all_and_is_named(images):
    both = weighted([(part("smooth"), 1), (part("counted", False, lambda x: x.detach().mean((1, 2, 3))), 1)])
    assert not both.differentiable
    assert both.blocking == ("counted",)
    assert not both(images[:2].requires_grad_(), BATCH).requires_grad
    assert weighted([(part("smooth"), 1)])(images[:2].requires_grad_(), BATCH).requires_grad


def test_parts_make_no_graph_where_none_is_wanted(images):
    both, x = weighted([(part("a"), 1), (part("b"), 2)]), images[:2].requires_grad_()
    assert all(v.requires_grad for v in both.parts(x, BATCH).values())
    with torch.no_grad():
        assert not any(v.requires_grad for v in both.parts(x, BATCH).values())


def test_the_gradient_is_the_weighted_sum_of_the_parts_own(images):
    a, b = part("a"), part("b", value=lambda x: x.square().sum((1, 2, 3)))
    x = images[:2].requires_grad_()
    slope = lambda reward: torch.autograd.grad(reward(x, BATCH).sum(), x)[0]
    inner = weighted([(a, -3), (b, 0.5)])
    torch.testing.assert_close(slope(weighted([(inner, -2)])), 6 * slope(a) - slope(b))


def test_parts_of_different_precision(images):
    mixed = weighted([(part("a"), 1), (part("b", value=lambda x: x.float().mean((1, 2, 3))), 1)])
    assert mixed(images[:2], BATCH).dtype == torch.float64


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number(weight):
    with pytest.raises(UserError, match="finite"):
        weighted([(part("a"), weight)])


def test_refuses_repetition_and_nothing():
    with pytest.raises(UserError, match="'a' is given 2 times"):
        weighted([(part("a"), 1), (part("a"), 2)])
    with pytest.raises(UserError, match="no rewards"):
        weighted([])


def test_a_part_of_wrong_shape_is_named(images):
    with pytest.raises(UserError, match="'wide'"):
        weighted([(part("wide", value=lambda x: x.mean((2, 3))), 1)])(images[:2], BATCH)


A, B_ = part("a"), part("b", value=lambda x: x.square().mean((1, 2, 3)))


def test_joins_in_closed_form(images):
    x = images[:2]
    a, b = A(x, BATCH), B_(x, BATCH)
    for reward, expected in [
        (product([(A, 1), (B_, 2)]), a * b**2),
        (minimum([(A, 1), (B_, 3)]), torch.minimum(a, 3 * b)),
        (hinge(A, 0.5), torch.where(a < 0.5, a, torch.full_like(a, 0.5))),
        (target(A, 0.4), -(a - 0.4).abs()),
        (weighted([(hinge(A, 0.5), 2), (B_, -1)]), 2 * a.clamp_max(0.5) - b),
        (weighted([(product([(A, 1), (hinge(B_, 0.2), 1)]), 3)]), 3 * a * b.clamp_max(0.2)),
    ]:
        torch.testing.assert_close(reward(x, BATCH), expected)
        torch.testing.assert_close(reward.total(reward.parts(x, BATCH), BATCH), expected)


def test_what_is_inside_is_reported_and_computed_once(images):
    calls = []
    inner = part("a", calls=calls)
    reward = weighted([(hinge(inner, 0.5), 2), (B_, -1)])
    parts = reward.parts(images[:2], BATCH)
    assert list(parts) == ["a", "hinge(a, 0.5)", "b"]
    assert calls == ["a"]
    torch.testing.assert_close(parts["hinge(a, 0.5)"], parts["a"].clamp_max(0.5))


def test_beyond_a_hinge_there_is_no_gradient(images):
    x = images[:2].requires_grad_()
    low, high = A(x, BATCH).sort().values.tolist()
    slopes = torch.autograd.grad(hinge(A, (low + high) / 2)(x, BATCH).sum(), x)[0].flatten(1).abs().sum(1)
    assert sorted(slopes.tolist())[0] == 0 < sorted(slopes.tolist())[1]


def test_only_the_least_has_a_gradient(images):
    x = images[:1].requires_grad_()
    least = minimum([(A, 1), (B_, 1)])(x, Batch(["a"]))  # x in [0, 1], so the square is smaller
    torch.testing.assert_close(torch.autograd.grad(least, x)[0], torch.autograd.grad(B_(x, Batch(["a"])), x)[0])


def test_a_sample_without_a_score_has_no_product_whatever_the_order(images):
    lost = part("lost", value=lambda x: torch.tensor([2.0, float("nan"), float("-inf")]))
    whole = part("whole", value=lambda x: torch.tensor([3.0, 3.0, 3.0]))
    for terms in ([(lost, 2), (whole, 1)], [(whole, 1), (lost, 2)]):
        found = product(terms)(images[:1].expand(3, -1, -1, -1), Batch(["a", "b", "c"]))
        assert found[0] == 12 and found[1:].isnan().all()


def test_a_product_needs_positive_rewards(images):
    with pytest.raises(UserError, match="positive"):
        product([(part("low", value=lambda x: -x.mean((1, 2, 3))), 1), (A, 1)])(images[:2], BATCH)


def test_a_sum_inside_a_product_stays_a_sum(images):
    x = images[:2]
    reward = weighted([(product([(weighted([(A, 1), (B_, 2)]), 1), (A, 1)]), 1), (B_, 1)])
    a, b = A(x, BATCH), B_(x, BATCH)
    torch.testing.assert_close(reward(x, BATCH), (a + 2 * b) * a + b)


@pytest.mark.parametrize("named", ["aa", ["a", "c"]])
def test_a_prompt_that_is_meant_for_no_reward_is_an_error(images, named):
    """In Python too, where nothing looked before: such a sample scored 0."""
    batch = Batch(["1", "2"], meta=[{}, {"reward": named}])
    with pytest.raises(UserError, match=r"'2' is meant for the reward '(aa|c)', but the rewards are a, b"):
        weighted([(A, 1), (B_, 1)])(images[:2], batch)


def test_names_are_those_of_the_outer_sum(images):
    x, inner = images[:2], product([(weighted([(A, 1), (B_, 2)]), 1), (A, 1)])
    batch = Batch(["1", "2"], meta=[{"reward": inner.name}, {"reward": "b"}])
    a, b = A(x, BATCH), B_(x, BATCH)
    torch.testing.assert_close(
        weighted([(inner, 1), (B_, 3)])(x, batch), torch.stack([(a[0] + 2 * b[0]) * a[0], 3 * b[1]])
    )


def test_scales_of_a_sum(images):
    x = images[:2]
    reward = replace(weighted([(A, 2), (B_, 1)]), scales={"a": (0.3, 0.1)})
    torch.testing.assert_close(reward(x, BATCH), 2 * (A(x, BATCH) - 0.3) / 0.1 + B_(x, BATCH))


def test_a_prompt_is_scored_by_the_rewards_it_is_meant_for(images):
    calls, x = [], images.clone().requires_grad_()
    counted = part("b", value=lambda x: calls.append(len(x)) or x.square().mean((1, 2, 3)))
    batch = Batch(["1", "2", "3", "4"], meta=[{"reward": "a"}, {"reward": ["a", "b"]}, {}, {"reward": ["b"]}])
    reward = weighted([(A, 2), (counted, -1)])
    a, b = A(x, batch), B_(x, batch)
    value, parts = scored_parts(reward, x, batch)
    torch.testing.assert_close(value, torch.stack([2 * a[0], 2 * a[1] - b[1], 2 * a[2] - b[2], -b[3]]))
    assert calls == [3]  # the first picture is not shown to b
    assert parts["a"].isnan().tolist() == [False, False, False, True]
    assert parts["b"].isnan().tolist() == [True, False, False, False]
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope[3], -torch.autograd.grad(B_(x, batch)[3], x)[0][3])
    alone = torch.cat([reward(x[[i]], batch[[i]]) for i in range(4)])
    torch.testing.assert_close(alone, value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hinge(jpeg,-1.2)", "hinge(jpeg, -1.2)"),
        ("target( jpeg , 0.5 )", "target(jpeg, 0.5)"),
        ("product(shapes-count,jpeg=0.3)", "product(shapes-count, jpeg=0.3)"),
        ("minimum(hinge(jpeg,-1),shapes-count=2)=0.5", "0.5 minimum(hinge(jpeg, -1), shapes-count=2)"),
    ],
)
def test_spelled_rewards(text, name):
    reward = load_rewards([text])
    assert reward.name == name
    bare = text.rpartition(")")[0] + ")"
    assert load_reward(load_reward(bare).name).name == load_reward(bare).name  # a name can be given as a reward again


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hinge(jpeg)", "not a reward and a number"),
        ("hinge(jpeg,high)", "not a reward and a number"),
        ("hinge(jpeg,inf)", "finite"),
        ("product(jpeg)", "at least two"),
        ("minimum(jpeg,,jpeg)", "missing between the commas"),
        ("minimum(jpeg,jpeg)", "given 2 times"),
        ("minimum(jpg,shapes-count)", "Did you mean jpeg"),
    ],
)
def test_spelled_badly(text, says):
    with pytest.raises(UserError, match=says):
        load_rewards([text])
