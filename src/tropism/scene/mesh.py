"""A triangle mesh of any field, closed and coloured; the file mesh.glb; and how far two meshes are apart.

Triangles are anticlockwise from outside. Here z is up and the front is on +x, as in all of tropism; in a glTF file y is up and the front on
+z, so there (x, y, z) is written as (y, z, x).
Source: marching cubes in the form of Lewiner et al., Journal of Graphics Tools 2003, by scikit-image.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tropism.core import Stream, UserError, generator, uniform
from tropism.scene.field import SurfaceField, nodes, spacing
from tropism.scene.threshold import PIECE, density_on, largest_part, level_of, like
from tropism.space.volume import Field, composited

_RIM = 1e-4
"""How far outside of the cube the mesh of something that fills it is closed."""


@dataclass(frozen=True)
class Mesh:
    """Vertices (V, 3) float32 in about [-1, 1], faces (F, 3) int64, colours (V, 3) float32 in [0, 1], all on the CPU."""

    vertices: Tensor
    faces: Tensor
    colours: Tensor

    def volume(self) -> float:
        """What it encloses, in cubic units of the cube; above 0 for triangles that look outwards."""
        a, b, c = self.vertices.double()[self.faces].unbind(1)
        return float((a * torch.linalg.cross(b, c)).sum() / 6)

    def normals(self) -> Tensor:
        """(V, 3) unit vectors outwards, of the neighbouring faces by area."""
        return _normals(self.vertices, self.faces)


def mesh_of(field: Field, resolution: int = 96, *, level: float | None = None, largest: bool = False) -> Mesh:
    """The surface of a field on a grid of `resolution` nodes along a side, closed, in the colours that a ray sees that enters there.

    level: the density at the surface; by default threshold.level_of, and of a SurfaceField where its distance is 0. largest: the largest
    connected part alone. Raises UserError if there is no surface, for densities that are not finite, and without scikit-image.
    """
    density = density_on(field, resolution)
    if level is None and isinstance(field, SurfaceField):
        values, at = -_distances(field, resolution), 0.0
    else:
        values, at = density, level_of(field) if level is None else level
    inside = values > at
    if not bool(inside.any()):
        raise UserError(
            f"There is no surface on the grid of {resolution}^3: nothing is above {at:.3g}, the highest value is {values.max():.3g}. "
            f"The object is too thin or too faint: {'train it longer, or raise the resolution' if level is None else 'lower the level'}."
        )
    if largest:
        values = torch.where(inside & ~largest_part(inside, density), 2 * at - values, values)
    vertices, faces = _surface(values.numpy(), at)
    normals = _normals(vertices, faces)
    return Mesh(vertices, faces, _colours(field, vertices, normals, spacing(resolution)))


@torch.no_grad()
def _distances(field: SurfaceField, resolution: int) -> Tensor:
    pieces = nodes(resolution).to(like(field)).split(PIECE)
    found = torch.cat([field.distance(piece).float().cpu() for piece in pieces])
    return found.view(resolution, resolution, resolution)


def _surface(values: np.ndarray, level: float) -> tuple[Tensor, Tensor]:
    """Vertices and faces of where values (R, R, R) on the cube cross a level; closed at the cube's sides."""
    measure = _imported("skimage.measure", "scikit-image")
    span = float(values.max()) - min(float(values.min()), level)
    # Equal values on a square's corners have no one surface, and a node on the level has triangles without area: both would leave holes.
    uneven = values + 1e-4 * span * generator(0, Stream.EVAL, 0).random(values.shape, np.float32)
    away = np.where(values > level, np.maximum(uneven, level + 1e-4 * span), np.minimum(uneven, level - 1e-4 * span))
    padded = np.pad(away, 1, mode="edge")
    rim = np.pad(np.zeros(values.shape, bool), 1, constant_values=True)
    padded[rim & (padded > level)] = 2 * level - padded[rim & (padded > level)]
    found = measure.marching_cubes(padded, level, gradient_direction="ascent")
    side = len(values)
    ticks = np.concatenate([[-1 - _RIM], np.linspace(-1, 1, side), [1 + _RIM]])
    vertices = np.interp(found[0], np.arange(side + 2), ticks).astype(np.float32)
    faces = torch.from_numpy(found[1].astype(np.int64))
    return torch.from_numpy(vertices), faces


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices.double()[faces].unbind(1)
    across = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices, dtype=torch.float64)
    for corner in range(3):
        total.index_add_(0, faces[:, corner], across)
    return (total / total.norm(dim=1, keepdim=True).clamp_min(1e-30)).float()


@torch.no_grad()
def _colours(field: Field, vertices: Tensor, normals: Tensor, cell: float) -> Tensor:
    """What rays see that come in along the normals, from one cell outside to two inside: a solid may have no colour at a vertex."""
    depth, step = torch.linspace(1, -2, 13).to(vertices), 3 * cell / 13
    found = []
    for some, out in zip(vertices.split(PIECE // 16), normals.split(PIECE // 16), strict=True):
        points = (some[:, None] + cell * depth[:, None] * out[:, None]).clamp(-1, 1)
        density, colour = field(points.reshape(-1, 3).to(like(field)))
        density, colour = density.view(len(some), -1), colour.view(len(some), 13, -1)
        weights = composited(density, torch.full_like(density, step))
        mean = (weights[..., None] * colour).sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-12)
        found.append(torch.where(weights.sum(1, keepdim=True) > 1e-9, mean, colour[:, 4]).float().cpu())
    return torch.cat(found).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------- files


def write_glb(mesh: Mesh, path: Path | str) -> Path:
    """Write a binary glTF: y up, the front on +z, colours at the vertices, shown as they are, without a light. Returns the path.

    The file is whole or not there. Raises UserError for a name that does not end in .glb, without trimesh, and where the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() != ".glb":
        raise UserError(f"Meshes are saved as binary glTF. Give a name that ends in .glb, not {path.name}.")
    trimesh = _imported("trimesh", "trimesh")
    linear = torch.where(mesh.colours <= 0.04045, mesh.colours / 12.92, ((mesh.colours + 0.055) / 1.055) ** 2.4)
    colours = (linear * 255).round().byte().numpy()  # glTF's vertex colours are linear light, pictures are sRGB
    turned = mesh.vertices[:, [1, 2, 0]].numpy()
    made = trimesh.Trimesh(turned, mesh.faces.numpy(), vertex_colors=colours, process=False)
    data = trimesh.exchange.gltf.export_glb(made.scene(), include_normals=True, tree_postprocessor=_unlit)
    return write_whole(path, data)


def _unlit(tree: dict[str, Any]) -> None:
    """A material that shows the colours as they are; glTF's own default is a metal, which is black in many viewers."""
    plain = {"metallicFactor": 0.0, "roughnessFactor": 1.0, "baseColorFactor": [1.0, 1.0, 1.0, 1.0]}
    tree["materials"] = [{"pbrMetallicRoughness": plain, "extensions": {"KHR_materials_unlit": {}}}]
    tree["extensionsUsed"] = sorted({*tree.get("extensionsUsed", []), "KHR_materials_unlit"})
    for each in tree["meshes"]:
        for primitive in each["primitives"]:
            primitive["material"] = 0


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file so that it holds all of `data` or what it held before. Raises UserError where the disk refuses."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written ({error.strerror or error}). Choose another place.") from error
    return path


def installed() -> None:
    """Raises UserError where a package that meshes need is missing."""
    for module, package in (("skimage.measure", "scikit-image"), ("trimesh", "trimesh")):
        _imported(module, package)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'Meshes need {package}, which is not installed: pip install "tropism[scene]".') from error


# ---------------------------------------------------------------------------------------------------- distances


def on_surface(mesh: Mesh, count: int, seed: int = 0) -> Tensor:
    """(count, 3): points drawn uniformly on a mesh, a pure function of the arguments."""
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).cumsum(0)
    u = uniform(seed, Stream.EVAL, 0, -1, 0, 0, (count, 3))[0, 0].double()
    # One point in each of `count` equal shares of the area: the same mean as independent ones, with less spread.
    face = torch.searchsorted(area, (torch.arange(count) + u[:, 0]) / count * area[-1]).clamp_max(len(area) - 1)
    root, share = u[:, 1:2].sqrt(), u[:, 2:]
    return (1 - root) * a[face] + root * (1 - share) * b[face] + root * share * c[face]


def chamfer(first: Mesh, second: Mesh, *, points: int = 8192, seed: int = 0) -> float:
    """The mean distance from one surface to the other, both ways, in units of the cube: 0 for one and the same, up to the sampling.

    points: drawn on each; two samples of one surface are about half of sqrt(area / points) apart.
    """
    from scipy.spatial import KDTree

    a, b = on_surface(first, points, seed).numpy(), on_surface(second, points, seed + 1).numpy()
    return float(sum(np.mean(KDTree(y).query(x)[0]) for x, y in ((a, b), (b, a)))) / 2
