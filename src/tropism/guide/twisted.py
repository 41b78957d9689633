"""Twisted sequential Monte Carlo: lineages move along the reward's gradient, and weights take back what that does to the law.

log w += log p(x_s | x_t) - log q(x_s | x_t) + lambda_s v_s / alpha - lambda_t v_t / alpha, with q the moved kernel and its own normaliser.
Source: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (TDS), arXiv 2306.17775, algorithm 1; DAS,
arXiv 2501.05803, algorithm 1 (tempering lambda).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import Batch, Model, Reward
from tropism.guide.dps import looked_at, moved
from tropism.guide.lineages import Guided, Setting, State, begin, check_alpha, setting
from tropism.guide.resample import resampled
from tropism.guide.smc import tempering, weighed
from tropism.guide.steps import children, finished, transition
from tropism.guide.values import at_the_end


def twisted_step(run: Setting, state: State, gamma: float, through: bool) -> State:
    """One step of every lineage: a draw of the moved kernel, weighted by what the kernel itself would have done."""
    kernel, state = transition(run, state)
    leaning = moved(run, state, kernel, tempering(gamma, state.step - run.first) / run.alpha)
    x = children(run, leaning, state.step, 1)[:, 0]
    new = replace(state, x=x, step=state.step + 1, out=None, value=None, slope=None)
    if not kernel.is_deterministic:
        new = replace(new, log_w=new.log_w + kernel.log_ratio(leaning, x))
    if new.step < len(run.times) - 1:
        new = looked_at(run, new, through)
        return weighed(run, new, "diff", tempering(gamma, new.step - run.first), last=False)
    with torch.no_grad():
        new = replace(new, value=at_the_end(run, x, torch.arange(len(x))))
    return weighed(run, new, "diff", 1.0, last=True)


def twisted(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    alpha: float = 0.1,
    gamma: float = 0.0,
    through_denoiser: bool = True,
    scheme: str = "ssp",
    threshold: float = 0.5,
    max_batch: int = 64,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt, the prompt's particles, from the law tilted by exp(r / alpha); consistent as n grows.

    alpha: temperature in units of the reward. gamma: tempering as in smc (DAS uses .008 for 100 steps), which keeps early and unsure
    values from deciding. scheme: multinomial, stratified, systematic, residual or ssp. threshold: as in smc. Cost: steps rows forward
    and backward, steps + 1 rewards a sample. Raises UserError for alpha 0 and rewards without
    a gradient.
    """
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
    state = weighed(run, looked_at(run, begin(run), through_denoiser), "diff", tempering(gamma, 0), last=False)
    state = resampled(run, state, scheme, threshold)
    for i in run.running:
        state = twisted_step(run, state, gamma, through_denoiser)
        state = resampled(run, state, scheme, 1.0 if i == run.running[-1] else threshold)
    return finished(run, state, state.value)
