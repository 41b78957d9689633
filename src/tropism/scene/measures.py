"""How good a scene is, measured: against the solid it should be, by a judge that never rewarded it, and by itself.

The protocol is fixed: pictures of SIZE pixels from `rig`, 8 azimuths at 2 elevations, each pixel the mean of 2 x 2 rays; occupancy on a
grid of GRID^3 cells, a cell being full where the density at its centre is above the field's own `threshold`.
Source: the toy world of this library's own 3-D evaluation; PSNR and SSIM as in restore.fidelity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from scipy import ndimage
from torch import Tensor

from tropism.core import UserError
from tropism.restore import fidelity
from tropism.rewards.feature_distance import FeatureDistance
from tropism.scene.mesh import Mesh, chamfer, mesh_of
from tropism.scene.vp3d import PROMPT_CAMERA
from tropism.space.cameras import Cameras, cameras, ring
from tropism.space.volume import Field, inside
from tropism.worlds import solids
from tropism.worlds.solids import Scene
from tropism.worlds.solids_features import HEADS, Classifier
from tropism.worlds.solids_library import averaged

SIZE, GRID, MESH = 32, 48, 64
AZIMUTHS, ELEVATIONS = 8, (0.0, 30.0)
SOLID = 0.5
"""Opacity above which a pixel shows something."""
_SAMPLES, _TRIES = 96, 64


def rig() -> Cameras:
    """The 16 cameras of the protocol: all azimuths at the first elevation, then at the second."""
    turns = [360 * i / AZIMUTHS for i in range(AZIMUTHS)]
    return cameras(turns * len(ELEVATIONS), [e for e in ELEVATIONS for _ in turns])


@dataclass(frozen=True)
class Seen:
    """A field from V cameras: light (V, 3, S, S) premultiplied, opacity (V, 1, S, S), pictures (V, 3, S, S) on a background."""

    cameras: Cameras
    light: Tensor
    opacity: Tensor
    pictures: Tensor


@torch.no_grad()
def seen(field: Field, background: tuple[float, ...] = solids.BACKGROUND, device: str = "cpu") -> Seen:
    """The protocol's pictures of a field, in front of a colour."""
    places = rig().to(torch.device(device))
    light, opacity = averaged(field, places, SIZE)
    behind = light.new_tensor(background)[:, None, None]
    return Seen(places, light, opacity, (light + (1 - opacity) * behind).clamp(0, 1))


@lru_cache(maxsize=64)
def seen_truth(truth: Scene, background: tuple[float, ...] = solids.BACKGROUND, device: str = "cpu") -> Seen:
    """`seen` of the solids themselves, rendered once."""
    return seen(solids.field(truth), background, device)


# ---------------------------------------------------------------------------------------------------- shape


def cells(device: str = "cpu") -> Tensor:
    """(GRID^3, 3) the centres of the grid's cells, x slowest."""
    at = (torch.arange(GRID, device=device) + 0.5) * 2 / GRID - 1
    return torch.cartesian_prod(at, at, at)


@torch.no_grad()
def threshold(field: Field, device: str = "cpu") -> float:
    """The density whose silhouettes, from six sides, best agree with those of the field's own volume rendering; infinite for an empty one.

    It looks at no truth, and it is the same rule for every field. Of equally good densities it is the middle one.
    """
    origins, directions = ring(6, 20.0).to(torch.device(device)).rays(SIZE, SIZE)
    near, far = inside(origins, directions)
    step = ((far - near) / _SAMPLES)[..., None]
    along = near[..., None] + (torch.arange(_SAMPLES).to(near) + 0.5) * step
    points = origins[:, :, None] + along[..., None] * directions[:, :, None]
    density = field(points.reshape(-1, 3))[0].view(along.shape)
    shown = 1 - torch.exp(-(density * step).sum(-1)) > SOLID
    highest = density.amax(-1)
    most = float(highest.max())
    if most <= 0 or not bool(shown.any()):
        return float("inf")
    tries = [most * 10 ** (-4 * (1 - i / _TRIES)) for i in range(_TRIES)]
    share = torch.stack([_share(highest > t, shown) for t in tries])
    best = (share >= share.max()).nonzero()[:, 0]
    return tries[int(best[len(best) // 2])]


def _share(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of two masks; 0 where both are empty."""
    return (one & other).sum() / (one | other).sum().clamp_min(1)


def overlap(full: Tensor, truth: Scene) -> dict[str, float]:
    """Of full cells (GRID^3,) bool: "iou" with the true solid's, and "volume", theirs over its."""
    right = solids.occupancy(truth, cells(str(full.device)))
    return {"iou": float(_share(full, right)), "volume": float(full.sum() / right.sum())}


def floaters(density: Tensor, full: Tensor, parts: int = 1) -> float:
    """The share, in [0, 1], of the density of full cells that lies outside of the `parts` largest connected pieces; NaN without any.

    density, full: (GRID^3,). Pieces hang together by faces; the largest are those with the most density.
    """
    pieces: Any = ndimage.label(full.view(GRID, GRID, GRID).cpu().numpy())
    if not pieces[1]:
        return float("nan")
    mass = torch.zeros(pieces[1] + 1, dtype=torch.float64)
    mass.index_add_(0, torch.from_numpy(pieces[0]).flatten().long(), torch.where(full, density, 0).double().cpu())
    return float(1 - mass.sort().values[-parts:].sum() / mass.sum())


# ---------------------------------------------------------------------------------------------------- looks


def likeness(mine: Seen, truth: Seen) -> dict[str, float]:
    """Means over views of "psnr" and "ssim" to the truth, and of PSNR where the truth is, "psnr/foreground"; the lowest, "psnr/worst"."""
    decibels = fidelity.psnr(mine.pictures, truth.pictures)
    there = (truth.opacity > SOLID).to(mine.pictures)
    error = ((mine.pictures - truth.pictures).square().mean(1, keepdim=True) * there).sum((1, 2, 3))
    masked = -10 * (error / there.sum((1, 2, 3)).clamp_min(1)).log10()
    similar = fidelity.ssim(mine.pictures, truth.pictures)
    return {
        "psnr": float(decibels.mean()),
        "psnr/worst": float(decibels.min()),
        "psnr/foreground": float(masked.mean()),
        "ssim": float(similar.mean()),
    }


def colour_spread(mine: Seen) -> float:
    """How far the views' colours are from each other: the mean distance, in [0, 1.8), of each view's median colour from their mean.

    Of the median of what is opaque, because the face, black on one side of every solid, must not count. NaN if nothing is opaque.
    """
    colours = []
    for light, opacity in zip(mine.light, mine.opacity[:, 0], strict=True):
        there = opacity > SOLID
        if bool(there.any()):
            colours.append((light[:, there] / opacity[there]).median(1).values)
    if not colours:
        return float("nan")
    found = torch.stack(colours)
    return float((found - found.mean(0)).norm(dim=1).mean())


@lru_cache(maxsize=64)
def _truth_mesh(truth: Scene) -> Mesh:
    return mesh_of(solids.field(truth), MESH, level=solids.DENSITY / 2)


def surfaces(field: Field, level: float, truth: Scene) -> float:
    """The Chamfer distance of both surfaces, in units of the cube, off grids of MESH^3; .02 for the truth itself. NaN if empty."""
    try:
        return chamfer(mesh_of(field, MESH, level=level), _truth_mesh(truth), points=4096)
    except UserError:
        return float("nan")


@torch.no_grad()
def prompt_consistency(field: Field, visual: Tensor, judge: Classifier, device: str = "cpu") -> float:
    """How near the front view is to the visual prompt (3, H, W): the cosine, in [-1, 1], of a judge's mean features."""
    side = visual.shape[-1]
    light, opacity = averaged(field, cameras([PROMPT_CAMERA[0]], PROMPT_CAMERA[1]).to(torch.device(device)), side)
    behind = border(visual).to(light)[:, None, None]
    distance = FeatureDistance(judge, tokens="mean").distance(light + (1 - opacity) * behind, visual[None].to(light))
    return float(1 - distance)


def border(picture: Tensor) -> Tensor:
    """(3,): the median colour of a picture's (3, H, W) border."""
    return torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1).median(1).values


# ---------------------------------------------------------------------------------------------------- by a judge


@torch.no_grad()
def judged(mine: Seen, judge: Classifier, wanted: Scene) -> dict[str, float]:
    """What a classifier reads, against what one solid should be; its view words are those of the cameras.

    "accuracy": the share of views in which all of shape and colour that is wanted is read right, "accuracy/shape" and so on apart;
    "accuracy/worst": of the worst azimuth; "log_prob" of what is wanted, mean and "/worst" over views; "face": whether one is found from
    the front; "janus", a second one, as in `janus`: without any face it is not there either, so read them together.
    """
    found = judge.log_probs(mine.pictures)
    said = wanted.solids[0].said
    right = {h: found[h].argmax(1) == HEADS[h].index(v) for h, v in said.items()}
    measures = {f"accuracy/{h}": float(r.float().mean()) for h, r in right.items()}
    if both := [right[h] for h in ("shape", "colour") if h in right]:
        every = torch.stack(both).all(0).float()
        measures |= {
            "accuracy": float(every.mean()),
            "accuracy/worst": float(every.view(-1, AZIMUTHS).mean(0).min()),
        }
    if said:
        sure = torch.stack([found[h][:, HEADS[h].index(v)] for h, v in said.items()]).sum(0)
        measures |= {"log_prob": float(sure.mean()), "log_prob/worst": float(sure.min())}
    face = found["face"][:, HEADS["face"].index("seen")].exp()
    front = found["view"].argmax(1) == HEADS["view"].index("front")
    azimuth = mine.cameras.azimuth
    return measures | {"face": float(has_face(face, azimuth)), "janus": float(janus(face, front, azimuth))}


def has_face(face: Tensor, azimuth: Tensor) -> bool:
    """Whether a face is found within 45 degrees of the front. face: (V,) probabilities that one is seen; azimuth: (V,) degrees."""
    turn = (azimuth + 180) % 360 - 180
    return bool((face[turn.abs() <= 45 + 1e-3] > 0.5).any())


def janus(face: Tensor, front: Tensor, azimuth: Tensor) -> bool:
    """Whether there are two faces: one is found in two views more than 90 degrees apart, or a view from behind is taken for the front.

    face: (V,) probabilities that a face is seen; front: (V,) bool, what is said of the view; azimuth: (V,) degrees. Not at 90 itself: one
    face is rightly seen at 45 degrees on either side. Behind is within 45 degrees of 180.
    """
    turn = (azimuth + 180) % 360 - 180
    found = turn[face > 0.5]
    apart = ((found[:, None] - found + 180) % 360 - 180).abs()
    return bool((apart > 90 + 1e-3).any()) or bool(front[turn.abs() >= 135 - 1e-3].any())


# ---------------------------------------------------------------------------------------------------- all of it


@torch.no_grad()
def measured(
    field: Field,
    wanted: Scene,
    *,
    truth: Scene | None = None,
    judge: Classifier | None = None,
    visual: Tensor | None = None,
    background: tuple[float, ...] = solids.BACKGROUND,
    device: str = "cpu",
) -> dict[str, float]:
    """Every measure of a field. wanted: what the prompt says; truth: the solids it should be, wherever they are known.

    judge: reads one solid, and is not asked about two. visual: the visual prompt (3, H, W), which the judge's features compare with.
    """
    mine, limit = seen(field, background, device), threshold(field, device)
    density = field(cells(device))[0]
    full = density > limit
    measures = {
        "floaters": floaters(density, full, len(wanted.solids)),
        "colour_spread": colour_spread(mine),
        "threshold": limit,
    }
    if truth is not None:
        measures |= overlap(full, truth) | likeness(mine, seen_truth(truth, background, device))
        measures["chamfer"] = surfaces(field, limit, truth)
    if visual is not None and judge is not None:
        measures["consistency"] = prompt_consistency(field, visual, judge, device)
    if judge is not None and len(wanted.solids) == 1:
        measures |= judged(mine, judge, wanted)
    return measures
