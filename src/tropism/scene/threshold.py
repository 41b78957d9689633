"""Where a scene of densities ends: the level of its surface, what of it floats, and that it is not empty.

A fixed level is a bug: one field's inside is another one's fog. So the level is the one whose solid has the outlines that are rendered.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tropism.core import UserError
from tropism.scene.field import nodes
from tropism.space.cameras import Cameras, cameras
from tropism.space.volume import Field, render

OPAQUE = 0.5
"""A pixel belongs to an outline if more than this share of its light is stopped."""
PIECE = 2**18
"""Points that a field is asked for at a time."""


def like(field: Field) -> Tensor:
    """A tensor (0,) of the dtype and device that a field has: its first parameter's, else float32 on the CPU."""
    first = next(field.parameters(), None) if isinstance(field, nn.Module) else None
    return torch.empty(0) if first is None else first.detach().flatten()[:0]


def outlooks() -> Cameras:
    """The six cameras whose outlines choose the level: all around, at eye level and from above in turn."""
    return cameras([0.0, 60.0, 120.0, 180.0, 240.0, 300.0], [0.0, 45.0] * 3)


@torch.no_grad()
def density_on(field: Field, resolution: int) -> Tensor:
    """(R, R, R) float32 on the CPU: the densities at a grid's nodes, indexed x, y, z. Raises UserError if one is not finite."""
    places = nodes(resolution).to(like(field))
    found = torch.cat([field(piece)[0].float().cpu() for piece in places.split(PIECE)])
    _finite(found)
    return found.view(resolution, resolution, resolution)


@torch.no_grad()
def level_of(field: Field, *, size: int = 64, samples: int = 96) -> float:
    """The density whose level set has the outlines of the volume: of the best intersection over union in six pictures of `size` pixels.

    samples: along a ray. Raises UserError if the scene is empty (no pixel is more than half opaque) or has densities that are not finite.
    """
    seen = [_outline(field, outlooks()[[i]].to(like(field).device), size, samples) for i in range(6)]
    peak, opacity = (torch.cat(part) for part in zip(*seen, strict=True))
    _finite(peak)
    opaque = opacity > OPAQUE
    if not bool(opaque.any()):
        raise UserError(
            f"The scene is empty: no view of it is more than {float(opacity.max()):.0%} opaque, and a surface needs {OPAQUE:.0%}. Its "
            "density collapsed in training; start again with another seed, a smaller learning rate or a weaker sparsity term."
        )
    # Whichever rays pass a level's solid are those with the highest peaks: all levels are tried at once.
    order = peak.argsort(descending=True)
    peak, hit = peak[order], opaque[order].long().cumsum(0)
    union = torch.arange(1, len(peak) + 1) + hit[-1] - hit
    below = torch.cat([peak[1:], peak.new_zeros(1)])
    overlap = torch.where(peak > below, hit / union, -1.0)
    best = int(overlap.argmax())
    return float((peak[best] + below[best]) / 2)


def _outline(field: Field, camera: Cameras, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Of the rays of one camera: the highest density on them, and their opacity, both (size^2,) on the CPU."""
    densities = []

    def told(points: Tensor) -> tuple[Tensor, Tensor]:
        density, colour = field(points)
        densities.append(density * (points.abs().amax(1) < 1 + 1e-5))  # rays that miss the cube are asked beside it
        return density, colour

    shown = render(told, camera, size, samples=samples)
    return densities[0].view(-1, samples).amax(1).float().cpu(), shown.opacity.flatten().float().cpu()


def _finite(density: Tensor) -> None:
    if not bool(density.isfinite().all()):
        raise UserError(
            f"{int((~density.isfinite()).sum())} of {density.numel()} densities are not finite: the training went astray. Go back to an "
            "earlier checkpoint, with a smaller learning rate."
        )


def largest_part(inside: Tensor, density: Tensor) -> Tensor:
    """(R, R, R) bool: the connected part of `inside` (R, R, R) bool with the most mass; neighbours share a face."""
    from scipy import ndimage

    part, count = ndimage.label(inside.numpy())  # type: ignore[misc]
    mass = np.bincount(part.ravel(), density.double().numpy().ravel(), count + 1)
    mass[0] = -1.0  # what is outside is no part
    return inside & torch.from_numpy(part == mass.argmax())


def floaters(density: Tensor, level: float, parts: int = 1) -> float:
    """In [0, 1]: of the mass above the level, the share outside of the `parts` largest. density: (R, R, R), as of `density_on`."""
    inside = density > level
    total, left = float(density[inside].double().sum()), inside.clone()
    for _ in range(parts):
        left &= ~largest_part(left, density)
    return float(density[left].double().sum()) / total if total else 0.0
