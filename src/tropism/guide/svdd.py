"""SVDD: every lineage draws M children a step and goes on with one of them, the better the likelier. No derivative, no training.

With exact values the law tends to p(x) exp(r(x) / alpha) / Z as M grows; for a finite M it is biased, and the bias adds up over the
steps: `nested` carries the weights that take it away.
Source: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding, arXiv 2408.08252, algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import Batch, Model, Reward, UserError
from tropism.guide.lineages import Guided, Setting, State, Value, ValueOf, begin, check_alpha, check_counts, setting
from tropism.guide.steps import children, chosen, finished, starts, transition, valued
from tropism.guide.values import posterior_mean


def pick(v: Tensor, alpha: float, u: Tensor) -> Tensor:
    """One child (P,) of each row of values (P, M) with probability proportional to exp(v / alpha), by Gumbel's maxima of u (P, M).

    alpha 0 takes the best, ties at random. Rows without a finite value choose uniformly.
    """
    gumbel = -(-u.log()).log()
    top = v.amax(1, keepdim=True)
    v = torch.where(torch.isneginf(top), 0.0, v - torch.where(torch.isfinite(top), top, 0.0))
    if alpha == 0:
        return torch.where(v == v.amax(1, keepdim=True), gumbel, -torch.inf).argmax(1)
    return (v / alpha + gumbel).argmax(1)


def first(run: Setting, value: Value, m: int) -> State:
    """The chain's start, chosen among m draws of x_T."""
    if m == 1:
        return begin(run)
    x = starts(run, m)
    v, out = valued(run, value, x, run.times[run.first])
    state = chosen(begin(run), x, v, out, pick(v, run.alpha, run.uniforms(-1, m)))
    return replace(state, step=run.first)


def step(run: Setting, state: State, value: Value, m: int) -> State:
    """One step of every lineage: m children, one of them chosen."""
    kernel, state = transition(run, state)
    x = children(run, kernel, state.step, m)
    v, out = valued(run, value, x, run.times[state.step + 1], state)
    return chosen(state, x, v, out, pick(v, run.alpha, run.uniforms(state.step, x.shape[1])))


def svdd(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    m: int = 10,
    alpha: float = 0.0,
    value: ValueOf = posterior_mean(),
    select_start: bool = True,
    refresh: float = 0.0,
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt by soft value-based decoding with m children a step.

    m: children a step. alpha: temperature in units of the reward, 0 takes the best child. select_start: choose among m draws of x_T too
    (the
    target needs it, the paper's code does not do it). refresh: share of each prompt's lineages, the worst, that are replaced after
    every step by draws of all with probability proportional to exp(v / alpha) (the paper's SVDD-R; it uses .03 to .05).
    Cost, where no two states are equal: rows 1 + (steps - 1) m a sample, m more with select_start less the 1; rewards as many plus m.
    Raises UserError for counts below 1, a negative alpha and deterministic samplers.
    """
    check_counts(m=m)
    check_alpha(alpha, positive=refresh > 0)
    if not 0 <= refresh < 1:
        raise UserError(f"refresh is {refresh}; it is a share of the lineages in [0, 1). Try --refresh 0.05.")
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
    state = first(run, valuing, m if select_start else 1)
    for _ in run.running:
        state = step(run, state, valuing, m)
        if refresh:
            state = refreshed(run, state, refresh)
    return finished(run, state, state.value)


def refreshed(run: Setting, state: State, share: float) -> State:
    """The worst lineages of every prompt replaced by draws of all, tilted by exp(v / alpha). Source: arXiv 2408.08252, algorithm 2."""
    assert state.value is not None, "a step values its children"
    v, count = run.grouped(state.value), round(share * run.n)
    rows = torch.arange(len(state.x)).reshape(-1, run.n)
    for g, u in enumerate(run.grouped(run.uniforms(state.step, run.n, k=2))):
        worst = v[g].argsort()[:count]
        rows[g, worst] = rows[g][pick(v[g].expand(count, -1), run.alpha, u[:count])]
    return state[rows.flatten()]
