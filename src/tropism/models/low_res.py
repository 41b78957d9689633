"""What all upscalers share: the low-resolution pictures of a batch, checked and enlarged, and the sizes that follow from them.

The picture's size follows the low-resolution picture's; --height and --width, where they are given, must agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch, Draw, Stream, UserError, uniform
from tropism.models.latent import Latent, wide
from tropism.models.text import Text, TextCond


def low_res_of(batch: Batch) -> Tensor:
    """The batch's low-resolution pictures (B, 3, h, w) in [0, 1], as they are.

    Raises UserError for a batch without any, and for another shape, kind or range.
    """
    pictures = batch.low_res
    if pictures is None:
        raise UserError(
            "This model enlarges pictures, and the batch has none. Give them: Batch(prompts, low_res=pictures), a tensor "
            f"({len(batch)}, 3, height, width) in [0, 1]."
        )
    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) != len(batch):
        raise UserError(
            f"low_res has the shape {tuple(pictures.shape)}; it must be ({len(batch)}, 3, height, width), one RGB picture a "
            "prompt. For a grey picture repeat its channel: low_res.expand(-1, 3, -1, -1)."
        )
    if not pictures.is_floating_point():
        raise UserError(f"low_res holds {pictures.dtype}; it must be floats in [0, 1]. Divide bytes: low_res / 255.")
    low, high = pictures.min().item(), pictures.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # a NaN is neither
        raise UserError(f"low_res reaches from {low:g} to {high:g}; it must lie in [0, 1]. Divide bytes by 255.")
    return pictures


def enlarged(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (B, C, h, w) in [0, 1] -> (B, C, height, width) in [0, 1] by PIL's bicubic, clamped as PIL does. Differentiable.

    PIL's kernel has a = -1/2; torch's own without antialias has -3/4, which is another picture. Across first, then down, clamped after
    each, since that is what PIL's pictures are; nothing is rounded.
    """
    for size in ((pictures.shape[-2], width), (height, width)):
        pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
    return pictures


class LowRes(Latent):
    """An upscaler: its condition is a low-resolution picture, with or without a text. `given` is what a family adds."""

    scale: float
    """Pixels of the picture a low-resolution pixel's side."""
    asked: tuple[int | None, int | None] = (None, None)

    def given(self, low_res: Tensor, draw: Draw) -> Text:
        """What the network reads of low_res (B, 3, h, w) in [0, 1], each (B, ...), by name."""
        raise NotImplementedError

    def words(self, batch: Batch) -> tuple[Text, Text]:
        """The embedded prompts and negative prompts."""
        text = super().encode(batch)
        return text.positive, text.negative

    def encode(self, batch: Batch, draw: Draw | None = None) -> TextCond:
        """Prompts and low-resolution pictures; `shape` follows the pictures' size. Without a draw, seed 0's noise.

        Raises UserError for a batch without low_res, and for sizes that the model cannot make.
        """
        low_res = low_res_of(batch)
        shape = self.shape_for(low_res)
        positive, negative = self.words(batch)
        low_res = low_res.to(self.device, wide(self.dtype))
        given = self.given(low_res, draw or Draw(0, 0, batch.index))
        return TextCond({**positive, **given}, {**negative, **given}, shape)

    def shape_for(self, low_res: Tensor) -> tuple[int, int, int]:
        """One sample's latent shape for low_res (B, 3, h, w). Raises UserError for a size that cannot be made."""
        low, factor = tuple(low_res.shape[-2:]), self._factor()
        pixels, step = [round(n * self.scale) for n in low], factor * self.patch
        if any(n % step or n < step for n in pixels):
            fit = [max(1, round(n / step)) * step / self.scale for n in pixels]
            near = "x".join(f"{n:g}" for n in fit)
            raise UserError(
                f"low_res is {low[0]}x{low[1]}, which makes {pixels[0]}x{pixels[1]} pixels; this model makes multiples of "
                f"{step} (height x width). Crop or resize low_res to {near}."
            )
        if any(wanted not in (None, n) for wanted, n in zip(self.asked, pixels, strict=True)):
            raise UserError(
                f"low_res is {low[0]}x{low[1]}, which makes {pixels[0]}x{pixels[1]} pixels, but {self.asked[0]}x{self.asked[1]} "
                "was asked for. Leave --height and --width out: the size follows low_res."
            )
        return self.shape[0], pixels[0] // factor, pixels[1] // factor

    def trial(self, prompts: Sequence[str]) -> Batch:
        """These prompts with made-up low-resolution pictures of the model's own size."""
        sides = [max(1, round(n * self._factor() / self.scale)) for n in self.shape[-2:]]
        batch = Batch(list(prompts))
        pictures = uniform(0, Stream.CROP, 0, batch.index, 0, 1, (3, *sides))[:, 0]
        return replace(batch, low_res=pictures)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        self.asked = height, width
        return super()._latent_shape(height, width)

    def reloaded(self, folder: str | Path) -> Self:
        other = super().reloaded(folder)
        other.asked = self.asked
        return other


def check_setting(settings: Mapping[str, float], name: str, low: float, high: float, why: str) -> None:
    """Raises UserError for a setting outside [low, high]."""
    value = settings[name]
    if not low <= value <= high:
        near = min(max(value, low), high)
        raise UserError(
            f"{name} is {value:g}; it must lie in [{low:g}, {high:g}] ({why}). Pass settings={{{name!r}: {near:g}}}."
        )


def symmetric(pictures: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], as the networks read pictures."""
    return 2 * pictures - 1
