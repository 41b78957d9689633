"""What every guided run shares: n lineages a prompt, their proposals, their values, and what it all costs.

P = prompts x n lineages stand prompt-major. Random numbers are keyed by lineage, so no draw depends on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tropism.core import Batch, Cond, Draw, Model, Reward, Stream, UserError, uniform

APART = 65536
"""Lineage j of the prompt with the index i has the sample index i * APART + j."""


class Value(Protocol):
    """How good a noisy state is: (x_t (R, *S), t, rows (R,), out) -> v (R,). rows: the lineage each state belongs to.

    predicts: whether it reads the network's output `out` (R, ...), which the next step then uses again as its proposal; else out
    is None. At TERMINAL v is the reward of x_t and out is None.
    """

    @property
    def predicts(self) -> bool: ...

    def __call__(self, x_t: Tensor, t: float, rows: Tensor, out: Tensor | None) -> Tensor: ...


ValueOf = Callable[["Setting"], Value]
"""What makes a Value for a run: `values.posterior_mean()` and its like."""


@dataclass
class Costs:
    """Rows through the network (guidance counts two), rewards asked for and rewards computed, children drawn and distinct.

    unscored: rewards computed that were NaN, which counts as -inf.
    """

    network: int = 0
    backward: int = 0
    rewards: int = 0
    rewards_computed: int = 0
    children: int = 0
    distinct: int = 0
    unscored: int = 0


@dataclass(frozen=True)
class Guided:
    """Finished samples (P, ...), prompt-major, with their rewards (P,), final states (P, *S) and costs.

    log_w: (P,) what is left of the importance weights; 0 after a last resampling. log_z: (prompts,) estimates of
    log E exp(r / alpha), NaN where a method has none. ess: effective sample size as a share, one row a step, (steps, prompts).
    ancestors: (P,) the starting lineage each sample comes from.
    """

    samples: Tensor
    rewards: Tensor
    states: Tensor
    batch: Batch
    costs: Costs
    log_w: Tensor
    log_z: Tensor
    ess: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class State:
    """What continues from step to step: states (P, *S) at times[step], and where known their outputs and values.

    log_w: (P,) log importance weights, float64, carried until a resampling uses them. spent: (P,) the log potentials a lineage has
    been given so far. trace: (P,) whatever a method remembers along a lineage. slope: d r(x_0) / d x_t where a method takes it.
    log_z: (prompts,).
    """

    x: Tensor
    step: int
    ancestors: Tensor
    log_w: Tensor
    spent: Tensor
    trace: Tensor
    log_z: Tensor
    out: Tensor | None = None
    value: Tensor | None = None
    slope: Tensor | None = None
    ess: tuple[Tensor, ...] = ()

    def __getitem__(self, rows: Tensor) -> State:
        """The lineages in `rows` (P,) in place of all."""
        at = lambda v: None if v is None else v[rows]
        kept = {
            name: at(getattr(self, name))
            for name in ("x", "ancestors", "log_w", "spent", "trace", "out", "value", "slope")
        }
        return replace(self, **kept)


@dataclass(frozen=True)
class Setting:
    """A guided run's fixed parts. batch, cond, draw: one row a lineage. n: lineages a prompt.

    max_batch: rows the network and the decoder are given at a time. alpha: the tilt's temperature, where a value needs one.
    fixed: (L,) or (P, L) tokens that must stay, -1 elsewhere. seen: rewards of the token sequences that were scored already.
    """

    model: Model
    reward: Reward
    batch: Batch
    cond: Cond
    draw: Draw
    times: tuple[float, ...]
    guidance: float
    n: int
    first: int
    start: Tensor
    costs: Costs
    max_batch: int
    alpha: float
    fixed: Tensor | None = None
    calls: dict[str, int] = field(default_factory=dict)
    seen: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @property
    def running(self) -> range:
        return range(self.first, len(self.times) - 1)

    @cached_property
    def groups(self) -> Tensor:
        """(P,) the prompt of each lineage."""
        return torch.arange(len(self.batch)) // self.n

    def grouped(self, values: Tensor) -> Tensor:
        """(P, ...) -> (prompts, n, ...)."""
        return values.reshape(-1, self.n, *values.shape[1:])

    def uniforms(self, step: int, m: int, k: int = 0) -> Tensor:
        """(P, m) uniforms for choices at a step, float64."""
        found = uniform(self.draw.seed, Stream.RESAMPLE, self.draw.update, self.draw.index, step, k, (m,))[:, 0]
        return found.double().clamp(1e-12, 1 - 1e-12)


def setting(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    alpha: float = 0.0,
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Setting:
    """The fixed parts of a run of n lineages for each of the batch's prompts. Raises UserError for numbers below 1."""
    for name, number in (("n", n), ("max_batch", max_batch)):
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1. Try --{name.replace('_', '-')} 16.")
    if n > APART:
        raise UserError(
            f"n is {n}; at most {APART} samples of one prompt are drawn in a run. Draw several with other seeds."
        )
    rows = torch.arange(len(batch)).repeat_interleave(n).tolist()
    index = tuple(i * APART + j for i in batch.index for j in range(n))
    whole = replace(batch[rows], index=index, rows=(), parent=None)
    draw = Draw(seed, 0, index)
    with torch.no_grad():
        cond = model.encode(whole, draw)
        times = model.process.times(steps, cond.shape)
        start, first = model.start(cond, draw, times)
    if fixed is not None:
        start = keep(fixed, start)
    calls = dict(getattr(model, "calls", {}))
    given = (tuple(times.tolist()), guidance, n, first, start, Costs(), max_batch, alpha, fixed, calls)
    return Setting(model, reward, whole, cond, draw, *given)


def keep(fixed: Tensor, x: Tensor) -> Tensor:
    """Tokens x (P, L) with those of `fixed` (L,) or (P, L) that are not -1 put in. Raises UserError for other shapes and states."""
    if x.is_floating_point() or fixed.shape[-1] != x.shape[-1]:
        raise UserError(
            f"Positions can be held fixed in token sequences of length {x.shape[-1]}, one number a position (-1: free), not "
            f"{tuple(fixed.shape)} for a state of shape {tuple(x.shape[1:])}."
        )
    fixed = fixed.to(x.device)
    return torch.where(fixed >= 0, fixed, x)


def begin(run: Setting, x: Tensor | None = None) -> State:
    """All lineages at the chain's start, or at other states x (P, *S), with equal weights."""
    x = run.start if x is None else x
    zeros = torch.zeros(len(x), dtype=torch.float64)
    prompts = len(x) // run.n
    return State(x, run.first, torch.arange(len(x)), zeros, zeros, zeros, torch.zeros(prompts, dtype=torch.float64))


def check_counts(**counts: int) -> None:
    """Raises UserError for a number of candidates below 1."""
    for name, number in counts.items():
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1. Try --{name.replace('_', '-')} 10.")


def check_alpha(alpha: float, positive: bool = False) -> None:
    """Raises UserError for a temperature that is negative, or 0 where weights are needed."""
    if not alpha >= 0 or (positive and alpha == 0) or alpha == float("inf"):
        least = "above 0 (its weights are exp(r / alpha))" if positive else "at least 0 (0: the best child is taken)"
        raise UserError(f"alpha is {alpha}; it must be finite and {least}. Try --alpha 0.1.")
