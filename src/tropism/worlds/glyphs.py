"""The `glyphs` world: 32 px scenes of four digits or blanks, whose every invented digit can be counted.

A scene has 2 x 2 slots of 16 px. A slot is blank (probability .2) or one of ten digits (.08 each), white on black, DejaVu Sans at 13 px,
moved by -1, 0 or 1 px down and across: 11 classes x 9 shifts = 99 states a slot, all known. So a restored picture is read by comparing
it with every state (`nearest`), and a reading is certain up to a certified distance (`separation`). Reading, outcomes and nuisance are in
glyphs_reading, low-resolution pictures with their exact posterior in glyphs_posterior.

States are numbers 0 to 98, slots in reading order: 9 class + 3 (down + 1) + (across + 1); class 10 is the blank, whose nine are one
picture.
Strokes have a weight in [-1, 1]: 0 is regular, -1 half a pixel thinner, 1 half a pixel thicker, and in between a mixture of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from tropism.core import Stream, UserError, uniform
from tropism.worlds import weights

SIZE, SLOT, SLOTS = 32, 16, 4
DIGITS, BLANK, CLASSES, SHIFTS, STATES = 10, 10, 11, 9, 99
BLANKS = 0.2
"""Share of blank slots; the digits share the rest equally."""
TAU = 0.006
"""Mean squared error above which a slot is unreadable; below a quarter of the smallest distance between two classes, .02439."""
PLACE = 0x676C79706873
"""The "update" of every draw of this world: no run reaches it, so no scene shares its numbers with a run's own noise."""
PROMPT = "digits"
"""The prompt of every scene: a text that told the digits would tell the answer."""


# ---------------------------------------------------------------------------------------------------- scenes


def scenes(index: Sequence[int], seed: int) -> Tensor:
    """States (B, 4) of the scenes of these numbers; each depends on its number and the seed alone."""
    u = uniform(seed, Stream.EVAL, PLACE, index, 0, 0, (SLOTS, 3))[:, 0].double()
    digit = ((u[..., 0] - BLANKS) / (1 - BLANKS) * DIGITS).long().clamp(0, DIGITS - 1)
    kind = torch.where(u[..., 0] < BLANKS, BLANK, digit)
    down, across = (3 * u[..., 1]).long(), (3 * u[..., 2]).long()
    return SHIFTS * kind + 3 * down + across


def classes(states: Tensor) -> Tensor:
    """0 to 9 for digits, 10 (BLANK) for none, of states of any shape."""
    return states // SHIFTS


def prior(dtype: torch.dtype = torch.float64) -> Tensor:
    """(99,) the probability of each state; a blank's share is spread over its nine."""
    share = torch.full((CLASSES,), (1 - BLANKS) / DIGITS, dtype=dtype)
    share[BLANK] = BLANKS
    return share.repeat_interleave(SHIFTS) / SHIFTS


def captions(kinds: Tensor) -> list[str]:
    """ "3 7 / _ 1" for classes (B, 4): two rows, _ for a blank and ? for what could not be read (-1)."""
    sign = "0123456789_?"
    return ["{} {} / {} {}".format(*(sign[k] for k in row)) for row in kinds.tolist()]


# ---------------------------------------------------------------------------------------------------- rendering


@cache
def bank() -> Tensor:
    """(3, 99, 256) float64 in [0, 1]: every state in thin, regular and bold strokes, pixels in reading order."""
    sums = load_file(weights.path("glyphs/templates.safetensors"))["sums"]  # (3, 10, 16, 16), sums of 4 x 4 bytes
    digits = sums.double() / (16 * 255)
    moved = [digits.roll((down, across), (2, 3)) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    every = torch.stack(moved, 2).reshape(3, DIGITS * SHIFTS, SLOT * SLOT)
    return torch.cat([every, every.new_zeros(3, SHIFTS, SLOT * SLOT)], 1)


def mixture(weight: Tensor) -> Tensor:
    """(B, 3): how much of thin, regular and bold a stroke weight (B,) in [-1, 1] is. Raises UserError outside of it."""
    if not bool((weight.abs() <= 1).all()):
        raise UserError(
            f"A stroke weight must lie in [-1, 1]; found {weight.min():g} to {weight.max():g}. Draw it with glyphs_reading.drawn."
        )
    return torch.stack([(-weight).clamp_min(0), 1 - weight.abs(), weight.clamp_min(0)], 1).double()


def render(states: Tensor, weight: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] of states (B, 4), grey in three channels; weight (B,) in [-1, 1], None for regular strokes.

    Raises UserError for another shape, or a state or weight out of range.
    """
    if states.ndim != 2 or states.shape[1] != SLOTS or not bool(((states >= 0) & (states < STATES)).all()):
        raise UserError(
            f"Scenes are states (B, {SLOTS}) in 0..{STATES - 1}, not {tuple(states.shape)}. Draw them with glyphs.scenes."
        )
    if weight is None:
        slots = bank().to(states.device)[1][states]
    else:
        slots = torch.einsum("bk,kbsp->bsp", mixture(weight.to(states.device)), bank().to(states.device)[:, states])
    grid = slots.reshape(-1, 2, 2, SLOT, SLOT).transpose(2, 3).reshape(-1, 1, SIZE, SIZE)
    return grid.to(dtype).clamp(0, 1).repeat(1, 3, 1, 1)


def checked(images: Tensor) -> Tensor:
    """The pictures themselves. Raises UserError unless they are (B, 3, 32, 32) and floating point."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE) or not images.is_floating_point():
        raise UserError(
            f"The glyphs world has pictures (B, 3, {SIZE}, {SIZE}) in [0, 1], not {tuple(images.shape)} of {images.dtype}. "
            "Bring them to that size first, or read pictures of another world with its own reader."
        )
    return images


def slots(images: Tensor) -> Tensor:
    """(B, 4, 256) grey pixels, the mean of the channels, of pictures (B, 3, 32, 32); at least float32. Raises as `checked` does."""
    grey = checked(images).to(torch.promote_types(images.dtype, torch.float32)).mean(1)
    return grey.reshape(-1, 2, SLOT, 2, SLOT).transpose(2, 3).reshape(-1, SLOTS, SLOT * SLOT)


# ---------------------------------------------------------------------------------------------------- distances


def nearest(images: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The state nearest to every slot, (B, 4), and its mean squared error, (B, 4), among strokes of weight (B,); None: regular.

    images: (B, 3, 32, 32). A slot with a pixel that is not finite has the error NaN.
    """
    x = slots(images.detach())
    known = bank().to(x)[1:2] if weight is None else bank().to(x)
    mix = x.new_ones(len(x), 1) if weight is None else mixture(weight.to(x.device)).to(x)
    gram = torch.einsum("ktp,ltp->klt", known, known)
    inside = torch.einsum("bk,bskt->bst", mix, (x @ known.flatten(0, 1).T).unflatten(2, (len(known), STATES)))
    own = torch.einsum("bk,bl,klt->bt", mix, mix, gram)
    error = ((x**2).sum(2, keepdim=True) - 2 * inside + own[:, None]).clamp_min(0) / SLOT**2
    distance, state = error.min(2)
    return state, distance


@cache
def _apart() -> Tensor:
    """(3, 3, pairs) inner products, over pixels and divided by them, of the differences of states of different classes."""
    kinds = classes(torch.arange(STATES))
    first, second = torch.triu_indices(STATES, STATES, 1)
    first, second = first[kinds[first] != kinds[second]], second[kinds[first] != kinds[second]]
    difference = bank()[:, first] - bank()[:, second]
    return torch.einsum("kqp,lqp->klq", difference, difference) / SLOT**2


def separation(weight: Tensor) -> Tensor:
    """(B,) float64: the smallest mean squared error between two classes in strokes of weight (B,).

    The certificate: a slot nearer than a quarter of it to a picture of its digit is read as that digit, by the triangle inequality.
    """
    pieces = [torch.einsum("bk,bl,klq->bq", m, m, _apart()).amin(1) for m in mixture(weight.cpu()).split(256)]
    return torch.cat(pieces) if pieces else weight.double().cpu()


def least_separation() -> float:
    """The smallest `separation` of all weights in [-1, 1]: along each half a pair's is a parabola, whose lowest point is known."""
    apart, lowest = _apart(), []
    for end in (0, 2):
        start, slope = apart[1, 1], apart[end, end] + apart[1, 1] - 2 * apart[1, end]
        drift = apart[1, end] - apart[1, 1]
        at = (-drift / slope.clamp_min(1e-300)).clamp(0, 1)
        lowest.append(start + 2 * at * drift + at**2 * slope)
    return float(torch.stack(lowest).min())


def limits(weight: Tensor) -> Tensor:
    """(B,) float64: the error above which a slot in strokes of weight (B,) is unreadable. TAU, and less where digits are less far apart.

    Never above a quarter of `separation`, so that what is read is read right.
    """
    return TAU * (separation(weight) / separation(torch.zeros(1))).clamp(max=1)
