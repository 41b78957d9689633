import math

import pytest
import torch

from tropism.core import Batch, UserError
from tropism.rewards.combine import weighted
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
    torch.testing.assert_close(both.total(parts), both(x, BATCH))


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
