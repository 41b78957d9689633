"""Guidance by the reward's gradient: each step is moved along d r(x_0 as expected from x_t) / d x_t. For differentiable rewards.

Gaussian chains move the predicted clean state, token chains weigh the tokens by the first-order change of the reward. The law is
not the tilted one, whatever the scale; `twisted` corrects it by weights.
Source: Diffusion Posterior Sampling, arXiv 2209.14687, algorithm 1; Universal Guidance, arXiv 2302.07121, eq. 5; for tokens Unlocking
Guidance for Discrete State-Space Diffusion, arXiv 2406.01572, eq. 4 (first-order form).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import TERMINAL, Batch, Kernel, Model, Normal, Reward, UserError, is_differentiable, name_of, scored
from tropism.guide.lineages import Guided, Setting, State, begin, setting
from tropism.guide.steps import children, chosen, finished
from tropism.guide.values import expected
from tropism.process.kernels import Categorical


def slope(run: Setting, x_t: Tensor, t: float, rows: Tensor, through: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(d r / d x_t, the network's output, r (R,)) of the reward at the clean state that the denoiser expects, per sample.

    Tokens (R, L) give a gradient (R, L, V + 1) of the relaxed one-hot state, whose clean state is the tokens' probabilities.
    through: differentiate the denoiser as well, as DPS does; else its noise (for tokens its probabilities) counts as constant, so
    that x_0 changes by 1 / alpha_t, a backward pass cheaper.
    """
    tokens, model, cond = not x_t.is_floating_point(), run.model, run.cond[rows]
    with torch.enable_grad():
        x = F.one_hot(x_t, model.process.mask + 1).to(model.dtype) if tokens else x_t.detach()  # type: ignore[attr-defined]
        x = x.requires_grad_()
        with torch.set_grad_enabled(through):
            out = model.predict(x if through else x_t, t, cond, run.guidance)
        x0 = model.x0(x, out, t) if through or tokens else model.x0(x_t, out, t).detach().requires_grad_()
        leaf, scale = (x, 1.0) if through or tokens else (x0, float(model.process.alpha(t)))
        r = scored(run.reward, model.decode(expected(run, x, x0)), run.batch[rows])
        if not r.requires_grad:
            raise UserError(
                f"Reward '{name_of(run.reward)}' has no gradient to guide by. Use a differentiable one, or guide svdd, which needs none."
            )
        loss = -r.sum()  # a clamped pixel lets a loss's gradient through
        (gradient,) = torch.autograd.grad(loss, leaf)
    run.costs.rewards += len(x_t)
    run.costs.rewards_computed += len(x_t)
    gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)  # where the reward is not finite
    return -gradient / scale, out.detach(), r.detach().double()


def looked_at(run: Setting, state: State, through: bool) -> State:
    """The state with its slope, output and value, a chunk at a time."""
    t, rows = run.times[state.step], torch.arange(len(state.x))
    pieces = [rows[at : at + run.max_batch] for at in range(0, len(rows), run.max_batch)]
    gradient, out, v = (
        torch.cat(p) for p in zip(*(slope(run, state.x[r], t, r, through) for r in pieces), strict=True)
    )
    return replace(state, slope=gradient, out=out, value=v.cpu())


def moved(run: Setting, state: State, kernel: Kernel, scale: float) -> Kernel:
    """A kernel whose law leans along the slope: Normal by std^2 scale slope, Categorical by exp(scale (slope_v - slope_mask))."""
    assert state.slope is not None
    if isinstance(kernel, Normal):
        return (
            kernel if kernel.is_deterministic else Normal(kernel.mean + kernel.std**2 * scale * state.slope, kernel.std)
        )
    if isinstance(kernel, Categorical):
        gain = scale * (state.slope - state.slope[..., -1:]).double()
        masked = (state.x == run.model.process.mask)[..., None]  # type: ignore[attr-defined]
        log = kernel.probs.double().log() + torch.where(masked, gain, 0.0)
        return Categorical(log.softmax(-1).to(kernel.probs))
    raise UserError(
        f"A {type(kernel).__name__} kernel cannot be moved along a gradient. Use a Gaussian or a token chain, or guide svdd."
    )


def dps(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    scale: float = 1.0,
    through_denoiser: bool = True,
    max_batch: int = 64,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt, each step moved along the gradient of the reward of the expected clean state.

    scale: strength s. Gaussian: x_0 as predicted moves by s (sigma_t^2 / alpha_t) d r / d x_t (eps by -s sigma_t d r / d x_t); tokens: each
    candidate's probability is multiplied by exp(s (g_token - g_mask)), then normalised. through_denoiser: see `slope`.
    Cost: steps rows forward, as many backward with through_denoiser, and steps + 1 rewards a sample.
    Raises UserError for a reward without a gradient.
    """
    if not is_differentiable(reward):
        raise UserError(
            f"Reward '{name_of(reward)}' is not differentiable, and dps follows its gradient. Use guide svdd, smc or best-of-n."
        )
    run = setting(model, reward, batch, n, steps=steps, guidance=guidance, seed=seed, max_batch=max_batch, fixed=fixed)
    state = begin(run)
    nothing = torch.zeros(len(state.x), dtype=torch.long)
    for i in run.running:
        state = looked_at(run, state, through_denoiser)
        x = children(run, guided_kernel(run, state, scale), i, 1)
        state = chosen(state, x, nothing[:, None], None, nothing)
    return finished(run, state)


@torch.no_grad()
def guided_kernel(run: Setting, state: State, scale: float) -> Kernel:
    """The step of `dps`: the process's own reverse step from the moved clean state, or the moved categorical."""
    t, s = run.times[state.step], run.times[state.step + 1]
    process, x0 = run.model.process, run.model.x0(state.x, state.out, t)  # type: ignore[arg-type]
    if not state.x.is_floating_point():
        return moved(run, state, process.reverse(state.x, x0, t, s), scale)
    assert state.slope is not None and t != TERMINAL
    gain = scale * float(process.sigma(t)) ** 2 / max(float(process.alpha(t)), 1e-6)
    return process.reverse(state.x, x0 + gain * state.slope, t, s)
