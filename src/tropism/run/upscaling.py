"""Photographs through an upscaler, of any size: tile by tile in bounded memory, with an estimate of what was made up.

Tiles overlap and fade into each other (restore.tiles). The noise of a place is the place's own, whichever tile draws it, so that what
neighbouring tiles draw where they overlap differs only by what they see around it.

Several samples of one picture tell how much of each was invented: if the model samples the posterior, truth and sample are two draws
of it, so the expected distance between sample and truth is that between two samples, whatever the distance. A model that is sure of
what is wrong is not found out by this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, Model, Stream, UserError
from tropism.models.low_res import LowRes, enlarged
from tropism.noise import noise
from tropism.restore import pictures, tiles
from tropism.restore.colour import adain, wavelet
from tropism.restore.pictures import Picture

COLOURS = {"none": lambda made, source: made, "adain": adain, "wavelet": wavelet}
BLOCK = 64
"""Side of the blocks that noise is drawn in, in the grid of the state."""
ROWS = 1 << 20
"""Blocks side by side that one row of them may have."""


@dataclass(frozen=True)
class PlacedDraw(Draw):
    """Noise that belongs to places of a picture. corner: (top, left) of the part, side: its height, in low-resolution pixels."""

    corner: tuple[int, int] = (0, 0)
    side: int = 1

    def __call__(self, stream: Stream, step: int, shape: Sequence[int], k: int = 0) -> Tensor:
        """(B, C, h, w) standard normals: the part of an endless field that begins at the corner."""
        channels, height, width = shape
        top, left = (int(n * Fraction(height, self.side)) for n in self.corner)
        rows, columns = (range(a // BLOCK, -(-(a + n) // BLOCK)) for a, n in ((top, height), (left, width)))
        out = torch.empty(len(self.index), channels, len(rows) * BLOCK, len(columns) * BLOCK)
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            place = row * ROWS + column
            block = noise(self.seed, stream, place, self.index, step, k, (channels, BLOCK, BLOCK))[:, 0]
            out[:, :, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = block
        y, x = top - rows[0] * BLOCK, left - columns[0] * BLOCK
        return out[:, :, y : y + height, x : x + width]


@dataclass
class Upscaler:
    """A picture's parts, one after the other, through a model: one (1, 3, h, w) becomes its samples, (1, 3 samples, k h, k w).

    samples: how many are drawn of each part. colour: none, adain or wavelet. corner: (top, left) of the part to come.
    """

    model: Model
    steps: int
    guidance: float
    prompt: str = ""
    negative: str = ""
    seed: int = 0
    samples: int = 1
    colour: str = "none"
    corner: tuple[int, int] = (0, 0)

    @property
    def scale(self) -> int:
        """Times a side is enlarged. Raises UserError for a model whose scale is no whole number."""
        scale = cast(Any, self.model).scale
        if scale != int(scale):
            raise UserError(
                f"This model enlarges {scale:g} times, and tiles need a whole number. Try --setting scale={round(scale)}."
            )
        return int(scale)

    @property
    def multiple(self) -> int:
        """What the sides of a low-resolution picture must divide by."""
        if not isinstance(self.model, LowRes):
            return 1
        step = self.model._factor() * self.model.patch
        return step // math.gcd(step, self.scale)

    def __call__(self, part: Tensor) -> Tensor:
        """The part whose upper left corner is `corner`."""
        height, width = part.shape[-2:]
        given, k = _padded(part, self.multiple), self.scale
        batch = Batch([self.prompt], [self.negative], low_res=given.to(getattr(self.model, "device", "cpu")))
        made = torch.cat([self._drawn(batch, i, given.shape[-2]) for i in range(self.samples)])
        made = made[..., : k * height, : k * width]
        made = COLOURS[self.colour](made, enlarged(part, k * height, k * width).expand_as(made)).clamp(0, 1)
        return made.flatten(0, 1)[None]

    def _drawn(self, batch: Batch, number: int, side: int) -> Tensor:
        draw = PlacedDraw(self.seed, 0, (number,), self.corner, side)
        batch = replace(batch, index=(number,), rows=())
        return sample(self.model, batch, draw, steps=self.steps, guidance=self.guidance).float().cpu()


@dataclass(frozen=True)
class _Parts:
    """A picture that tells the upscaler which part it is asked for, and whoever waits how much is done."""

    picture: Picture
    upscaler: Upscaler
    wait: Callable[[float], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.picture, name)

    def window(self, top: int, left: int, height: int, width: int) -> Tensor:
        self.upscaler.corner = top, left
        self.wait((top * self.picture.width + left * height) / (self.picture.height * self.picture.width))
        return self.picture.window(top, left, height, width)


def differences(samples: Tensor, k: int) -> Tensor:
    """(2, h, w): mean absolute and mean squared difference of two of (N, 3, k h, k w), over pairs, channels and k x k pixels."""
    pairs = list(combinations(range(len(samples)), 2))
    apart = [samples[i] - samples[j] for i, j in pairs]
    kinds = [torch.stack([d.abs() for d in apart]), torch.stack([d**2 for d in apart])]
    return torch.stack([F.avg_pool2d(x.mean((0, 1))[None, None], k)[0, 0] for x in kinds])


def _padded(part: Tensor, multiple: int) -> Tensor:
    """The part with its last rows and columns repeated up to sides that the model takes."""
    below, right = (-n % multiple for n in part.shape[-2:])
    return F.pad(part, (0, right, 0, below), mode="replicate") if below or right else part


@dataclass(frozen=True)
class Upscaled:
    """A finished picture. doubt: the expected absolute error of a channel, in [0, 1], psnr: the expected PSNR in dB, both if the model
    samples the posterior; None of a single sample, psnr infinite where all samples are equal. notes: what was done to the source
    before, such as turning it or laying it on white.
    """

    source: Path
    out: Path
    height: int
    width: int
    doubt: float | None = None
    psnr: float | None = None
    heat: Path | None = None
    notes: tuple[str, ...] = ()


def upscaled(
    upscaler: Upscaler,
    source: Path,
    out: Path,
    *,
    tile: int,
    context: int,
    blend: int,
    made: str = "",
    wait: Callable[[float], None] = lambda done: None,
) -> Upscaled:
    """Write a picture file, enlarged, to the PNG `out`, and with several samples where they differ beside it.

    tile, context, blend: see restore.tiles, in pixels of the source. made: how, written into the file. wait: called before each part
    with the share that is done.
    Raises UserError for what cannot be read, written or enlarged.
    """
    picture, k = pictures.read(source), upscaler.scale
    result = Upscaled(source, out, k * picture.height, k * picture.width, notes=tuple(picture.notes))
    sizes: dict[str, Any] = {"tile": tile, "context": context, "blend": blend, "step": upscaler.multiple}
    parts = cast(Picture, _Parts(picture, upscaler, wait))
    if upscaler.samples < 2:
        tiles.upscaled(upscaler, parts, out, **sizes, made=made)
        return result
    heat, sums, done = heat_of(out), torch.zeros(2, dtype=torch.float64), 0
    with pictures.png(heat, picture.height, picture.width) as shade:

        def compare(rows: Tensor) -> None:
            nonlocal done
            apart = differences(rows[0].unflatten(0, (upscaler.samples, 3)), k)
            shade(_heat(picture.window(done, 0, apart.shape[1], picture.width), apart[0]))
            sums.add_(apart.double().sum((1, 2)))
            done += apart.shape[1]

        tiles.upscaled(upscaler, parts, out, **sizes, made=made, tell=compare)
    absolute, squared = (sums / (picture.height * picture.width)).tolist()
    return replace(result, doubt=absolute, psnr=-10 * math.log10(squared) if squared else math.inf, heat=heat)


def heat_of(out: Path) -> Path:
    """Where the map of what samples disagree about lies, beside the enlarged picture."""
    return out.with_name(f"{out.stem}-doubt.png")


FULL = 0.25
"""The difference of two samples that is drawn in full red."""


def _heat(rows: Tensor, apart: Tensor) -> Tensor:
    """Rows of the source (1, 3, h, w) in grey, faded, and red over it where samples differ by (h, w)."""
    grey, share = 0.55 + 0.45 * rows.mean(1, keepdim=True), (apart / FULL).clamp(0, 1)
    return (1 - share) * grey + share * torch.tensor([0.84, 0.1, 0.1])[None, :, None, None]


def check_colour(name: str) -> None:
    """Raises UserError for a correction of colours that there is not."""
    if name not in COLOURS:
        raise UserError(f"There is no correction of colours '{name}'. Give one of {', '.join(COLOURS)}.")
