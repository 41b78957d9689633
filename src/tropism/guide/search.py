"""Two searches around SVDD's step: choosing after blocks of steps, and going back to noise to choose again.

Source: CoDe, arXiv 2502.00968, algorithm 1 (blocks); Reward-Guided Iterative Refinement, arXiv 2502.14944, algorithm 1 (loops).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import Batch, Model, Reward, Stream, UserError
from tropism.guide.lineages import Guided, Setting, State, ValueOf, begin, check_alpha, check_counts, keep, setting
from tropism.guide.steps import children, chosen, finished, in_chunks, transition, valued
from tropism.guide.svdd import first, pick, step
from tropism.guide.values import posterior_mean


@torch.no_grad()
def onwards(run: Setting, x: Tensor, i: int) -> Tensor:
    """Children x (P, M, *S) at step i, each one step of the plain chain further."""
    count, m = x.shape[:2]
    flat, rows = x.flatten(0, 1), torch.arange(count).repeat_interleave(m)
    t, s = run.times[i], run.times[i + 1]
    out = in_chunks(run, lambda r: run.model.predict(flat[r], t, run.cond[rows[r]], run.guidance), len(flat))
    kernel, _ = run.model.kernel(flat, t, s, run.cond[rows], run.guidance, out)
    if kernel.is_deterministic:
        return kernel.sample(flat).reshape(x.shape)
    noise = run.draw.many(Stream.TRANSITION, i, kernel.noise_shape, m).flatten(0, 1)
    return kernel.sample(noise).reshape(x.shape)


def blockwise(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    m: int = 10,
    block: int = 5,
    alpha: float = 0.0,
    value: ValueOf = posterior_mean(),
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt: m copies of every lineage run `block` steps on their own, then one of them is chosen (CoDe).

    m: copies of a lineage. block: steps between choices. alpha: temperature in units of the reward, 0 takes the best copy.
    Block 1 is SVDD without the choice of a start, block = steps is best-of-n. Cost: as SVDD's rows, rewards block times fewer.
    Raises UserError for counts below 1 and a negative alpha.
    """
    check_counts(m=m, block=block)
    check_alpha(alpha)
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
    valuing, state = value(run), begin(run)
    while state.step < run.running.stop:
        kernel, state = transition(run, state)
        x, end = children(run, kernel, state.step, m), min(state.step + block, run.running.stop)
        for i in range(state.step + 1, end):
            x = onwards(run, x, i)
        v, out = valued(run, valuing, x, run.times[end])
        best = pick(v, alpha, run.uniforms(state.step, x.shape[1]))
        state = replace(chosen(state, x, v, out, best), step=end)
    return finished(run, state, state.value)


def refine(
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
    loops: int = 3,
    back: float = 0.5,
    value: ValueOf = posterior_mean(),
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt by SVDD, then `loops` times noised back to the share `back` of the chain and decoded again.

    m: children a step. alpha: temperature, 0 takes the best child. loops: how often. back: share of the chain to noise back to.
    A loop's result is kept where its reward is not lower, so that rewards never fall. Cost: SVDD's times (1 + loops back).
    Raises UserError for counts below 1, a negative alpha, and a share outside (0, 1].
    """
    check_counts(m=m)
    check_alpha(alpha)
    if not 0 < back <= 1 or loops < 0:
        raise UserError(
            f"back is {back} and loops is {loops}; they must lie in (0, 1] and be at least 0. Try --back 0.5."
        )
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
    state = first(run, valuing, m)
    for _ in run.running:
        state = step(run, state, valuing, m)
    for loop in range(1, loops + 1):
        again = replace(run, draw=replace(run.draw, update=2**20 * loop))
        state = better(state, _once_more(again, state, valuing, m, back))
    return finished(run, state, state.value)


def _once_more(run: Setting, state: State, valuing, m: int, back: float) -> State:
    at = run.running.stop - max(1, round(back * len(run.running)))
    noise = run.draw(Stream.RENOISE, at, state.x.shape[1:])
    x = run.model.process.forward(state.x, run.times[at], noise.to(state.x.device))
    x = x if run.fixed is None else keep(run.fixed, x)
    new = replace(begin(run, x.to(state.x.dtype)), step=at, ancestors=state.ancestors)
    for _ in range(at, run.running.stop):
        new = step(run, new, valuing, m)
    return new


def better(old: State, new: State) -> State:
    """Row by row the one of higher value; the new one where they are equal."""
    assert old.value is not None and new.value is not None
    rises = new.value >= old.value
    pick_rows = lambda a, b: torch.where(rises.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return replace(new, x=pick_rows(new.x, old.x), value=pick_rows(new.value, old.value))
