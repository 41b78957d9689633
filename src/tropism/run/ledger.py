"""What a run has spent, and when a budget is used up.

Evaluations are not counted: they are what the user looks with, not what a method needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from tropism.core import UserError
from tropism.run.optimiser import is_distributed

COUNTED = {
    "reward_queries": ("reward",),
    "reward_gradients": ("reward_gradient",),
    "forwards": ("network", "forward", "recompute"),
    "backwards": ("backward",),
    "decodes": ("decode",),
}
"""Axis -> the calls that an algorithm reports under it, in samples; under guidance a sample is two rows of the network."""
AXES = {
    "reward_queries": "reward queries",
    "reward_gradients": "reward gradients",
    "forwards": "network rows forward",
    "backwards": "network rows backward",
    "decodes": "pictures decoded",
    "seconds": "seconds",
    "cpu_seconds": "processor seconds",
    "priced": "priced seconds",
}
"""Axis -> what it is called. seconds: of a clock, while updates ran; cpu_seconds: of the process's threads, whatever else runs beside.

priced: the counts times prices that were measured once, so that equal seconds can be compared on a machine that is not idle.
"""


def cost(
    calls: Mapping[str, int], seconds: float, cpu_seconds: float, prices: Mapping[str, float] | None = None
) -> dict[str, float]:
    """One update's cost on every axis, over all processes: counts and processor seconds add up, of seconds the longest counts.

    prices: {axis of COUNTED: seconds a unit}, for the axis "priced", which is 0 without.
    """
    counts = [float(sum(calls.get(name, 0) for name in names)) for names in COUNTED.values()]
    if is_distributed():
        place = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = torch.tensor([*counts, cpu_seconds], dtype=torch.float64, device=place)
        longest = torch.tensor([seconds], dtype=torch.float64, device=place)
        dist.all_reduce(sums)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        *counts, cpu_seconds = sums.tolist()
        seconds = longest.item()
    counted = dict(zip(COUNTED, counts, strict=True))
    priced = sum(price * counted[axis] for axis, price in (prices or {}).items())
    return counted | {"seconds": seconds, "cpu_seconds": cpu_seconds, "priced": priced}


def added(total: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {axis: total.get(axis, 0.0) + more[axis] for axis in AXES}


def share(spent: Mapping[str, float], budget: Mapping[str, float] | None) -> float:
    """The largest share of its limit that any axis has used; 0 without a budget."""
    return max((spent.get(axis, 0.0) / limit for axis, limit in (budget or {}).items()), default=0.0)


def budget_of(texts: Sequence[str], priced: bool = False) -> dict[str, float]:
    """{axis: limit} of "AXIS=LIMIT" texts. priced: whether there are prices.

    Raises UserError for an unknown axis, or a limit that is not above 0.
    """
    known, found = [axis for axis in AXES if priced or axis != "priced"], {}
    for text in texts:
        axis, _, limit = text.partition("=")
        try:
            found[axis] = float(limit)
        except ValueError:
            found[axis] = math.nan
        if axis not in known or not (found[axis] > 0 and math.isfinite(found[axis])):
            raise UserError(
                f"The budget is {text!r}; it must be AXIS=LIMIT, the limit above 0 and the axis one of {', '.join(known)}. "
                "Try --budget seconds=600."
            )
    return found
