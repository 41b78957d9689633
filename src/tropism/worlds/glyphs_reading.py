"""Reads pictures of the `glyphs` world, says what became of every slot, and spoils pictures without touching what they say.

Hallucination is what was invented: another digit (swap) or one where none was (insertion). Blur is what was lost: a digit gone (omission)
or past reading (unreadable). The two are always given together, so that nobody gains by blurring.

Nuisance is what measures of pixels see and a reader of digits does not: brightness and contrast, a shift of the whole picture, the
weight of the strokes. A reader that is told the nuisance reads on with a certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

from tropism.core import Batch, Stream, UserError, uniform
from tropism.noise import as_index
from tropism.worlds.glyphs import (
    BLANK,
    PLACE,
    SIZE,
    SLOTS,
    TAU,
    captions,
    checked,
    classes,
    limits,
    nearest,
    render,
    separation,
)

UNREAD = -1
"""The class of a slot that could not be read."""


# ---------------------------------------------------------------------------------------------------- nuisance


@dataclass(frozen=True)
class Nuisance:
    """What happens to each of B pictures: strokes of `weight` in [-1, 1], a `shift` (down, right) in pixels, then gain x + offset.

    gain (B,) in [.7, 1], offset (B,) in [0, 1 - gain], shift (B, 2) whole numbers in -2..2, weight (B,).
    """

    gain: Tensor
    offset: Tensor
    shift: Tensor
    weight: Tensor

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Nuisance:
        return Nuisance(*(getattr(self, f.name)[as_index(rows)] for f in fields(self)))


LEAST_GAIN, MOST_SHIFT = 0.7, 2


def drawn(index: Sequence[int], seed: int, tone: float = 1.0, shift: float = 1.0, weight: float = 1.0) -> Nuisance:
    """The nuisance of the pictures of these numbers, each a function of its number and the seed.

    tone, shift and weight in [0, 1] are strengths, as shares of the largest gain and offset, shift and change of stroke; 0 leaves it alone.
    Raises UserError for another strength.
    """
    for name, strength in (("tone", tone), ("shift", shift), ("weight", weight)):
        if not 0 <= strength <= 1:
            raise UserError(
                f"The strength of the nuisance '{name}' is {strength:g}; it must lie in [0, 1]. Try {name}=1."
            )
    u = uniform(seed, Stream.EVAL, PLACE, index, 1, 0, (5,))[:, 0].double()
    gain = 1 - tone * (1 - LEAST_GAIN) * u[:, 0]
    most = round(shift * MOST_SHIFT)
    return Nuisance(
        gain=gain,
        offset=(1 - gain) * u[:, 1],
        shift=(u[:, 2:4] * (2 * most + 1)).long() - most,
        weight=weight * (2 * u[:, 4] - 1),
    )


def spoil(images: Tensor, nuisance: Nuisance) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] under a nuisance, in [0, 1] again. Raises UserError for another number of pictures.

    Any picture may be given, a network's too: the nearest scene is drawn in the other weight, and what the picture had beside that scene
    is put on it, less where thinner digits are nearer each other (see `glyphs.limits`). So every slot that reads, reads the same.
    A shift wraps around; within 2 px of its border a clean picture is black.
    """
    gain, offset = _tone(images, nuisance)
    states, _ = nearest(images)
    before, after = render(states, dtype=images.dtype), render(states, nuisance.weight, images.dtype)
    kept = (limits(nuisance.weight) / TAU).sqrt().to(images)[:, None, None, None]
    return gain * _moved((after + kept * (images - before)).clamp(0, 1), nuisance.shift) + offset


def undone(images: Tensor, nuisance: Nuisance) -> Tensor:
    """Pictures with their tone and shift taken back; the weight of their strokes stays."""
    gain, offset = _tone(images, nuisance)
    return _moved((images - offset) / gain, -nuisance.shift)


def _tone(images: Tensor, nuisance: Nuisance) -> tuple[Tensor, Tensor]:
    """Gain and offset, (B, 1, 1, 1) each."""
    if len(checked(images)) != len(nuisance.gain):
        raise UserError(
            f"There is nuisance for {len(nuisance.gain)} pictures, and there are {len(images)}. Give every picture its own: nuisance[rows]."
        )
    gain, offset = (v.to(images)[:, None, None, None] for v in (nuisance.gain, nuisance.offset))
    return gain, offset


def _moved(images: Tensor, shift: Tensor) -> Tensor:
    """Every picture rolled by its (down, right)."""
    b, at = torch.arange(len(images)), torch.arange(SIZE)
    rows, columns = ((at - shift.cpu()[:, i, None]) % SIZE for i in (0, 1))
    return images[b[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def radius(nuisance: Nuisance) -> Tensor:
    """(B,) float64, the certificate: a spoilt slot with less mean squared error than this never reads as another digit.

    Error is that to the clean scene, spoilt. A quarter of the smallest one between two classes in those strokes, shrunk by the gain's
    square; shift and offset cost nothing.
    """
    return nuisance.gain.double().cpu() ** 2 * separation(nuisance.weight) / 4


# ---------------------------------------------------------------------------------------------------- reading


def read(images: Tensor, nuisance: Nuisance | None = None) -> Tensor:
    """Classes (B, 4) of pictures (B, 3, 32, 32): 0 to 9, BLANK, or UNREAD where no state is near enough.

    nuisance: what the pictures have been through; their tone and shift are undone, and their strokes compared with the same weight.
    """
    if nuisance is None:
        states, error = nearest(images)
        return torch.where(error <= TAU, classes(states), UNREAD)
    wide = undone(images.to(torch.promote_types(images.dtype, torch.float32)), nuisance)
    states, error = nearest(wide, nuisance.weight)
    return torch.where(error <= limits(nuisance.weight).to(error)[:, None], classes(states), UNREAD)


class Outcome(IntEnum):
    """What became of a slot."""

    CORRECT = 0
    SWAP = 1
    INSERTION = 2
    OMISSION = 3
    UNREADABLE = 4


def outcomes(found: Tensor, wanted: Tensor) -> Tensor:
    """The Outcome (B, 4) of every slot: classes found, classes wanted."""
    wrong = torch.where(wanted == BLANK, Outcome.INSERTION, torch.where(found == BLANK, Outcome.OMISSION, Outcome.SWAP))
    right = torch.where(found == wanted, Outcome.CORRECT, wrong)
    return torch.where(found == UNREAD, Outcome.UNREADABLE, right)


def counts(images: Tensor, batch: Batch, nuisance: Nuisance | None = None) -> dict[str, Tensor]:
    """How many of each picture's four slots came out how: {"correct", "swap", ..., "hallucination", "blur"} -> (B,) float64.

    batch.reference (B, 3, 32, 32) holds the clean originals. Raises UserError where there is none, or it cannot be read.
    """
    if batch.reference is None:
        raise UserError(
            "Invented digits cannot be counted without the originals: the batch has no reference. Make it with glyphs_posterior.batch."
        )
    wanted = read(batch.reference)
    if bool((wanted == UNREAD).any()):
        row = int((wanted == UNREAD).any(1).nonzero()[0])
        raise UserError(
            f"The reference of sample {row} reads {captions(wanted)[row]!r}: it is no clean scene. Make it with glyphs_posterior.batch."
        )
    came = outcomes(read(images, nuisance).to(wanted.device), wanted)
    found = {o.name.lower(): (came == o).sum(1).double() for o in Outcome}
    return {
        **found,
        "hallucination": found["swap"] + found["insertion"],
        "blur": found["omission"] + found["unreadable"],
    }


def rates(counted: dict[str, Tensor]) -> dict[str, float]:
    """Shares of all slots, of what `counts` returned."""
    return {name: float(values.mean()) / SLOTS for name, values in counted.items()}
