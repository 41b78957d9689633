"""Pictures as a judge sees them: one coordinate frame, 8 bits a channel, PNG, and no side longer than the judge reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.rewards.pixels import resized
from tropism.rewards.protocol import as_png

LONGEST = 1024
"""Pixels of the longest side that is sent; larger pictures are reduced, which `tiles` avoids."""
ROLES = {"A": "lr", "B": "gt", "C": "sr"}
Box = tuple[float, float, float, float]
"""left, top, right, bottom as shares of a picture's width and height."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Picture:
    """One picture of a question. label: A, B or C. sha256: of its decoded pixels (height, width, 3), 8 bits each."""

    label: str
    png: bytes
    width: int
    height: int
    sha256: str

    @property
    def role(self) -> str:
        return ROLES[self.label]


def framed(sr: Tensor, gt: Tensor | None, lr: Tensor | None) -> dict[str, Tensor]:
    """{label: (1, 3, H, W)} float32 in whole 255ths, all of the candidate's size: A is the input, enlarged by bicubic interpolation.

    sr, gt and lr are (3, H, W) or (1, 3, H, W) in [0, 1]. Raises UserError for other shapes, values outside [0, 1] or not finite, a
    reference of another size, and an input of another shape or larger than the candidate.
    """
    candidate = in_8_bits(sr, "candidate")
    size, frame = tuple(candidate.shape[-2:]), dict[str, Tensor]()
    if lr is not None:
        small = in_8_bits(lr, "low-resolution input")
        _same_shape(size, tuple(small.shape[-2:]))
        frame["A"] = _levels(resized(small, size[0], size[1]))
    if gt is not None:
        frame["B"] = in_8_bits(gt, "reference")
        if frame["B"].shape != candidate.shape:
            raise UserError(
                f"The reference is {_told(frame['B'])} and the candidate {_told(candidate)} pixels; they must be of one size. "
                "Crop or resize one of them first."
            )
    return frame | {"C": candidate}


def in_8_bits(image: Tensor, what: str) -> Tensor:
    """(1, 3, H, W) float32 in whole 255ths, as a PNG holds it. Raises UserError for what is no picture in [0, 1]."""
    x = image.detach().float().cpu()
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[:2] != (1, 3) or not x.numel():
        raise UserError(
            f"The {what} has the shape {tuple(image.shape)}; a judge is shown one picture (3, H, W). Give it in RGB, one at a time."
        )
    if not bool(torch.isfinite(x).all()) or float(x.min()) < -0.01 or float(x.max()) > 1.01:
        raise UserError(
            f"The {what} has values from {float(x.min()):.3g} to {float(x.max()):.3g}; pixels are finite and in [0, 1]. "
            "Divide 8-bit values by 255."
        )
    return _levels(x)


def _levels(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def _told(x: Tensor) -> str:
    return f"{x.shape[-1]} x {x.shape[-2]}"


def _same_shape(large: tuple[int, ...], small: tuple[int, ...]) -> None:
    """Raises UserError unless `small` enlarged by one factor is `large`, give or take a pixel of the small one."""
    down, across = large[0] / small[0], large[1] / small[1]
    skewed = abs(large[0] - small[0] * across) > across and abs(large[1] - small[1] * down) > down
    if down < 1 or across < 1 or skewed:
        raise UserError(
            f"The low-resolution input is {small[1]} x {small[0]} and the candidate {large[1]} x {large[0]} pixels, which is no "
            "enlargement of it. Give the input that this candidate was made from."
        )


def boxes(height: int, width: int, tiles: int) -> list[Box]:
    """The whole picture and, for tiles > 1, its tiles x tiles parts, row by row. Raises UserError where a part would be empty."""
    if tiles == 1:
        return [WHOLE]
    if tiles < 1 or min(height, width) < tiles:
        raise UserError(
            f"A picture of {width} x {height} pixels cannot be cut into {tiles} x {tiles} tiles. Use tiles=1."
        )
    rows, columns = [[i * n // tiles / n for i in range(tiles + 1)] for n in (height, width)]
    return [
        WHOLE,
        *((columns[j], rows[i], columns[j + 1], rows[i + 1]) for i in range(tiles) for j in range(tiles)),
    ]


def shown(frame: dict[str, Tensor], box: Box, longest: int = LONGEST) -> tuple[Picture, ...]:
    """The part `box` of every picture of a frame, by label, reduced until its longest side is at most `longest` pixels."""
    return tuple(_picture(label, x, box, longest) for label, x in sorted(frame.items()))


def _picture(label: str, x: Tensor, box: Box, longest: int) -> Picture:
    height, width = x.shape[-2:]
    left, right = round(box[0] * width), round(box[2] * width)
    top, bottom = round(box[1] * height), round(box[3] * height)
    part = x[..., top:bottom, left:right]
    shrink = longest / max(part.shape[-2:])
    if shrink < 1:
        small = [max(1, round(n * shrink)) for n in part.shape[-2:]]
        part = _levels(resized(part, small[0], small[1]))
    pixels = (part[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return Picture(label, as_png(part[0]), pixels.shape[1], pixels.shape[0], digest)


def outward(box: Box, tile: Box) -> Box:
    """A box inside a tile as one of the whole picture."""
    width, height = tile[2] - tile[0], tile[3] - tile[1]
    return (
        tile[0] + box[0] * width,
        tile[1] + box[1] * height,
        tile[0] + box[2] * width,
        tile[1] + box[3] * height,
    )
