"""Pictures as what a model is asked for: a folder of originals, with low-resolution pictures made of them or beside them.

Every picture is a prompt (without words) whose batch brings `reference` and `low_res`. In training a picture is cut and made worse anew
each time it comes, by (seed, its place in the run); for evaluation it is cut in the middle and made worse as its name has it, in runs
of every seed alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch, Stream, UserError, generator
from tropism.prompts.files import Prompt
from tropism.restore.degrade import Degradation, degraded
from tropism.restore.pairs import paired, pictures_of
from tropism.restore.pictures import read

KEPT = 32
"""Decoded pictures that are kept in memory, as bytes."""
BESIDE_TRAINING = 1 << 40
"""Added to the number that a held-out picture's name gives, so that no training picture is made worse in the same way."""


@dataclass(frozen=True)
class Pictures:
    """Fills a batch in: `reference` (B, 3, H, W) and `low_res` (B, 3, H / scale, W / scale), both in [0, 1].

    meta of a row: "reference" and "low_res" are files, either may be missing; "draw" is its place in the run, in training.
    crop: side of the square that is cut out, in pixels of the original, 0 for whole pictures; it divides by scale. how: what makes
    a low-resolution picture where there is none; its scale is this one's.
    Raises UserError for a picture that is too small, whole pictures of several sizes, and files that cannot be read.
    """

    scale: int
    how: Degradation
    crop: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.crop % self.scale or self.crop < 0:
            near = max(1, round(self.crop / self.scale)) * self.scale
            raise UserError(
                f"--crop is {self.crop}; it must divide by the model's scale, {self.scale}. Try --crop {near}."
            )

    def __call__(self, batch: Batch) -> Batch:
        rows = [self._row(m) for m in batch.meta or []]
        reference = None if rows[0][0] is None else _stacked([r for r, _ in rows])
        return replace(batch, reference=reference, low_res=_stacked([low for _, low in rows]))

    def _row(self, meta: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        """One reference (1, 3, H, W), or None, and its low-resolution picture."""
        large, small = (_bytes(str(meta[k])) if meta.get(k) else None for k in ("reference", "low_res"))
        if large is not None and small is not None:
            self._check_scale(large, small, meta)
        grid = [n // self.scale for n in large.shape[-2:]] if large is not None else small.shape[-2:]  # type: ignore[union-attr]
        top, left, height, width = self._window(grid, meta)
        low = None if small is None else _part(small, top, left, height, width)
        if large is None:
            return None, low  # type: ignore[return-value]
        reference = _part(large, *(n * self.scale for n in (top, left, height, width)))
        if low is None:
            seed, key = (
                (self.seed, meta["draw"]) if "draw" in meta else (0, BESIDE_TRAINING + _number(str(meta["reference"])))
            )
            low = degraded(reference, self.how, seed, [key])
        return reference, low

    def _check_scale(self, large: Tensor, small: Tensor, meta: dict[str, Any]) -> None:
        (high, wide), (h, w) = large.shape[-2:], small.shape[-2:]
        if (high // self.scale, wide // self.scale) != (h, w):
            raise UserError(
                f"{meta['low_res']} has {w} x {h} pixels and its original {Path(str(meta['reference'])).name} {wide} x {high}. The model "
                f"enlarges {self.scale} times, so {wide // self.scale} x {high // self.scale} pixels belong to it. Give such pictures, or "
                "leave --low-res out."
            )

    def _window(self, grid: Sequence[int], meta: dict[str, Any]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part to cut out of a picture that is `grid` low-resolution pixels high and wide."""
        side, name = self.crop // self.scale, Path(str(meta.get("reference") or meta.get("low_res"))).name
        if min(grid) < max(side, 1):
            raise UserError(
                f"{name} has {grid[1] * self.scale} x {grid[0] * self.scale} pixels at full size, less than the {self.crop or self.scale} "
                "that are used. Take it out, or use a smaller --crop."
            )
        if not side:
            return 0, 0, grid[0], grid[1]
        room = [n - side for n in grid]
        if "draw" not in meta:
            return room[0] // 2, room[1] // 2, side, side
        rng = generator(self.seed, Stream.CROP, 0, meta["draw"])
        top, left = (int(rng.integers(n + 1)) for n in room)
        return top, left, side, side


def prompts_of(pictures: str | Path | None, low_res: str | Path | None = None, text: str = "") -> list[Prompt]:
    """A prompt for every picture: originals, with low-resolution pictures of the same names beside them; or these alone.

    Raises UserError for folders without pictures, names that do not pair, and sizes that do not match.
    """
    if pictures is None:
        assert low_res is not None
        return [Prompt(text, meta=(("low_res", str(p)),)) for p in pictures_of(low_res)]
    if low_res is None:
        return [Prompt(text, meta=(("reference", str(p)),)) for p in pictures_of(pictures)]
    found = paired(pictures, lr=low_res).pairs
    return [Prompt(text, meta=(("reference", str(p.sr)), ("low_res", str(p.lr)))) for p in found]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(Path(name).name.encode()).digest()[:4], "big")


@lru_cache(maxsize=KEPT)
def _bytes(file: str) -> Tensor:
    """(3, H, W) uint8 of a picture file."""
    return (read(file).whole()[0] * 255).round().byte()


def _part(picture: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """(1, 3, height, width) float32 in [0, 1] of bytes (3, H, W)."""
    return picture[None, :, top : top + height, left : left + width].float() / 255


def _stacked(pictures: Sequence[Tensor | None]) -> Tensor:
    given = [p for p in pictures if p is not None]
    sizes = sorted({(p.shape[-1], p.shape[-2]) for p in given})
    if len(sizes) > 1 or len(given) < len(pictures):
        told = " and ".join(f"{w} x {h}" for w, h in sizes[:3])
        raise UserError(
            f"The pictures of a batch have {told} pixels, or some lack their original. Cut them alike: --crop 256."
        )
    return torch.cat(given)
