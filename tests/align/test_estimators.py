"""The recipe that measures every estimator's bias and noise: its two parts of noise, which a batch does and does not divide."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tropism.align.alignprop import alignprop


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("estimators", Path(__file__).parents[2] / "recipes" / "estimators.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("b", [4, 64])
@pytest.mark.parametrize("update", [0.0, 0.5])
def test_noise_of_a_sample_and_of_an_update(recipe, monkeypatch, b, update):
    """Whatever the batch: 3 and `update` times the squared signal, as they were put in."""
    monkeypatch.setattr(recipe, "B", b)
    g, d = torch.Generator().manual_seed(0), 5
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    signal = torch.tensor([2.0, 0, 0, 1, -1], dtype=torch.float64)
    part = lambda share: (share * signal.square().sum() / d) ** 0.5
    halves = signal + part(update) * normal(20_000, 1, d) + part(3.0) * (b / 2) ** -0.5 * normal(20_000, 2, d)
    of_sample, of_update = recipe.noises(halves)
    assert of_sample == pytest.approx(3.0, rel=0.03)
    assert of_update == pytest.approx(update, rel=0.03, abs=0.02)


def test_halves_of_an_update_have_samples_of_their_own_and_draw_once_together(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "UPDATES", 3)
    monkeypatch.setattr(recipe, "B", 8)
    halves, rows, rewards = recipe.estimates(alignprop, {"truncation": "suffix-uniform"})
    assert halves.shape == (3, 2, recipe.STEPS) and rewards == 1
    assert (halves[:, 0] != halves[:, 1]).any(1).all()
    drawn = (halves != 0).sum(2)
    assert torch.equal(drawn[:, 0], drawn[:, 1]) and len(set(drawn[:, 0].tolist())) > 1
    assert rows == recipe.STEPS + 3 * drawn[:, 0].double().mean().item()  # forward, recomputed, and a backward as two
