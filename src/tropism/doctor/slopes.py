"""Slopes by central differences, and whether they confirm those of autograd.

Two traps make honest gradients look wrong: rounding (a step too small for the precision the function computes in) and
kinks (a step too large). So the steps follow the precision that was seen, several are tried, and where the
differences do not agree with each other nothing is said against the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tropism.core import Stream, noise

TOLERANCE = 0.05
"""Relative error above which a gradient is wrong. Faults found in the wild are above 10 %, float32 errs below 1 %."""
STEPS = {torch.float64: (1e-5, 1e-7, 1e-2), torch.float32: (3e-3, 3e-4, 3e-5, 3e-2)}
"""Steps by precision in the order they are tried, for pictures and latents: numbers of about unit size."""
WEIGHT_STEPS = {torch.float64: (1e-3, 1e-5, 1e-1), torch.float32: (1e-2, 1e-1, 1e-3, 0.5)}
"""The same for weights, relative to their size: an adapter's effect is small and nearly linear."""
UPDATE = 2**41
"""The update number of the doctor's noise: training stays below 2**40, where evaluation draws."""


class _Followed(TorchDispatchMode):
    """The floating dtypes of every result that depends on `start`; constants and their tables do not count."""

    def __init__(self, start: Iterable[Tensor]):
        super().__init__()
        self.reached = WeakIdKeyDictionary({t: True for t in start})
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t in self.reached for t in tree_leaves((args, kwargs))):
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.is_floating_point():
                    self.reached[t] = True
                    self.seen.add(t.dtype)
        return out


def precision(function: Callable[[], Any], *start: Tensor) -> torch.dtype:
    """The narrowest floating dtype between `start` and the result of a call, whatever it returns.

    bfloat16 stands for everything below 32 bits. float64 where no operator of torch was seen.
    """
    with torch.no_grad(), _Followed(start) as followed:
        function()
    narrowest = min(followed.seen, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float64)
    return narrowest if torch.finfo(narrowest).bits >= 32 else torch.bfloat16


@dataclass(frozen=True)
class Verdict:
    """What k measured slopes say of k claimed ones. error: relative; sure: the differences agree with each other."""

    error: float
    sure: bool
    claimed: float
    measured: float

    @property
    def right(self) -> bool:
        return self.error <= TOLERANCE

    @property
    def wrong(self) -> bool:
        return self.sure and not self.right


def judge(claimed: Tensor, value: Callable[[float], Tensor], steps: Sequence[float], floor: float = 0.0) -> Verdict:
    """Hold claimed slopes (k,) against central differences of value(h) (k,) at several steps.

    One step that agrees is enough; those that follow a doubtful one may agree better. floor: a slope that is ordinary here;
    a smaller one is not held to its own size.
    """
    found: dict[float, Tensor] = {}
    best, claimed = math.inf, claimed.detach().double().cpu()
    for h in steps:
        with torch.no_grad():
            found[h] = (value(h).double().cpu() - value(-h).double().cpu()) / (2 * h)
        best = min(best, _apart(found[h], claimed, floor))
        if best <= TOLERANCE / 5:
            break
    if best <= TOLERANCE:
        return Verdict(best, True, *_largest(claimed, found[h]))
    pairs = [(_apart(a, b, floor), b) for a, b in pairwise([found[h] for h in sorted(found)])]
    agreement, measured = min(pairs, key=lambda pair: pair[0])
    error = _apart(measured, claimed, floor)
    # an error that a kink or rounding makes differs between two steps by about its own size
    return Verdict(error, agreement <= min(TOLERANCE / 2, error / 4), *_largest(claimed, measured))


def _apart(a: Tensor, b: Tensor, floor: float) -> float:
    scale = max(a.norm().item(), b.norm().item(), floor * math.sqrt(len(a)))
    apart = (a - b).norm().item()
    return apart / scale if apart and math.isfinite(apart) else 0.0 if apart == 0 else math.inf


def _largest(claimed: Tensor, measured: Tensor) -> tuple[float, float]:
    """The pair of slopes that differ most, for the text."""
    at = (claimed - measured).abs().nan_to_num(math.inf).argmax()
    return claimed[at].item(), measured[at].item()


def directions(gradient: Tensor, seed: int) -> Iterator[Tensor]:
    """Three directions (B, C, H, W) of about unit size a number: the gradient's own, a smooth one and white noise.

    Along the gradient its size is tested best; the random ones see what the gradient lacks.
    """
    size = gradient.flatten(1).pow(2).mean(1).sqrt().clamp_min(1e-30).reshape(-1, *[1] * (gradient.ndim - 1))
    yield (gradient / size).clamp(-3, 3)
    yield smooth(gradient, seed, 0)
    yield white(gradient, seed, 1)


def white(like: Tensor, seed: int, k: int) -> Tensor:
    """Keyed standard normals like (B, ...), cut off at 3."""
    drawn = noise(seed, Stream.EVAL, UPDATE, range(len(like)), 0, k, like.shape[1:])[:, 0]
    return drawn.clamp(-3, 3).to(like)


def smooth(like: Tensor, seed: int, k: int) -> Tensor:
    """The same for (B, C, H, W), on a grid of 4 x 4 and between."""
    drawn = noise(seed, Stream.EVAL, UPDATE, range(len(like)), 1, k, (like.shape[1], 4, 4))[:, 0]
    return F.interpolate(drawn.clamp(-3, 3), like.shape[-2:], mode="bilinear").to(like)
