"""T3Bench's protocol: its places, its smoothing, and what the number does for a scene that is known."""

import math

import pytest
import torch

from tropism.core import UserError
from tropism.scene import t3bench
from tropism.scene.mesh import mesh_of
from tropism.worlds import solids


@pytest.fixture(scope="module")
def cube():
    field = solids.field(solids.parse("a small red cube"), 30.0)
    return field, mesh_of(field, 24)


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(t3bench, "FIELDS_OF_VIEW", (60.0, 24.0))


def test_the_places_are_an_icosahedron_divided_twice():
    places, neighbours = t3bench.sphere()
    assert places.shape == (162, 3) and torch.allclose(places.norm(dim=1), torch.ones(162))
    assert sorted({len(n) for n in neighbours}) == [5, 6] and sum(len(n) == 5 for n in neighbours) == 12
    assert all(v in neighbours[n] for v, of in enumerate(neighbours) for n in of)


def test_smoothing_spreads_one_place_and_keeps_what_is_even():
    _, neighbours = t3bench.sphere()
    assert torch.allclose(t3bench.smoothed(torch.full((162,), 0.3), neighbours), torch.full((162,), 0.3))
    one = torch.zeros(162)
    one[0] = 1.0
    once = t3bench.smoothed(one, neighbours, 1)
    assert once[0] == pytest.approx(1 / (1 + len(neighbours[0]))) and (once > 0).sum() == 1 + len(neighbours[0])
    assert t3bench.smoothed(one, neighbours).argmax() == 0


def test_the_best_side_counts(cube):
    """A scorer that likes black in the middle: best in front of the face, and a place behind has nothing of it."""
    black = lambda images, batch: -images[:, :, 3:5, 3:5].mean((1, 2, 3))
    black.name = "black"
    found = t3bench.quality(*cube, "a red cube", black, size=8, samples=24)
    places, _ = t3bench.sphere()
    assert places[int(found.places.argmax())][0] > 0.8 and not found.circular
    assert found.value == pytest.approx(20 * float(found.places.max()) + 50)
    assert t3bench.quality(*cube, "a red cube", black, size=8, samples=24, trained_on=["black"]).circular


def test_a_scene_is_brought_to_the_middle_and_to_full_size(cube):
    field, _ = cube
    aside = lambda points: field((points - torch.tensor([0.3, 0.0, -0.2])) * 1.5)
    density = t3bench.normalised(aside, mesh_of(aside, 48))(t3bench.sphere()[0] * 0.5)[0]
    assert (density > 0).float().mean() > 0.95
    edge = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.0, 0.8], [1.2, 0.0, 0.0]])
    assert (t3bench.normalised(aside, mesh_of(aside, 48))(edge)[0] > 0).tolist() == [True, True, False]


def test_what_was_not_made_is_black(cube):
    bright = lambda images, batch: images.mean((1, 2, 3))
    assert t3bench.quality(None, None, "a red cube", bright, size=8).value == 50
    with pytest.raises(UserError, match="needs a score of every place"):
        t3bench.quality(None, None, "a", lambda images, batch: images.new_full((1,), math.nan), size=8)
