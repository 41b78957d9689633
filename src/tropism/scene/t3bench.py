"""T3Bench's quality of a scene: the best region of a sphere of views, by any scorer of pictures and text.

162 places on a sphere around the object, from each at five focal lengths; a place's score is the best of its five pictures, scores
are smoothed three times over neighbouring places, and the best place counts. So it rewards the best side and not the worst: a Janus
goes unseen. If the scorer was a reward of the training, the number is circular.
Source: T3Bench, arXiv 2310.02977, section 3.1, as its released code has it; there the scorer is ImageReward, and pictures are 512
pixels of a mesh in flat light on black, here of the field itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch, Reward, UserError, scored
from tropism.scene.mesh import Mesh
from tropism.space.cameras import cameras
from tropism.space.volume import Field, render

FIELDS_OF_VIEW = (60.0, 45.0, 36.0, 30.0, 24.0)
DISTANCE, ROUNDS = 2.2, 3
SLOPE, OFFSET = 20.0, 50.0
"""Of the published number, 20 s + 50 of a score s: made for ImageReward's, which lie in about [-2.3, 2]."""


@dataclass(frozen=True)
class Quality:
    """value: 20 s + 50 of the best place's smoothed score s. places: the smoothed scores, (162,). circular: the scorer was trained on."""

    value: float
    places: Tensor
    circular: bool


def sphere(subdivisions: int = 2) -> tuple[Tensor, list[list[int]]]:
    """Places (162, 3) on the unit sphere, of an icosahedron divided twice, and the neighbours of each."""
    try:
        trimesh: Any = importlib.import_module("trimesh")
    except ImportError as error:
        raise UserError(
            'T3Bench\'s places need trimesh, which is not installed: pip install "tropism[scene]".'
        ) from error
    made = trimesh.creation.icosphere(subdivisions=subdivisions)
    return torch.tensor(made.vertices, dtype=torch.float32), [[int(n) for n in of] for of in made.vertex_neighbors]


def smoothed(scores: Tensor, neighbours: Sequence[Sequence[int]], rounds: int = ROUNDS) -> Tensor:
    """Scores (V,), each the mean of its own and its neighbours', so many times."""
    for _ in range(rounds):
        scores = torch.stack([scores[[v, *of]].mean() for v, of in enumerate(neighbours)])
    return scores


def normalised(field: Field, mesh: Mesh) -> Field:
    """The field about the mean of the mesh's vertices, at a size at which the furthest coordinate is 1."""
    middle = mesh.vertices.mean(0)
    reach = (mesh.vertices - middle).abs().max()

    def of(points: Tensor) -> tuple[Tensor, Tensor]:
        there = points * reach.to(points) + middle.to(points)
        density, colour = field(there.clamp(-1, 1))
        return density * reach.to(density) * (there.abs().amax(1) <= 1), colour  # as opaque as it was before

    return of


@torch.no_grad()
def quality(
    field: Field | None,
    mesh: Mesh | None,
    prompt: str,
    scorer: Reward,
    *,
    size: int = 512,
    samples: int = 128,
    trained_on: Sequence[str] = (),
    device: str = "cpu",
) -> Quality:
    """The quality of a field and its mesh; None for both is a scene that was not made, whose pictures are black.

    size: pixels of a side. trained_on: names of the rewards that the scene was trained on. 810 pictures; raises UserError as `scored` does,
    and where a picture has no score.
    """
    places, neighbours = sphere()
    azimuth = torch.atan2(places[:, 1], places[:, 0]).rad2deg() % 360
    elevation = places[:, 2].clamp(-1, 1).asin().rad2deg()
    shown = None if field is None or mesh is None else normalised(field, mesh)
    best = torch.full((len(places),), -torch.inf)
    for fov in FIELDS_OF_VIEW:
        around = cameras(azimuth, elevation, DISTANCE, fov).to(torch.device(device))
        for v in range(len(places)):
            at = around[[v]]
            picture = (
                torch.zeros(1, 3, size, size, device=device)
                if shown is None
                else render(shown, at, size, samples=samples).over(0.0).clamp(0, 1)
            )
            score = scored(scorer, picture, Batch([prompt], cameras=at))[0].float().cpu()
            if not bool(score.isfinite()):
                raise UserError(
                    f"The scorer {getattr(scorer, 'name', scorer)} gave {float(score)} for a picture from {float(azimuth[v]):.0f} degrees "
                    "around. T3Bench's number needs a score of every place; take another scorer."
                )
            best[v] = torch.maximum(best[v], score)
    found = smoothed(best, neighbours)
    name = str(getattr(scorer, "name", ""))
    return Quality(SLOPE * float(found.max()) + OFFSET, found, name in trained_on)
