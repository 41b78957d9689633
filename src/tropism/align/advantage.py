"""How much better a sample is than its like: one function an advantage, `(rewards, prompts, past) -> advantages`, all (B,) float64.

past: rewards seen before by prompt, this batch's among them. Statistics are of the whole batch, over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Past = Mapping[str, Sequence[float]]
Advantage = Callable[[Tensor, list[str], Past], Tensor]

EPSILON = 1e-6
LEAST = 16
"""Rewards of a prompt that its own statistics need."""
KEPT = 32
"""Rewards of a prompt that are remembered."""
ROUNDING = 1e-12
"""Distance from the mean, relative to it, that is rounding: divided by EPSILON it would look like a small advantage."""


def batch(rewards: Tensor, prompts: list[str], past: Past) -> Tensor:
    """(r - mean) / std of the batch."""
    return _standard(rewards, rewards.mean(), rewards.std(correction=0))


def per_prompt(rewards: Tensor, prompts: list[str], past: Past) -> Tensor:
    """(r - mean) / std of the prompt's remembered rewards, or below LEAST of them of the batch. DDPO, arXiv 2305.13301."""
    own = [torch.tensor(past[p] if len(past[p]) >= LEAST else rewards.tolist(), dtype=torch.float64) for p in prompts]
    mean, std = torch.stack([r.mean() for r in own]), torch.stack([r.std(correction=0) for r in own])
    return _standard(rewards, mean, std)


def group(rewards: Tensor, prompts: list[str], past: Past) -> Tensor:
    """(r - mean) / std of the prompt's samples in this batch; 0 for a prompt alone in it. GRPO's, Flow-GRPO arXiv 2505.05470."""
    same = torch.tensor([[p == q for q in prompts] for p in prompts], dtype=torch.float64)
    mean = (same @ rewards) / same.sum(1)
    std = ((same @ rewards.square()) / same.sum(1) - mean.square()).clamp_min(0).sqrt()
    return _standard(rewards, mean, std)


def _standard(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(r - mean) / std, exactly 0 for equal rewards: a run that cannot learn must be seen to."""
    away = rewards - mean
    return away.masked_fill(away.abs() <= ROUNDING * mean.abs(), 0) / (std + EPSILON)


ADVANTAGES: dict[str, Advantage] = {f.__name__.replace("_", "-"): f for f in (per_prompt, batch, group)}


def judged(
    advantage: str, rewards: Tensor, prompts: list[str], past: Mapping[str, Sequence[float]]
) -> tuple[Tensor, dict[str, list[float]]]:
    """(advantages (B,), `past` with this batch's rewards). A reward that is not finite takes no part: its advantage is 0."""
    known = torch.isfinite(rewards)
    own = [p for p, is_known in zip(prompts, known.tolist(), strict=True) if is_known]
    memory, found = remembered(past, own, rewards[known]), torch.zeros_like(rewards)
    if own:
        found[known] = ADVANTAGES[advantage](rewards[known], own, memory)
    return found, memory


def remembered(past: Past, prompts: list[str], rewards: Tensor) -> dict[str, list[float]]:
    """`past` with a batch's rewards, KEPT a prompt, the newest last."""
    found = {p: list(r) for p, r in past.items()}
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        found[prompt] = [*found.get(prompt, []), reward][-KEPT:]
    return found
