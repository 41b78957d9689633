"""Low-resolution pictures of the `glyphs` world and all that can be known from them: the exact posterior, and methods built on it.

A low-resolution picture is the mean of every scale x scale box plus Gaussian noise. Prior, states and noise are known, so the probability
of each of a slot's 99 states is too. Two methods mark the floors: `most_probable` is wrong as rarely as any method that always answers,
and `sampled` is the perfect generative model, which must invent something. Less than the first is reached by blurring, or by knowing
the original. The noise is not clamped, so that the posterior is that of Gaussian noise; a third of the low-resolution pixels lies below 0.
Clamped to [0, 1] for a file or a network they know nearly as much: 9.3 % of slots are invented by the first as before, 13.5 % by the
second for 13.1 (4,000 scenes, recipes/glyphs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch, Stream, UserError, generator, noise, uniform
from tropism.worlds.glyphs import (
    BLANK,
    CLASSES,
    DIGITS,
    PLACE,
    PROMPT,
    SHIFTS,
    SIZE,
    SLOT,
    SLOTS,
    STATES,
    bank,
    captions,
    checked,
    classes,
    prior,
    render,
    scenes,
)

SCALE, SIGMA = 4, 0.05


# ---------------------------------------------------------------------------------------------------- what is asked


def low_res(images: Tensor, index: Sequence[int], seed: int, scale: int = SCALE, sigma: float = SIGMA) -> Tensor:
    """(B, 3, 32 / scale, 32 / scale): means of boxes plus noise of standard deviation sigma, the same in all three channels; not clamped.

    images: (B, 3, 32, 32) in [0, 1]. index: the pictures' numbers, which key the noise. Raises UserError for other pictures, for another
    number of them, and unless scale is 2, 4, 8 or 16.
    """
    if scale not in (2, 4, 8, 16):
        raise UserError(
            f"Pictures of {SIZE} px cannot be made {scale} times smaller slot by slot. Use a scale of 2, 4, 8 or 16."
        )
    if len(checked(images)) != len(index):
        raise UserError(
            f"{len(images)} pictures have {len(index)} numbers. Give every picture one: its noise depends on it."
        )
    small = F.avg_pool2d(images, scale)
    return small + sigma * noise(seed, Stream.LOW_RES, PLACE, index, 0, 0, (1, *small.shape[2:]))[:, 0].to(small)


def batch(index: Sequence[int], seed: int, scale: int = SCALE, sigma: float = SIGMA) -> Batch:
    """The scenes of these numbers as a batch: `reference` (B, 3, 32, 32) in [0, 1], `low_res`, and in `meta` what the scene says.

    All prompts are alike. A scene depends on its number and the seed alone, so any batching gives the same pictures.
    """
    states = scenes(index, seed)
    pictures = render(states)
    return Batch(
        prompts=[PROMPT] * len(states),
        reference=pictures,
        low_res=low_res(pictures, index, seed, scale, sigma),
        meta=[{"scene": text} for text in captions(classes(states))],
        index=tuple(index),
    )


def filled(asked: Batch) -> Batch:
    """What a batch asks for whose meta has the "number" and "seed" of every scene: `reference`, and `low_res` clamped as files hold it."""
    meta = asked.meta or []
    seeds = {m["seed"] for m in meta}
    assert len(seeds) == 1, seeds
    made = batch([m["number"] for m in meta], seeds.pop())
    assert made.low_res is not None and made.meta is not None
    known = [one | other for one, other in zip(meta, made.meta, strict=True)]
    return replace(asked, reference=made.reference, low_res=made.low_res.clamp(0, 1), meta=known)


def is_of_world(batch: Batch) -> bool:
    """Whether the batch asks for scenes of this world: it was made by `filled` or `batch`."""
    return batch.reference is not None and bool(batch.meta) and all("scene" in m for m in batch.meta or ())


# ---------------------------------------------------------------------------------------------------- posterior


def posterior(low: Tensor, sigma: float = SIGMA) -> Tensor:
    """(B, 4, 99) float64: the probability of every slot's states given low-resolution pictures (B, 3, h, h), h = 2, 4, 8 or 16.

    sigma: standard deviation of their noise. Slots do not share pixels, so each has a posterior of its own.
    Raises UserError for other sizes and for a sigma that is not above 0.
    """
    if low.ndim != 4 or tuple(low.shape[1:]) not in [(3, h, h) for h in (2, 4, 8, 16)]:
        raise UserError(
            f"A low-resolution picture of the glyphs world is (B, 3, h, h) with h = 2, 4, 8 or 16, not {tuple(low.shape)}. "
            "Make it with glyphs_posterior.low_res."
        )
    if not sigma > 0:
        raise UserError(
            f"The noise of a low-resolution picture is {sigma:g}; it must be above 0. Use that of glyphs_posterior.low_res."
        )
    h = low.shape[-1] // 2
    y = low.detach().double().mean(1).reshape(-1, 2, h, 2, h).transpose(2, 3).reshape(-1, SLOTS, 1, h * h)
    away = ((y - _means(h).to(y.device)) ** 2).sum(3)
    return (prior().to(y.device).log() - away / (2 * sigma**2)).softmax(2)


@cache
def _means(h: int) -> Tensor:
    """(99, h h): the states of a slot without noise, (h, h) pixels large."""
    return F.avg_pool2d(bank()[1].reshape(STATES, 1, SLOT, SLOT), SLOT // h).flatten(1)


def of_classes(chances: Tensor) -> Tensor:
    """(B, 4, 11) probabilities of classes, of those of states (B, 4, 99)."""
    return chances.unflatten(2, (CLASSES, SHIFTS)).sum(3)


def floors(chances: Tensor) -> dict[str, Tensor]:
    """Expected numbers of slots, (B,) float64, that the two methods invent ("map", "sampled") and lose ("map_lost", "sampled_lost").

    chances: `posterior` (B, 4, 99). Means over scenes, divided by 4, are the floors without the luck of the draw.
    """
    p = of_classes(chances)
    share, best = p.max(2)
    answers = best != BLANK
    return {
        "map": ((1 - share) * answers).sum(1),
        "sampled": (p * (1 - p))[..., :BLANK].sum((1, 2)),
        "map_lost": ((1 - share) * ~answers).sum(1),
        "sampled_lost": (p * (1 - p))[..., BLANK].sum(1),
    }


# ---------------------------------------------------------------------------------------------------- methods


def _low(batch: Batch) -> Tensor:
    if batch.low_res is None:
        raise UserError("Nothing can be restored: the batch has no low_res. Make it with glyphs_posterior.batch.")
    return batch.low_res


def _reference(batch: Batch) -> Tensor:
    if batch.reference is None:
        raise UserError("The batch has no reference to show. Make it with glyphs_posterior.batch.")
    return batch.reference


def most_probable(batch: Batch, seed: int = 0, sigma: float = SIGMA) -> Tensor:
    """Every slot's most probable class, at its most probable place: fewest wrong slots of all methods. (B, 3, 32, 32)."""
    p = posterior(_low(batch), sigma).unflatten(2, (CLASSES, SHIFTS))
    best = p.sum(3).argmax(2)
    place = p.gather(2, best[..., None, None].expand(-1, -1, 1, SHIFTS))[:, :, 0].argmax(2)
    return render(SHIFTS * best + place)


def sampled(batch: Batch, seed: int = 0, sigma: float = SIGMA, k: int = 0) -> Tensor:
    """A draw from the posterior, as an ideal generative model makes it; k-th of many. (B, 3, 32, 32)."""
    chances = posterior(_low(batch), sigma)
    u = uniform(seed, Stream.RESAMPLE, PLACE, batch.index, 0, k, (SLOTS, 1))[:, 0].to(chances)
    return render((chances.cumsum(2) <= u).sum(2).clamp(max=STATES - 1))


def bicubic(batch: Batch, seed: int = 0) -> Tensor:
    """The low-resolution picture enlarged: invents nothing and loses every digit. (B, 3, 32, 32) in [0, 1]."""
    return F.interpolate(_low(batch), (SIZE, SIZE), mode="bicubic").clamp(0, 1)


def random_digits(batch: Batch, seed: int = 0) -> Tensor:
    """A digit in every slot, any of the ten: 72 % swaps and 20 % insertions are expected. (B, 3, 32, 32)."""
    u = uniform(seed, Stream.EVAL, PLACE, batch.index, 2, 0, (SLOTS,))[:, 0].double()
    return render((u * DIGITS * SHIFTS).long())


def shuffled(batch: Batch, seed: int = 0) -> Tensor:
    """Another scene's original: 73.6 % hallucination is expected. (B, 3, 32, 32). Raises UserError for a single scene."""
    pictures = _reference(batch)
    if len(pictures) < 2:
        raise UserError("One scene alone cannot be shuffled. Give a batch of two or more.")
    order = torch.from_numpy(generator(seed, Stream.SHUFFLE, PLACE).permutation(len(pictures)))
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return pictures[taken.to(pictures.device)]


def original(batch: Batch, seed: int = 0) -> Tensor:
    """The original itself: nothing invented, nothing lost. (B, 3, 32, 32)."""
    return _reference(batch)


METHODS: dict[str, Callable[[Batch, int], Tensor]] = {
    "original": original,
    "map": most_probable,
    "sampled": sampled,
    "bicubic": bicubic,
    "random": random_digits,
    "shuffled": shuffled,
}
"""(batch, seed) -> pictures (B, 3, 32, 32) in [0, 1], by name."""
