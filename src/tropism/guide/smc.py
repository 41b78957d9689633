"""Sequential Monte Carlo: lineages of a prompt compete; those whose value rose are copied, the others die. No extra network call.

Weights are carried until a resampling uses them, and the last one always makes the product exp(r(x_0) / alpha), so the law is right
for any value and any potential as n grows.
Source: Feynman-Kac steering, arXiv 2501.06848, section 4 (potentials; lambda there is 1 / alpha here); DAS, arXiv 2501.05803, section 3.2
(tempering); SVDD, arXiv 2408.08252, algorithm 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import Batch, Model, Reward, UserError
from tropism.guide.lineages import Guided, Setting, State, Value, ValueOf, begin, check_alpha, setting
from tropism.guide.resample import resampled
from tropism.guide.steps import children, chosen, finished, transition, valued
from tropism.guide.values import posterior_mean

Potential = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(v / alpha (P,), what the lineage remembers (P,)) -> (log potential (P,), what it remembers next (P,))."""


def diff(v: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
    """How much the value rose since the last step."""
    return v - trace, v


def highest(v: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value so far."""
    best = torch.maximum(v, trace)
    return best, best


def add(v: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all values so far."""
    return v + trace, v + trace


def now(v: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
    """The value itself."""
    return v, trace


POTENTIALS: dict[str, tuple[Potential, float]] = {
    "diff": (diff, 0.0),
    "max": (highest, -torch.inf),
    "add": (add, 0.0),
    "now": (now, 0.0),
}
"""By name, each with what a lineage remembers before it has a value."""


def weighed(run: Setting, state: State, potential: str, temper: float, last: bool) -> State:
    """The weights after a step: its log potential is added; in the last step, all of the true reward that is not spent yet."""
    assert state.value is not None
    v = temper * state.value / run.alpha
    v = torch.where(torch.isnan(v), -torch.inf, v)
    gain, trace = (v - state.spent, state.trace) if last else POTENTIALS[potential][0](v, state.trace)
    if not last:  # an early -inf says nothing of the end, and spent weight could not be taken back
        gain, trace = torch.where(v.isfinite(), gain, 0.0), torch.where(v.isfinite(), trace, state.trace)
    return replace(state, log_w=state.log_w + gain, spent=state.spent + gain, trace=trace)


def tempering(gamma: float, i: int) -> float:
    """The share of the reward that counts after i steps: (1 + gamma)^i - 1, at most 1; gamma 0 is all of it from the start."""
    return min((1 + gamma) ** i - 1, 1.0) if gamma else 1.0


def smc_first(run: Setting, value: Value, potential: str, gamma: float) -> State:
    """All lineages at their start, weighted by its value."""
    state = begin(run)
    v, out = valued(run, value, state.x[:, None], run.times[run.first])
    blank = torch.full_like(state.trace, POTENTIALS[potential][1])
    state = replace(state, value=v[:, 0], out=None if out is None else out[:, 0], trace=blank)
    return weighed(run, state, potential, tempering(gamma, 0), last=False)


def smc_step(run: Setting, state: State, value: Value, potential: str, gamma: float) -> State:
    """One step of every lineage, and its weight."""
    kernel, state = transition(run, state)
    x = children(run, kernel, state.step, 1)
    v, out = valued(run, value, x, run.times[state.step + 1], state)
    new = chosen(state, x, v, out, torch.zeros(len(x), dtype=torch.long))
    last = new.step == len(run.times) - 1
    return weighed(run, new, potential, 1.0 if last else tempering(gamma, new.step - run.first), last)


def smc(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    alpha: float = 0.1,
    potential: str = "diff",
    gamma: float = 0.0,
    value: ValueOf = posterior_mean(),
    scheme: str = "systematic",
    threshold: float = 0.5,
    every: int = 1,
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt, the prompt's particles, from the law tilted by exp(r / alpha); consistent as n grows.

    alpha: temperature in units of the reward. potential: diff, max, add or now. gamma: tempering, the reward counts by (1 + gamma)^i - 1
    after i steps; 0 is off.
    scheme: multinomial, stratified, systematic, residual or ssp. threshold: resample when the effective sample size falls below that
    share of n (1: always). every: looked at every so many steps, and always at the end. Cost: steps rows and steps + 1 rewards a sample.
    Raises UserError for alpha 0 and unknown names.
    """
    check_alpha(alpha, positive=True)
    if potential not in POTENTIALS:
        raise UserError(f"There is no potential {potential!r}. Known: {', '.join(POTENTIALS)}.")
    if every < 1 or not gamma >= 0:
        raise UserError(f"every is {every} and gamma is {gamma}; they must be at least 1 and 0. Leave them out.")
    run = setting(
        model,
        reward,
        batch,
        n,
        steps=steps,
        guidance=guidance,
        seed=seed,
        alpha=alpha,
        max_batch=max_batch,
        fixed=fixed,
    )
    valuing = value(run)
    state = resampled(run, smc_first(run, valuing, potential, gamma), scheme, threshold)
    for i in run.running:
        state = smc_step(run, state, valuing, potential, gamma)
        last = i == run.running[-1]
        if last or (i + 1 - run.first) % every == 0:
            state = resampled(run, state, scheme, 1.0 if last else threshold)
    return finished(run, state, state.value)
