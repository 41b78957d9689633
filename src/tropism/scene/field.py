"""Trainable fields on a dense grid: a density for the coarse stage, a signed distance for the fine one, each with a colour.

A grid is (4, R, R, R): node (i, j, k) lies at (x_i, y_j, z_k) of R equally spaced places from -1 to 1, between nodes all is trilinear.
Channel 0 makes the density, 1 to 3 are logits of the colour, which is the same from every side: a colour that changed with the view could
hide a second face. Both are fields in the sense of space.volume.
Source: direct voxel grids as in Plenoxels, arXiv 2112.05131; the blob bias of Magic3D, arXiv 2211.10440; VolSDF, arXiv 2106.12052.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tropism.core import UserError

BLOB, RADIUS = 10.0, 0.5
"""The bias of a density before its softplus: BLOB in the origin, 0 at RADIUS from it and falling on. A scene begins as a soft ball."""


class VoxelField(nn.Module):
    """Density softplus(logit + 10 (1 - |p| / 0.5)), colour sigmoid(logits); begins as a grey ball.

    resolution: nodes along a side, at least 2 (UserError). Its state_dict is {"grid": (4, R, R, R)}; see `of_state`.
    """

    def __init__(self, resolution: int = 48):
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(4, *(checked(resolution),) * 3))

    @property
    def resolution(self) -> int:
        return self.grid.shape[1]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Densities (N,) and colours (N, 3) in [0, 1] at points (N, 3) in [-1, 1]; at least float32."""
        values = sampled(self.grid, points)
        return F.softplus(values[:, 0] + blob(points)), values[:, 1:].sigmoid()

    def grown(self, resolution: int) -> VoxelField:
        """The same field on another grid, read off trilinearly: 24 -> 48 -> 96."""
        return of_state({"grid": resized(self.grid.detach(), resolution)})  # type: ignore[return-value]

    def smoothness(self) -> Tensor:
        """The total variation of the four logits, (), at least 0: see `variation`."""
        return variation(self.grid)


class SurfaceField(nn.Module):
    """The density s Psi(-d s) of a signed distance d, negative inside: Psi is the distribution function of the Laplace law of scale 1.

    s, `sharpness`, is trained too: the density inside is s, and falls to nothing over a shell of about 1 / s. Begins as a ball of radius
    0.5, a shell of one cell; `of` makes it from a VoxelField. state_dict: {"grid": (4, R, R, R), "log_sharpness": ()}.
    Source: Volume Rendering of Neural Implicit Surfaces, arXiv 2106.12052, eq. 2 and 3, with alpha = 1 / beta = s.
    """

    def __init__(self, resolution: int = 96):
        super().__init__()
        side = checked(resolution)
        grid = torch.zeros(4, side, side, side)
        grid[0] = nodes(side).norm(dim=1).view(side, side, side) - RADIUS
        self.grid = nn.Parameter(grid)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(1 / spacing(side))))

    @classmethod
    def of(cls, field: VoxelField, level: float) -> Self:
        """The surface at which the density of a VoxelField is `level` (scene.threshold.level_of), with its colours, on its grid.

        Raises UserError if the density is nowhere, or everywhere, above it.
        """
        side, made = field.resolution, cls(field.resolution)
        with torch.no_grad():
            logit = field.grid[0].double() + blob(nodes(side).to(field.grid.device)).view(side, side, side)
            above = logit - _softplus_inverse(level)
            made.to(field.grid)
            made.grid[0] = signed_distance(above.cpu()).to(made.grid)
            made.grid[1:] = field.grid[1:]
        return made

    @property
    def resolution(self) -> int:
        return self.grid.shape[1]

    @property
    def sharpness(self) -> Tensor:
        return self.log_sharpness.exp()

    def distance(self, points: Tensor) -> Tensor:
        """(N,) at points (N, 3): the distance to the surface, in units of the cube, below 0 inside."""
        return sampled(self.grid[:1], points)[:, 0]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Densities (N,) and colours (N, 3) in [0, 1] at points (N, 3) in [-1, 1]; at least float32."""
        values = sampled(self.grid, points)
        u = values[:, 0] * self.sharpness
        # Each half is clamped to its own side: the other side's exponential would overflow, and its gradient be 0 times infinity.
        outside = u > 0
        psi = torch.where(outside, 0.5 * (-u.clamp_min(0)).exp(), 1 - 0.5 * u.clamp_max(0).exp())
        return self.sharpness * psi, values[:, 1:].sigmoid()

    def grown(self, resolution: int) -> SurfaceField:
        """The same field on another grid, read off trilinearly; the sharpness stays."""
        state = {"grid": resized(self.grid.detach(), resolution), "log_sharpness": self.log_sharpness.detach()}
        return of_state(state)  # type: ignore[return-value]

    def smoothness(self) -> Tensor:
        """The total variation of the colours' logits, (); the distance's own slope is 1, see `eikonal`."""
        return variation(self.grid[1:])

    def eikonal(self) -> Tensor:
        """The mean of (|grad d| - 1)^2 over the grid, (): 0 for a true distance. Source: arXiv 2106.12052, section 3.3."""
        return (_slopes(self.grid[:1]).square().sum(-1).clamp_min(1e-12).sqrt() - 1).square().mean()


def of_state(state: Mapping[str, Tensor]) -> VoxelField | SurfaceField:
    """The field that a state_dict was taken from, of its own resolution, dtype and device. Raises UserError for another one's."""
    grid = state.get("grid")
    if grid is None or grid.ndim != 4 or len(grid) != 4 or len(set(grid.shape[1:])) != 1:
        raise UserError(
            f"This is no state of a field: it holds {sorted(state)}, grid {None if grid is None else tuple(grid.shape)}, and a field has "
            "a grid (4, R, R, R). Save field.state_dict()."
        )
    made = (SurfaceField if "log_sharpness" in state else VoxelField)(grid.shape[1]).to(grid)
    made.load_state_dict(state)
    return made


# ---------------------------------------------------------------------------------------------------- grids


def checked(resolution: int) -> int:
    """The resolution itself. Raises UserError below 2."""
    if resolution < 2:
        raise UserError(f"The resolution is {resolution}; a grid has at least 2 nodes along a side. Try 48.")
    return resolution


def spacing(resolution: int) -> float:
    """Between neighbouring nodes, in units of the cube [-1, 1]^3."""
    return 2 / (resolution - 1)


def nodes(resolution: int) -> Tensor:
    """(R^3, 3) float32: where a grid's nodes lie; .view(R, R, R, 3) is indexed as the grid is."""
    along = torch.linspace(-1, 1, resolution)
    return torch.cartesian_prod(along, along, along)


def blob(points: Tensor) -> Tensor:
    """(N,): the bias of the density's logit at points (N, 3). Source: Magic3D, arXiv 2211.10440, as threestudio sets it."""
    return BLOB * (1 - points.norm(dim=-1) / RADIUS)


def sampled(grid: Tensor, points: Tensor) -> Tensor:
    """(N, C): a grid (C, R, R, R) at points (N, 3), trilinear; outside of the cube as at its border. Of the wider dtype of both."""
    wide = torch.promote_types(torch.promote_types(grid.dtype, points.dtype), torch.float32)
    places = points.to(wide).flip(-1)[None, None, None]  # grid_sample wants the last axis's coordinate first
    found = F.grid_sample(grid.to(wide)[None], places, padding_mode="border", align_corners=True)
    return found[0, :, 0, 0].T


def resized(grid: Tensor, resolution: int) -> Tensor:
    """(C, S, S, S) of S = resolution: a grid (C, R, R, R) read off trilinearly at finer or coarser nodes. Raises UserError below 2."""
    return F.interpolate(grid[None], (checked(resolution),) * 3, mode="trilinear", align_corners=True)[0]


def _slopes(grid: Tensor) -> Tensor:
    """(C, R - 1, R - 1, R - 1, 3): forward differences along x, y and z, by unit length."""
    near = grid[:, :-1, :-1, :-1]
    steps = [grid[:, 1:, :-1, :-1] - near, grid[:, :-1, 1:, :-1] - near, grid[:, :-1, :-1, 1:] - near]
    return torch.stack(steps, -1) / spacing(grid.shape[1])


def variation(grid: Tensor) -> Tensor:
    """The mean length of the gradient, over nodes and channels, (): by unit length, so that it is of one size at every resolution.

    Source: total variation as in Plenoxels, arXiv 2112.05131, eq. 3.
    """
    return (_slopes(grid).square().sum(-1) + 1e-12).sqrt().mean()


def _softplus_inverse(density: float) -> float:
    return density + math.log(-math.expm1(-density))


def signed_distance(above: Tensor) -> Tensor:
    """(R, R, R) float64, below 0 inside: the distance of every node to the surface where `above` (R, R, R) is 0; inside it is positive.

    From the places where the surface crosses the grid's edges and its normals there: to the tangent plane of the nearest one.
    Raises UserError if there is no surface.
    """
    from scipy.spatial import KDTree

    values = above.double().numpy()
    crossings, normals = _crossings(values)
    if not len(crossings):
        raise UserError(
            f"There is no surface: the density is {'above' if values.max() > 0 else 'below'} the level everywhere. Take the level from "
            "scene.threshold.level_of, which says so if the scene is empty, on a grid that is fine enough for the object."
        )
    places = np.moveaxis(np.indices(values.shape), 0, -1).reshape(-1, 3).astype(np.float64)
    straight, nearest = KDTree(crossings).query(places)
    tangent = np.abs(((places - crossings[nearest]) * normals[nearest]).sum(1))
    # Of a plane the nearest crossing is at most sqrt(3) times as far as the plane itself; less is a normal that misleads.
    distance = np.maximum(tangent, straight / math.sqrt(3)).reshape(values.shape)
    return torch.from_numpy(np.where(values > 0, -distance, distance)) * spacing(len(values))


def _crossings(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where (P, 3) edges of the grid cross 0, in steps of the grid, and unit gradients (P, 3) there."""
    gradient = np.stack(list(np.gradient(values)), -1)
    places, slopes = [], []
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        last = values.shape[axis] - 1
        a, b = np.delete(values, last, axis), np.delete(values, 0, axis)
        edge = np.argwhere((a > 0) != (b > 0))
        first, second = tuple(edge.T), tuple((edge + step).T)
        share = (values[first] / (values[first] - values[second]))[:, None]
        places.append(edge + share * step)
        slopes.append((1 - share) * gradient[first] + share * gradient[second])
    slope = np.concatenate(slopes)
    return np.concatenate(places), slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)
