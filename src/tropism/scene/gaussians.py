"""A scene of N Gaussians: what of them is trained, where they start, and the .ply file that viewers of Gaussians open.

A Gaussian has a mean mu, a covariance R S S^T R^T (R of a quaternion wxyz of any length, S = diag(exp(log scale))), an opacity
sigmoid(logit), and one colour for all sides, .5 + C0 dc, clamped to [0, 1]: the constant term of spherical harmonics, in the units that
files store. About 512 of them is what a CPU can train.
Source: 3D Gaussian Splatting for Real-Time Radiance Field Rendering, arXiv 2308.04079, sections 4 and 5.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tropism.core import Stream, UserError, clamp, uniform
from tropism.scene.field import sampled
from tropism.space.volume import Field

C0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""
OPACITY = 0.1
"""At which a Gaussian starts: low enough that those behind it get a gradient too."""
PLACE = 0x676175737369
"""The "update" of the draws of `from_field`: no run reaches it, so no scene shares its numbers with a run's own noise."""
PAIRS = 1 << 20
"""Of points and Gaussians, looked at in one piece by `GaussianField.forward`."""
SHAPES = {"means": (3,), "log_scales": (3,), "rotations": (4,), "opacity_logits": (), "dc": (3,)}


class GaussianField(nn.Module):
    """N Gaussians: means (N, 3) in the cube [-1, 1]^3, log_scales (N, 3), rotations (N, 4) wxyz, opacity_logits (N,), dc (N, 3).

    All five are parameters of one floating dtype. It is a field too: called with points it gives densities and colours.
    Raises UserError for no Gaussian or for shapes that do not fit.
    """

    def __init__(self, means: Tensor, log_scales: Tensor, rotations: Tensor, opacity_logits: Tensor, dc: Tensor):
        super().__init__()
        given = dict(zip(SHAPES, (means, log_scales, rotations, opacity_logits, dc), strict=True))
        for name, value in given.items():
            if tuple(value.shape) != (len(means), *SHAPES[name]) or not len(means):
                shape = ", ".join(("N", *map(str, SHAPES[name])))
                raise UserError(f"{name} of Gaussians is ({shape}) with N at least 1, not {tuple(value.shape)}.")
        self.means, self.log_scales, self.rotations, self.opacity_logits, self.dc = (
            nn.Parameter(value.detach().clone()) for value in given.values()
        )

    def __len__(self) -> int:
        return len(self.means)

    def axes(self) -> Tensor:
        """R (N, 3, 3), orthonormal: in its columns the Gaussians' own axes, in the world."""
        w, x, y, z = F.normalize(self.rotations, dim=1).unbind(1)
        rows = (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
        return torch.stack([torch.stack(row, -1) for row in rows], 1)

    def scales(self) -> Tensor:
        """S (N, 3): standard deviations along the Gaussians' own axes, above 0."""
        return self.log_scales.exp()

    def opacities(self) -> Tensor:
        """(N,) in (0, 1): how much of the light behind its centre a Gaussian takes."""
        return self.opacity_logits.sigmoid()

    def colours(self) -> Tensor:
        """(N, 3) in [0, 1]; a clamped one keeps a gradient that leads back inside."""
        return clamp(0.5 + C0 * self.dc)

    def smoothness(self) -> Tensor:
        """0, (): total variation is of grids, and there is none here."""
        return self.means.new_zeros(())

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """A field for volume rendering and meshes: points (P, 3) -> densities (P,), at least 0, a unit length; colours (P, 3) in [0, 1].

        The density is such that a ray through a round Gaussian's centre is taken as much light as its opacity says. Colours are means,
        weighted by density; 0 where nothing is.
        """
        size = max(1, PAIRS // len(self))
        parts = [self._at(piece) for piece in points.split(size)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.einsum("pnd,nde->pne", points[:, None] - self.means, self.axes()) / self.scales()
        each = self._peaks() * (-0.5 * own.square().sum(2)).exp()
        density = each.sum(1)
        return density, each @ self.colours() / density.clamp_min(1e-12)[:, None]

    def _peaks(self) -> Tensor:
        """(N,): the density in each centre; softplus(logit) = -log(1 - opacity)."""
        return F.softplus(self.opacity_logits) / (math.sqrt(2 * math.pi) * self.log_scales.mean(1).exp())

    @torch.no_grad()
    def baked(self, resolution: int = 96, reach: float = 4.0) -> Field:
        """The same field read off a grid of resolution^3 nodes, trilinear between them; asking it costs the same for any number N.

        A Gaussian counts at the nodes within `reach` of its scales: what is left out is below 3.4e-4 of its density.
        """
        ticks = torch.linspace(-1, 1, resolution, device=self.means.device, dtype=self.means.dtype)
        grid = self.means.new_zeros(4, *(resolution,) * 3)
        axes, scales = self.axes(), self.scales()
        half = reach * (axes * scales[:, None]).norm(dim=2)  # of the box around an ellipsoid
        shares = torch.cat([torch.ones_like(self.dc[:, :1]), self.colours()], 1)
        for i, peak in enumerate(self._peaks()):
            near = [((ticks - m).abs() <= h).nonzero()[:, 0] for m, h in zip(self.means[i], half[i], strict=True)]
            if not all(map(len, near)):
                continue
            box = tuple(slice(int(n[0]), int(n[-1]) + 1) for n in near)
            points = torch.cartesian_prod(*(ticks[side] for side in box)).view(-1, 3) - self.means[i]
            own = points @ axes[i] / scales[i]
            density = (peak * (-0.5 * own.square().sum(1)).exp()).view([len(n) for n in near])
            grid[:, *box] += shares[i].view(4, 1, 1, 1) * density
        return Baked(grid)


class Baked(nn.Module):
    """A field on a grid (4, R, R, R): the density, and the three colours times the density."""

    def __init__(self, grid: Tensor):
        super().__init__()
        self.grid = nn.Parameter(grid, requires_grad=False)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        found = sampled(self.grid, points)
        return found[:, 0], found[:, 1:] / found[:, :1].clamp_min(1e-12)


# ---------------------------------------------------------------------------------------------------- where they start


def from_points(points: Tensor, colours: Tensor, *, opacity: float = OPACITY) -> GaussianField:
    """Round Gaussians at points (N, 3), of colours (N, 3) in [0, 1], as wide as their three nearest neighbours are far (root mean square).

    Raises UserError for an opacity outside (0, 1), and for shapes that do not fit.
    Source: arXiv 2308.04079, section 5.1.
    """
    if not 0 < opacity < 1:
        raise UserError(f"Gaussians start at an opacity in (0, 1), not {opacity:g}. Try {OPACITY:g}.")
    if points.ndim != 2 or points.shape[1:] != (3,) or not len(points) or colours.shape != points.shape:
        raise UserError(
            f"Gaussians start at points (N, 3) with colours (N, 3), not {tuple(points.shape)} and {tuple(colours.shape)}."
        )
    rotations = points.new_tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(points), 1)
    logits = points.new_full((len(points),), math.log(opacity / (1 - opacity)))
    return GaussianField(points, _spacing(points).log()[:, None].repeat(1, 3), rotations, logits, (colours - 0.5) / C0)


def _spacing(points: Tensor) -> Tensor:
    """(N,) root mean square distance to the three nearest others, at least .001; .1 for a single point."""
    if len(points) == 1:
        return points.new_full((1,), 0.1)
    near = min(3, len(points) - 1)
    exact = "donot_use_mm_for_euclid_dist"
    found = [torch.cdist(p, points, compute_mode=exact).topk(near + 1, largest=False)[0] for p in points.split(1024)]
    return torch.cat(found)[:, 1:].square().mean(1).sqrt().clamp_min(1e-3)


@torch.no_grad()
def from_field(
    field: Field,
    count: int,
    *,
    seed: int,
    resolution: int = 48,
    opacity: float = OPACITY,
    device: torch.device | str = "cpu",
) -> GaussianField:
    """Gaussians at `count` points drawn from the density of a field (space.volume), with its colours there. float32.

    resolution: cells along a side of the cube; a cell is drawn by the density at its centre, the point anywhere in it. The same seed
    gives the same points. Raises UserError for a count below 1 or a field that is empty or not finite.
    """
    if count < 1:
        raise UserError(f"A scene needs at least 1 Gaussian, not {count}. Try 256.")
    cells = centres(resolution, device)
    density = field(cells)[0].double()
    if not bool(density.isfinite().all()) or not float(density.sum()) > 0:
        raise UserError(
            "No Gaussian can start in this field: its density is 0 everywhere in the cube, or not finite. Train it anew with another seed."
        )
    u = uniform(seed, Stream.PRIOR, PLACE, range(count), 0, 0, (4,))[:, 0].to(device)
    share = (
        torch.arange(count, device=device) + u[:, 0].double()
    ) / count  # stratified: no part of the scene is missed by chance
    below = density.cumsum(0)
    chosen = torch.searchsorted(below / below[-1], share, right=True).clamp_max(len(cells) - 1)
    points = cells[chosen] + (u[:, 1:] - 0.5) * 2 / resolution
    points = torch.where((field(points)[0] > 0)[:, None], points, cells[chosen])  # at an edge: into what is there
    return from_points(points, field(points)[1].clamp(0, 1), opacity=opacity)


def centres(resolution: int, device: torch.device | str = "cpu") -> Tensor:
    """(resolution^3, 3) float32: the centres of the cells of the cube [-1, 1]^3, z running fastest."""
    along = (2 * torch.arange(resolution, device=device, dtype=torch.float32) + 1) / resolution - 1
    return torch.cartesian_prod(along, along, along)


# ---------------------------------------------------------------------------------------------------- files

NAMES = (
    *"xyz",
    *(f"f_dc_{i}" for i in range(3)),
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
_END = b"end_header\n"
_TYPES = {
    "float": "<f4",
    "float32": "<f4",
    "double": "<f8",
    "float64": "<f8",
    "uchar": "u1",
    "uint8": "u1",
    "int": "<i4",
    "int32": "<i4",
}


def write_ply(field: GaussianField, file: str | Path) -> None:
    """Write Gaussians as binary .ply: the properties NAMES, float32 little endian, unnormalised quaternions, logits, log-scales, dc.

    The file is whole or is what it was before. Raises UserError where the disk refuses.
    """
    columns = (field.means, field.dc, field.opacity_logits[:, None], field.log_scales, field.rotations)
    table = torch.cat([c.detach().cpu().float() for c in columns], 1).numpy().astype("<f4")
    head = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(field)}",
        *(f"property float {n}" for n in NAMES),
    ]
    file = Path(file)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as stream:
            stream.write("\n".join(head).encode() + b"\n" + _END + table.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(
            f"{file} could not be written: {error.strerror}. Choose a folder that exists and has room."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_ply(file: str | Path) -> GaussianField:
    """The Gaussians of a binary .ply, ours or another tool's: NAMES in any order among others, which are skipped. float32, on the CPU.

    Colours that depend on the view (f_rest) are not read. Raises UserError for a file that is missing, damaged, or holds no Gaussians.
    """
    file = Path(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} could not be read: {error.strerror}. Name a .ply file of Gaussians.") from error
    head, end, body = data.partition(_END)
    if not end or not head.startswith(b"ply\nformat binary_little_endian 1.0\n"):
        raise UserError(f"{file} is no binary little-endian .ply, or its header is cut off. Write it with write_ply.")
    count, row = _layout(head.decode("ascii", "replace").splitlines()[2:], file)
    size = count * row.itemsize
    if len(body) != size:
        raise UserError(
            f"{file} is damaged: {count} Gaussians take {size} bytes after the header, not {len(body)}. Copy it again."
        )
    rows = np.frombuffer(body, row)
    table = torch.from_numpy(np.stack([rows[name] for name in NAMES], 1).astype(np.float32))
    if not bool(table.isfinite().all()):
        raise UserError(f"{file} is damaged: it holds numbers that are not finite. Write it again from the scene.")
    means, dc, opacity, log_scales, rotations = table.split([3, 3, 1, 3, 4], 1)
    return GaussianField(means, log_scales, rotations, opacity[:, 0], dc)


def _layout(lines: list[str], file: Path) -> tuple[int, np.dtype]:
    """How many rows there are, and what a row holds, of the lines of a header."""
    words = [line.split() for line in lines if not line.startswith(("comment", "obj_info"))]
    found = [(w[2], _TYPES[w[1]]) for w in words if len(w) == 3 and w[0] == "property" and w[1] in _TYPES]
    elements = [w[1:] for w in words if w[:1] == ["element"]]
    whole = len(elements) == 1 and len(elements[0]) == 2 and elements[0][0] == "vertex" and elements[0][1].isdecimal()
    count = int(elements[0][1]) if whole else 0
    missing = [name for name in NAMES if name not in dict(found)]
    if missing or not count or len(found) + 1 != len(words) or len(dict(found)) != len(found):
        why = f"it has no {', '.join(missing)}" if missing else "its header is not one of vertices alone"
        raise UserError(f"{file} holds no Gaussians: {why}. Write it with write_ply.")
    return count, np.dtype(found)
