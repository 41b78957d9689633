"""Nested importance sampling: SVDD's step with the weight it leaves out, so that good families outlive poor ones.

Each lineage carries log w += log mean_m exp(v(child m) / alpha) - v(x_t) / alpha, the share of its children's value that choosing among
siblings cannot see; lineages of a prompt are resampled by it. Unbiased for any value, since the last one is the true reward.
Source: Nested Sequential Monte Carlo Methods, arXiv 1502.02536, algorithm 2; SVDD, arXiv 2408.08252, section 5 (its finite-M bias).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import Batch, Model, Reward
from tropism.guide.lineages import Guided, Setting, State, Value, ValueOf, begin, check_alpha, check_counts, setting
from tropism.guide.resample import resampled
from tropism.guide.steps import children, chosen, finished, starts, transition, valued
from tropism.guide.svdd import pick
from tropism.guide.values import posterior_mean


def mean_exp(v: Tensor, alpha: float) -> Tensor:
    """log mean exp(v / alpha) (P,) over children (P, M)."""
    return torch.logsumexp(v / alpha, 1) - math.log(v.shape[1])


def nested_first(run: Setting, value: Value, m: int) -> State:
    """The chain's start, chosen among m draws of x_T, with their weight."""
    x = starts(run, m)
    v, out = valued(run, value, x, run.times[run.first])
    state = chosen(begin(run), x, v, out, pick(v, run.alpha, run.uniforms(-1, m)))
    return replace(state, step=run.first, log_w=mean_exp(v, run.alpha))


def nested_step(run: Setting, state: State, value: Value, m: int) -> State:
    """One step of every lineage: m children, one of them chosen, and the weight of the family."""
    kernel, state = transition(run, state)
    x = children(run, kernel, state.step, m)
    v, out = valued(run, value, x, run.times[state.step + 1], state)
    assert state.value is not None, "the start is valued"
    log_w = state.log_w + mean_exp(v, run.alpha) - state.value / run.alpha
    new = chosen(state, x, v, out, pick(v, run.alpha, run.uniforms(state.step, x.shape[1])))
    return replace(new, log_w=torch.nan_to_num(log_w, nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf))


def nested(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    m: int = 4,
    alpha: float = 0.1,
    value: ValueOf = posterior_mean(),
    scheme: str = "systematic",
    threshold: float = 0.5,
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt from the law tilted by exp(r / alpha): n lineages with m children a step, weighted and resampled.

    m: children a step. alpha: temperature in units of the reward. scheme: multinomial, stratified, systematic, residual or ssp.
    threshold: resample when the effective sample size falls below that share of n; the last step always is.
    Consistent as n grows, for any m. Cost as `svdd` with its start chosen. Raises UserError as it does, and for alpha 0.
    """
    check_counts(m=m)
    check_alpha(alpha, positive=True)
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
    state = resampled(run, nested_first(run, valuing, m), scheme, threshold)
    for i in run.running:
        state = nested_step(run, state, valuing, m)
        state = resampled(run, state, scheme, 1.0 if i == run.running[-1] else threshold)
    return finished(run, state, state.value)
