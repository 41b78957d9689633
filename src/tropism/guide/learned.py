"""Learned values: a small network is told how good noisy states turned out, and judges the candidates without the denoiser (SVDD-MC).

Roll-outs of the plain chain give pairs of a state on the way and the reward at the end. Three losses, three values:
"mean" is the squared error, whose best fit is E[r | x_t]; "soft" is the squared error of exp(r / alpha), as the paper writes it; "linex"
is exp((r - f) / alpha) - (r - f) / alpha - 1. The last two are best at alpha log E[exp(r / alpha) | x_t], the value that SVDD needs; Linex
is the calmer one for small alpha.
Source: SVDD, arXiv 2408.08252, algorithm 3; the Linex loss: Bayesian estimation and prediction using asymmetric loss functions, Zellner
(1986).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tropism.core import TERMINAL, Batch, Model, Reward, UserError, generator
from tropism.core import Stream as Streams
from tropism.guide.lineages import Setting, ValueOf, begin, keep, setting
from tropism.guide.steps import in_chunks, plain_step, rewarded
from tropism.guide.values import at_the_end

LOSSES = ("mean", "soft", "linex")
FAR = 10.0
"""Linex: (r - f) / alpha is held at most so large, where the exponential would overflow."""


def regression(f: Tensor, r: Tensor, alpha: float, loss: str, top: float = 0.0) -> Tensor:
    """The loss (R,) of predictions f (R,) for rewards r (R,). top: the largest reward seen, subtracted before the exponential."""
    if loss == "mean":
        return (f - r) ** 2
    if loss == "soft":
        return (((r - top) / alpha).exp() - ((f - top) / alpha).exp()) ** 2
    gap = (r - f) / alpha
    held = gap.clamp_max(FAR)
    return held.exp() * (1 + (gap - held)) - gap - 1  # beyond FAR it goes on as its tangent


@dataclass(frozen=True)
class RollOuts:
    """States (S, steps, *shape) of S plain chains at `times` (steps,), and their rewards (S,)."""

    states: Tensor
    times: tuple[float, ...]
    rewards: Tensor


@torch.no_grad()
def roll_outs(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> RollOuts:
    """n plain chains of each prompt with every state on the way. Cost, where no two states are equal: steps rows and one reward each."""
    run = setting(model, reward, batch, n, steps=steps, guidance=guidance, seed=seed, max_batch=max_batch, fixed=fixed)
    run = replace(run, draw=replace(run.draw, update=2**30))  # none of the noise of guided runs
    start, _ = model.start(run.cond, run.draw, torch.tensor(run.times))
    state, seen = begin(run, start if fixed is None else keep(fixed, start)), []
    for _ in run.running:
        seen.append(state.x.cpu())
        state = plain_step(run, state)
    every = torch.arange(len(state.x))
    clean = run.model.process.complete(state.x, state.x)
    found = in_chunks(run, lambda rows: rewarded(run, run.model.decode(clean[rows]), every[rows]), len(every))
    return RollOuts(torch.stack(seen, 1), tuple(run.times[i] for i in run.running), found)


def standardised(data: RollOuts, prompts: int) -> tuple[RollOuts, float, float]:
    """(the roll-outs with rewards of mean 0 and deviation 1, the mean, the deviation), for a network that is fitted in its own units.

    prompts: the roll-outs are of so many, one after the other. With 4 or more of each, every prompt's own mean is taken off: a network that
    is not told the prompt cannot know it, and children of one prompt are compared with each other only. NaN and -inf count as the lowest.
    Raises UserError where nothing can be learnt: infinite rewards, or all alike.
    """
    finite = data.rewards[data.rewards.isfinite()]
    if not len(finite) or (data.rewards == torch.inf).any():
        raise UserError(
            "The rewards of the roll-outs are infinite or NaN, so no value can be learnt. Make the reward finite."
        )
    low = finite.min().item()
    rewards = torch.nan_to_num(data.rewards, nan=low, neginf=low)
    each = rewards.reshape(prompts, -1)
    mean = each.mean(1, keepdim=True) if each.shape[1] >= 4 else rewards.mean()
    gaps = (each - mean).flatten()
    scale = gaps.std().item()
    if not scale > 0:
        raise UserError(
            f"All {len(rewards)} roll-outs have the same reward, so no value can be learnt. Draw more, or guide without a learned value."
        )
    return replace(data, rewards=gaps / scale), rewards.mean().item(), scale


def fitted(
    network: nn.Module,
    data: RollOuts,
    *,
    alpha: float,
    loss: str = "linex",
    updates: int = 1000,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Fit network(x_t (R, *S), t (R,)) -> (R,) to roll-outs by AdamW with a falling rate; returns it, frozen.

    alpha: the temperature of "soft" and "linex", in units of the reward. Raises UserError for an unknown loss, alpha 0 with those
    two, and rewards that are not finite.
    """
    if loss not in LOSSES or (loss != "mean" and not alpha > 0):
        raise UserError(
            f"loss is {loss!r} and alpha is {alpha}; loss must be one of {', '.join(LOSSES)}, the last two with alpha above 0."
        )
    if not torch.isfinite(data.rewards).all():
        raise UserError(
            "Some roll-outs have a reward that is not finite, and no network can be fitted to it. Give poor samples a finite one."
        )
    flat, times = data.states.flatten(0, 1), torch.tensor(data.times, dtype=torch.float64).repeat(len(data.states))
    targets, top = data.rewards.repeat_interleave(len(data.times)).float(), data.rewards.max().item()
    network.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    with torch.enable_grad():
        for i in range(updates):
            rows = torch.from_numpy(generator(seed, Streams.SHUFFLE, i).integers(0, len(flat), batch))
            value = regression(network(flat[rows], times[rows]), targets[rows], alpha, loss, top).mean()
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            falling.step()
    return network.eval().requires_grad_(False)


def learned(network: Callable[[Tensor, Tensor], Tensor]) -> ValueOf:
    """A value by a fitted network (x_t (R, *S), t (R,)) -> (R,); the true reward at TERMINAL. The denoiser is called once a step only."""
    return lambda run: _Learned(run, network)


@dataclass(frozen=True)
class _Learned:
    run: Setting
    network: Any
    predicts: bool = False

    def __call__(self, x_t: Tensor, t: float, rows: Tensor, out: Tensor | None) -> Tensor:
        if t == TERMINAL:
            return at_the_end(self.run, x_t, rows)
        return self.network(x_t, torch.full((len(x_t),), t, dtype=torch.float64)).double()


class TokenValue(nn.Module):
    """A small convolutional judge of token states (R, L) in 0..V with their times."""

    def __init__(self, vocabulary: int, hidden: int = 32, kernel: int = 9, layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary + 1, hidden)
        self.time = nn.Linear(1, hidden)
        self.layers = nn.ModuleList(
            nn.Conv1d(hidden, hidden, kernel, padding="same", dilation=2**i) for i in range(layers)
        )
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = (self.embed(x) + self.time(t.float()[:, None])[:, None]).transpose(1, 2)
        for layer in self.layers:
            h = h + nn.functional.gelu(layer(h))
        return self.head(torch.cat([h.mean(-1), h.amax(-1)], 1))[:, 0]


class LatentValue(nn.Module):
    """A small judge of continuous states with their times in [0, span]: convolutions over (C, H, W), else a perceptron over all numbers."""

    def __init__(self, shape: Sequence[int], span: float = 1.0, hidden: int = 32):
        super().__init__()
        self.span = span
        if len(shape) == 3:
            widths = [shape[0], hidden, 2 * hidden, 2 * hidden]
            layers = [m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GELU())]
            self.body, width = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 8 * hidden
        else:
            self.body, width = nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 4 * hidden), nn.GELU()), 4 * hidden
        self.head = nn.Sequential(nn.Linear(width + 2, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        share = (t.float() / self.span)[:, None]
        return self.head(torch.cat([self.body(x.float()), share, share**2], 1))[:, 0]
