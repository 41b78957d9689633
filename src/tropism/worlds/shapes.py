"""The `shapes` world: 64 px pictures such as "three red circles on sand", and a parser that reads them back.

A scene is a count (1-5), a shape, a colour and a background: 2,000 prompts. Backgrounds carry a texture that no prompt
mentions (grain, a gradient or stripes), so a picture can be compressed without deleting what the prompt asks for.
`read` is the exact measure: 100 % on clean renders, and `None` ("unreadable") rather than a guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SIZE = 64
COUNTS = ("one", "two", "three", "four", "five")
SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = {
    "red": (215, 25, 30),
    "green": (15, 135, 45),
    "blue": (25, 50, 215),
    "yellow": (250, 220, 20),
    "orange": (250, 125, 10),
    "purple": (125, 20, 165),
    "white": (255, 255, 255),
    "black": (10, 10, 12),
}
BACKGROUNDS = {
    "sand": (196, 170, 122),
    "sky": (128, 178, 212),
    "grass": (134, 170, 92),
    "brick": (152, 92, 80),
    "slate": (112, 120, 128),
    "lilac": (182, 152, 206),
    "mint": (140, 204, 176),
    "rose": (214, 150, 160),
    "ocean": (52, 104, 132),
    "chocolate": (92, 64, 50),
}
TEXTURES = ("grain", "gradient", "stripes")


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for, or what the parser read; `None` marks an attribute that could not be read."""

    count: int | None
    shape: str | None
    colour: str | None
    background: str | None

    @property
    def prompt(self) -> str:
        assert self.count is not None
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        return f"{COUNTS[self.count - 1]} {self.colour} {self.shape}{plural} on {self.background}"

    @property
    def held_out(self) -> bool:
        """One combination in ten is never trained on, chosen by a hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).digest()[0] % 10 == 0


def scenes(held_out: bool | None = None) -> list[Scene]:
    """All 2,000 scenes, or only those of one side of the split."""
    every = [Scene(*a) for a in product(range(1, len(COUNTS) + 1), SHAPES, COLOURS, BACKGROUNDS)]
    return [s for s in every if held_out is None or s.held_out == held_out]


@cache
def neighbours(prompt: str) -> list[list[str]]:
    """The prompts that differ from this one in its count, in its shape, in its colour, in its background: four groups.

    Raises ValueError as `parse_prompt` does.
    """
    scene = parse_prompt(prompt)
    values = {"count": range(1, len(COUNTS) + 1), "shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS}
    return [
        [replace(scene, **{name: v}).prompt for v in known if v != getattr(scene, name)]
        for name, known in values.items()
    ]


def parse_prompt(prompt: str) -> Scene:
    """The scene a prompt of this world asks for. Raises ValueError for any other text."""
    words = prompt.split()
    if len(words) == 5 and words[3] == "on" and words[0] in COUNTS:
        shape = next((s for s in SHAPES if words[2] in (s, s + "s", s + "es")), None)
        scene = Scene(COUNTS.index(words[0]) + 1, shape, words[1], words[4])
        if shape and words[1] in COLOURS and words[4] in BACKGROUNDS:
            return scene
    raise ValueError(
        f"{prompt!r} is not a prompt of the shapes world. Its prompts read '<count> <colour> <shape> on <background>', "
        "for example 'three red circles on sand'."
    )


# ---------------------------------------------------------------------------------------------------- rendering


def _polygon(x, y, corners):
    """Signed distance, in pixels, of (x, y) to a polygon; negative inside."""
    best, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        h = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, np.hypot(wx - ex * h, wy - ey * h))
        inside ^= ((ay > y) != (by > y)) & (x < ex * wy / (ey if ey else 1.0) + ax)
    return np.where(inside, -best, best)


def _corners(shape: str, r: float) -> np.ndarray:
    if shape == "square":
        h = 0.82 * r
        return np.array([(-h, -h), (h, -h), (h, h), (-h, h)])
    if shape == "cross":
        a, b = r, 0.34 * r
        return np.array(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    points, radii = (3, (1.1 * r,)) if shape == "triangle" else (5, (1.12 * r, 0.46 * r))
    n = points * len(radii)
    angle = np.arange(n) * 2 * np.pi / n - np.pi / 2
    radius = np.array([radii[i % len(radii)] for i in range(n)])
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def coverage(shape: str, cx: float, cy: float, r: float, size: int = SIZE) -> np.ndarray:
    """Share of each pixel covered by one object, (size, size) in [0, 1]; centre and radius in pixels."""
    y, x = np.mgrid[:size, :size] + 0.5
    distance = np.hypot(x - cx, y - cy) - r if shape == "circle" else _polygon(x - cx, y - cy, _corners(shape, r))
    return np.clip(0.5 - distance, 0, 1)


def _place(n: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and radii (pixels) of n objects that keep 3 px from each other and from the border."""
    low, high = ((7.0, 11.0), (7.0, 10.0), (6.5, 9.0), (6.5, 8.2), (6.5, 7.6))[n - 1]
    while True:
        size, placed = rng.uniform(low, high), []
        for _ in range(60 * n):
            r = size * rng.uniform(0.93, 1.07)
            x, y = rng.uniform(1.15 * r + 3, SIZE - 1.15 * r - 3, 2)
            if all(np.hypot(x - a, y - b) > 1.15 * (r + c) + 3 for a, b, c in placed):
                placed.append((x, y, r))
            if len(placed) == n:
                return placed


def _texture(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A zero-mean field (64, 64, 3) in units of 1/255 that is added to the background."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2) / SIZE
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    tint = 1 + rng.uniform(-0.35, 0.35, 3)
    if kind == "gradient":
        field = 34 * along + rng.uniform(16, 22) * np.sin(2 * np.pi * (rng.uniform(4, 9) * along + rng.uniform()))
    elif kind == "stripes":
        field = rng.uniform(18, 26) * np.sin(2 * np.pi * (SIZE / rng.uniform(5, 11) * along + rng.uniform()))
    else:
        field = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 1.2, mode="wrap")
        field *= rng.uniform(12, 16) / field.std()
    return np.clip(field - field.mean(), -31, 31)[..., None] * tint * np.sqrt(3) / np.linalg.norm(tint)


Odd = Mapping[int, tuple[str, ...]]
"""Object number -> the shapes it is drawn halfway between instead of its own; () leaves it out."""


def compose(
    scene: Scene, rng: np.random.Generator, texture: str | None = None, odd: Odd | None = None
) -> tuple[np.ndarray, list[tuple]]:
    """Draw a scene: (64, 64, 3) uint8, and its objects as (x, y, radius) in pixels.

    `texture` is one of TEXTURES, "flat", or None for a random one. `odd` spoils some objects and leaves the others as they are.
    """
    assert scene.count and scene.shape and scene.colour and scene.background, "a scene that could not be read"
    texture = texture or TEXTURES[rng.integers(len(TEXTURES))]
    picture = np.broadcast_to(np.array(BACKGROUNDS[scene.background], float), (SIZE, SIZE, 3))
    picture = picture if texture == "flat" else picture + _texture(texture, rng)
    objects = _place(scene.count, rng)
    for i, (x, y, r) in enumerate(objects):
        drawn_as = (odd or {}).get(i, (scene.shape,))
        if not drawn_as:
            continue
        alpha = np.mean([coverage(shape, x, y, r) for shape in drawn_as], 0)[..., None]
        picture = (1 - alpha) * picture + alpha * np.array(COLOURS[scene.colour], float)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), objects


def render(scene: Scene, rng: np.random.Generator, texture: str | None = None, odd: Odd | None = None) -> np.ndarray:
    """The picture of `compose` alone."""
    return compose(scene, rng, texture, odd)[0]


def pictures(batch: list[Scene], seed: int, texture: str | None = None, odd: Sequence[Odd] | None = None) -> Tensor:
    """Render scenes into (B, 3, 64, 64) float32 in [0, 1]; the same seed draws the same pictures, `odd` spoils objects in them."""
    spoilt = odd or [{}] * len(batch)
    drawn = [render(s, np.random.default_rng([seed, i]), texture, spoilt[i]) for i, s in enumerate(batch)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def centres(batch: list[Scene], seed: int) -> list[Tensor]:
    """Where `pictures(batch, seed)` put its objects: B tensors (n_i, 2) of pixel (x, y)."""
    drawn = [compose(s, np.random.default_rng([seed, i]))[1] for i, s in enumerate(batch)]
    return [torch.tensor([(x, y) for x, y, _ in objects]) for objects in drawn]


# ---------------------------------------------------------------------------------------------------- reading

_GRID = 18
_OBJECT = np.array(list(COLOURS.values()), float)
_GROUND = np.array(list(BACKGROUNDS.values()), float)


def _silhouette(alpha: np.ndarray) -> np.ndarray:
    """The bounding box of an object's coverage (values in [0, 1]) stretched to a _GRID x _GRID square."""
    rows, columns = np.where((alpha > 0.5).any(1))[0], np.where((alpha > 0.5).any(0))[0]
    box = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    at = [np.clip((np.arange(_GRID) + 0.5) * n / _GRID - 0.5, 0, n - 1) for n in box.shape]
    return ndimage.map_coordinates(box, np.meshgrid(*at, indexing="ij"), order=1)


_TEMPLATES = {
    s: np.stack(
        [
            _silhouette(coverage(s, 32 + dx, 32 + dy, r))
            for r in (6.2, 7, 7.8, 9, 11)
            for dx, dy in ((0, 0), (0.5, 0.5), (0.25, 0.75))
        ]
    )
    for s in SHAPES
}


def _read_shape(alpha: np.ndarray) -> str | None:
    """The shape whose template overlaps an object best; None below 0.66 overlap or within 0.02 of the runner-up."""
    box = ndimage.find_objects((alpha > 0.5).astype(int))[0]
    height, width = (s.stop - s.start for s in box)
    if not 0.66 < height / width < 1.5 or min(height, width) < 7:
        return None
    seen = _silhouette(alpha)
    score = {s: max(np.minimum(seen, t).sum() / np.maximum(seen, t).sum() for t in ts) for s, ts in _TEMPLATES.items()}
    first, second = sorted(score, key=score.__getitem__, reverse=True)[:2]
    return first if score[first] > 0.66 and score[first] - score[second] > 0.02 else None


def _read_component(pixels: np.ndarray, component: np.ndarray, ground: np.ndarray):
    """(shape or None, colour or None) of one connected blob; pixels (64, 64, 3) in 0..255."""
    contrast = np.linalg.norm(pixels - ground, axis=-1) * component
    core = pixels[contrast > 0.8 * np.percentile(contrast[component], 90)]
    distance = np.linalg.norm(core[:, None] - _OBJECT, axis=-1)
    vote = np.bincount(distance.argmin(1), minlength=len(_OBJECT))
    best = vote.argmax()
    sure = vote[best] > 0.8 * vote.sum() and np.median(distance[:, best]) < 60
    axis = _OBJECT[best] - ground
    alpha = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1) * ndimage.binary_dilation(component)
    shape = _read_shape(alpha) if (alpha > 0.5).sum() >= 20 else None
    return shape, list(COLOURS)[best] if sure else None


def _is_texture(pixels: np.ndarray, blob: np.ndarray, ground: np.ndarray) -> bool:
    """A speck too small for an object (the smallest covers 45 px) that stays clear of every object colour."""
    inside = pixels[blob]
    strongest = inside[np.linalg.norm(inside - ground, axis=-1).argmax()]
    nearest = _OBJECT[np.linalg.norm(_OBJECT - strongest, axis=-1).argmin()]
    return bool(blob.sum() < 40 and np.linalg.norm(strongest - ground) < 0.75 * np.linalg.norm(nearest - ground))


def _read_background(pixels: np.ndarray) -> int | None:
    frame = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[3:-3, :3].reshape(-1, 3),
            pixels[3:-3, -3:].reshape(-1, 3),
        ]
    )
    distance = np.linalg.norm(frame.mean(0) - _GROUND, axis=1)
    first, second = np.argsort(distance)[:2]
    return int(first) if distance[first] < 24 and distance[second] - distance[first] > 6 else None


def _agreed(values: list):
    return values[0] if values and all(v == values[0] for v in values) else None


def read_one(pixels: np.ndarray) -> Scene:
    """Read one picture (64, 64, 3), uint8 or float in 0..255."""
    pixels = pixels.astype(float)
    index = _read_background(pixels)
    if index is None:
        return Scene(None, None, None, None)
    ground = _GROUND[index]
    labels, n = cast(tuple[np.ndarray, int], ndimage.label(np.linalg.norm(pixels - ground, axis=-1) > 62))
    blobs = [labels == k for k in range(1, n + 1) if (labels == k).sum() >= 8]
    blobs = [b for b in blobs if not _is_texture(pixels, b, ground)]
    parts = [_read_component(pixels, b, ground) for b in blobs]
    known = 1 <= len(parts) <= len(COUNTS) and all(b.sum() >= 30 for b in blobs)
    return Scene(
        len(parts) if known else None,
        _agreed([p[0] for p in parts]),
        _agreed([p[1] for p in parts]),
        list(BACKGROUNDS)[index],
    )


def read(images: Tensor) -> list[Scene]:
    """Read pictures (B, 3, 64, 64) in [0, 1]: one Scene each, with None for what is unreadable."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).cpu().numpy()
    return [read_one(p) for p in pixels]


def accuracy(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Which attributes of each picture are what its prompt asks: {"count", "shape", "colour", "background", "all"} -> (B,) 0/1."""
    wanted, found = [parse_prompt(p) for p in prompts], read(images)
    right = {
        a: torch.tensor([float(getattr(w, a) == getattr(f, a)) for w, f in zip(wanted, found, strict=True)])
        for a in ("count", "shape", "colour", "background")
    }
    return {**right, "all": torch.stack(list(right.values())).amin(0)}
