"""Honest measures beside the rewards: nothing is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor

from tropism.core import Batch
from tropism.restore.fidelity import psnr, sharpness
from tropism.rewards.jpeg import true_bytes
from tropism.worlds import glyphs, glyphs_posterior, glyphs_reading, shapes, taste

Measure = Callable[[Tensor, Batch], Mapping[str, Tensor]]
"""(images (B, 3, H, W) in [0, 1], batch) -> columns (B,)."""


def measures_for(batch: Batch) -> dict[str, Measure]:
    """True JPEG kilobytes always; PSNR and sharpness where there are references, so that pictures which only become smoother are seen; the
    parser and the hidden taste on the shapes world; what a reader finds on the glyphs world.
    """
    measures: dict[str, Measure] = {"jpeg_kB": lambda images, _: {"jpeg_kB": true_bytes(images) / 1000}}
    if batch.reference is not None:
        measures["restored"] = _restored
    if glyphs_posterior.is_of_world(batch):
        return measures | {"reader": _read}
    if _is_of_shapes(batch.prompts):
        gold = lambda images, _: {"gold_taste": taste.gold(images)}
        return measures | {"parser": lambda images, asked: shapes.accuracy(images, asked.prompts), "gold_taste": gold}
    return measures


def _is_of_shapes(prompts: Sequence[str]) -> bool:
    try:
        return all(shapes.parse_prompt(p) for p in prompts)
    except ValueError:
        return False


def _restored(images: Tensor, batch: Batch) -> dict[str, Tensor]:
    """How near the references, in decibels, and how sharp beside them."""
    given = images.cpu().float(), cast(Tensor, batch.reference).cpu()
    return {"psnr": psnr(*given), "sharpness": sharpness(*given)}


def _read(images: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Shares of a picture's four slots: right, invented (swaps and insertions), lost, unreadable."""
    found = glyphs_reading.counts(images.cpu(), batch)
    names = {"right": "correct", "invented": "hallucination", "lost": "omission", "unreadable": "unreadable"}
    return {name: found[of] / glyphs.SLOTS for name, of in names.items()}
