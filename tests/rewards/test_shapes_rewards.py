"""The bundled reward networks on freshly drawn scenes that no training saw: each ranks what it is meant to rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tropism.core import Batch
from tropism.rewards.load import load_reward
from tropism.worlds import shapes, taste

SEED = 20_000  # of the renders; training uses small ones


@pytest.fixture(scope="module")
def scenes():
    pool = shapes.scenes(held_out=True)
    return [pool[i] for i in np.random.default_rng(SEED).permutation(len(pool))[:100]]


@pytest.fixture(scope="module")
def pictures(scenes):
    return shapes.pictures(scenes, SEED)


def batch(scenes):
    return Batch([s.prompt for s in scenes])


def other(choices, not_this, rng):
    return rng.choice([c for c in choices if c != not_this]).item()


def share_of_wins(reward, pictures, own, wrong):
    with torch.no_grad():
        return (reward(pictures, batch(own)) > reward(pictures, batch(wrong))).float().mean().item()


def test_a_wrong_count_scores_lower(scenes, pictures):
    rng = np.random.default_rng(0)
    wrong = [replace(s, count=other(range(1, 6), s.count, rng)) for s in scenes]
    assert share_of_wins(load_reward("shapes-count"), pictures, scenes, wrong) >= 0.95


def test_a_neighbouring_count_scores_lower(scenes, pictures):
    """One object too many or too few in the prompt: the smallest mistake there is."""
    wrong = [replace(s, count=s.count - 1 if s.count > 1 else 2) for s in scenes]
    assert share_of_wins(load_reward("shapes-count"), pictures, scenes, wrong) >= 0.95


def test_a_wrong_colour_is_less_aligned(scenes, pictures):
    rng = np.random.default_rng(1)
    wrong = [replace(s, colour=other(shapes.COLOURS, s.colour, rng)) for s in scenes]
    assert share_of_wins(load_reward("shapes-alignment"), pictures, scenes, wrong) >= 0.95


def test_the_proxy_ranks_ordinary_pictures_as_the_hidden_taste():
    pool = shapes.scenes(held_out=True)
    chosen = [pool[i] for i in np.random.default_rng(SEED + 1).integers(len(pool), size=200)]
    drawn = shapes.pictures(chosen, SEED + 1)
    with torch.no_grad():
        proxy = load_reward("shapes-aesthetic")(drawn, batch(chosen))
    assert spearmanr(proxy, taste.gold(drawn)).statistic > 0.9


@pytest.mark.parametrize("name", ["shapes-count", "shapes-alignment", "shapes-aesthetic"])
def test_every_picture_has_a_finite_gradient_that_is_not_zero(name, scenes, pictures):
    """And it is the slope of the reward along itself, so that no stage of the network is cut off."""
    reward, few = load_reward(name), batch(scenes[:16])
    x = pictures[:16].double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, few).sum(), x)
    size = gradient.flatten(1).norm(dim=1)
    assert gradient.isfinite().all()
    assert (size > 0).all()
    h = 1e-5
    along = h * gradient / size[:, None, None, None]
    with torch.no_grad():
        slope = (reward(x + along, few) - reward(x - along, few)) / (2 * h)
    torch.testing.assert_close(slope, size, rtol=1e-3, atol=1e-9)
