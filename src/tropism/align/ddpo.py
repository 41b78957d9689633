"""DDPO: policy gradient on the chain's own transitions. The reward may be any function; the chain must be stochastic.

Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301, section 4.3 (importance-sampled, DDPO-IS; with one minibatch
and one epoch it is the score-function estimator DDPO-SF). On a flow model with eta > 0 the same file is Flow-GRPO, arXiv 2505.05470.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tropism.align.advantage import ADVANTAGES, judged
from tropism.align.rollout import Chain, surrogate
from tropism.align.update import NotFinite, begin
from tropism.core import (
    Batch,
    Info,
    Kernel,
    Model,
    Reward,
    Stream,
    UserError,
    gather,
    generator,
    in_pieces,
    name_of,
    scored_parts,
)

MOST_LOST = 0.5
"""Share of a batch that may be without a finite reward."""
DETERMINISTIC = (
    "Every step of this chain is deterministic, so its transitions have no density and DDPO cannot learn. "
    "Take a stochastic sampler: --eta 1 (flow models: --eta 0.7)."
)


def ddpo(
    model: Model,
    reward: Reward,
    batch: Batch,
    *,
    state: dict,
    update: int,
    seed: int,
    micro_batch: int | None = None,
    steps: int = 50,
    guidance: float = 5.0,
    minibatches: int = 2,
    inner_epochs: int = 1,
    clip_range: float = 1e-4,
    advantage: str = "per-prompt",
    advantage_clip: float = 5.0,
    kl: float = 0.0,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """One update: draw the batch's trajectories, then `inner_epochs` times `minibatches` optimiser steps on them, one yield each.

    minibatches: parts of this process's rows, shuffled anew every epoch. clip_range: of the ratio of densities, 1 +- this.
    advantage: per-prompt, batch or group, clipped to +- advantage_clip. kl: weight of the transition's divergence from the base model's.
    A sample whose reward is not finite takes no part; it is counted as reward/nonfinite.
    Densities are means over the latent's dimensions, as in the published code. `state` remembers rewards by prompt.
    Raises UserError for a chain without a stochastic step (eta 0), more minibatches than samples, numbers out of range,
    group advantages without a prompt that is there twice, or rewards of which more than half are not finite.
    """
    _check(len(batch), minibatches, inner_epochs, clip_range, advantage, advantage_clip, kl)
    prompts = [p for _, p in sorted(zip(batch.whole.index, batch.whole.prompts, strict=True))]
    if advantage == "group" and len(set(prompts)) == len(prompts):
        raise UserError(
            "Every prompt of the batch is alone in it, so advantages within a prompt are 0 and nothing is learned. "
            "Draw several pictures of each: --per-prompt 4."
        )
    chain, x_T = begin(model, reward, batch, seed=seed, update=update, steps=steps, guidance=guidance)
    path = walk(chain, x_T, micro_batch)
    all_rewards, index = gather(path.rewards.double(), batch.index)
    place = {n: i for i, n in enumerate(index.tolist())}
    lost = _lost(reward, all_rewards, update)
    advantages, past = judged(advantage, all_rewards.cpu(), prompts, state.get("rewards", {}))
    own = advantages.clamp(-advantage_clip, advantage_clip)[[place[i] for i in batch.index]].to(path.rewards.device)
    parameters = list(model.trainable().values())
    for epoch in range(inner_epochs):
        order = generator(seed, Stream.SHUFFLE, update, step=1, k=epoch).permutation(len(batch))
        for part, rows in enumerate(np.array_split(order, minibatches)):
            gradient, told = ascend(chain, path, own, torch.from_numpy(rows), clip_range, kl, micro_batch)
            told["reward/nonfinite"] = float(lost)
            info = Info(len(rows), path.columns(), told, images=path.images, latents=path.states[chain.running.stop])
            if epoch == part == 0:
                info.calls |= {"forward": path.rows, "decode": len(batch), "reward": len(batch)}
            info.calls |= {"recompute": int(told.pop("rows")), "backward": int(told.pop("backward"))}
            yield surrogate(gradient, parameters, torch.tensor(told["loss"] * len(rows), dtype=torch.float64)), info
    return {"rewards": past}


@dataclass
class Path:
    """Trajectories without a graph: states by step (and the last one under its end), densities (B,) of the stochastic steps, rewards."""

    states: dict[int, Tensor] = field(default_factory=dict)
    log_probs: dict[int, Tensor] = field(default_factory=dict)
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    parts: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: int = 0

    def columns(self) -> dict[str, Tensor]:
        """The rewards and their parts, of the samples whose reward is finite."""
        known = torch.isfinite(self.rewards)
        return {name: values[known] for name, values in {"reward": self.rewards, **self.parts}.items()}


def _lost(reward: Reward, rewards: Tensor, update: int) -> int:
    """How many of the whole batch's rewards are not finite. Raises NotFinite, on all processes alike, for more than half of them."""
    lost = int((~torch.isfinite(rewards)).sum())
    if lost > MOST_LOST * len(rewards):
        raise NotFinite(
            f"Update {update}: reward '{name_of(reward)}' is not finite for {lost} of {len(rewards)} samples. Such samples take no part, "
            f"but above {MOST_LOST:.0%} too few are left to learn from. Give poor samples a low score, and NaN only to those that cannot "
            "be scored."
        )
    return lost


@torch.no_grad()
def walk(chain: Chain, x_T: Tensor, micro_batch: int | None) -> Path:
    """Draw the trajectories of a batch and score their ends. Raises UserError if no step of the chain is stochastic."""
    pieces: dict[int, tuple] = {}
    before = _rows(chain.model)

    def one(rows: slice):
        part, x = chain[rows], x_T[rows]
        states, log_probs = {}, {}
        for i in part.running:
            kernel, following = _kernel(part, i, x), None
            if kernel.is_deterministic:
                following = kernel.sample(x)
            else:
                following = kernel.sample(part.draw(Stream.TRANSITION, i, kernel.noise_shape).to(x.device))
                log_probs[i] = log_density(kernel, following)
            states[i], x = x, following
        states[part.running.stop] = x
        if not log_probs:
            raise UserError(DETERMINISTIC)
        images = part.model.decode(part.model.process.complete(x, x))
        pieces[rows.start] = (states, log_probs, *scored_parts(part.reward, images, part.batch), images)

    in_pieces(one, len(x_T), micro_batch or len(x_T))
    states, log_probs, rewards, parts, images = zip(*(pieces[k] for k in sorted(pieces)), strict=True)
    joined = lambda dicts: {k: torch.cat([d[k] for d in dicts]) for k in dicts[0]}
    found = Path(joined(states), joined(log_probs), torch.cat(rewards), joined(parts), torch.cat(images))
    found.rows = _rows(chain.model) - before
    return found


def log_density(kernel: Kernel, x: Tensor) -> Tensor:
    """(B,) float64: the transition's log density, a mean over the latent's dimensions as in DDPO's published code."""
    return kernel.log_prob(x) / math.prod(x.shape[1:])


def ascend(
    chain: Chain, path: Path, advantages: Tensor, rows: Tensor, clip_range: float, kl: float, micro_batch: int | None
) -> tuple[list[Tensor], dict[str, float]]:
    """The gradient of the clipped objective, summed over rows, averaged over the stochastic steps; what it reports.

    loss = max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = p(x_s | x_t) / p_old(x_s | x_t). arXiv 2305.13301, eq. 5.
    """
    parameters = list(chain.model.trainable().values())
    total = [torch.zeros_like(p) for p in parameters]
    stochastic, told = sorted(path.log_probs), {"loss": 0.0, "ratio_error": 0.0, "clipped": 0.0, "kl": 0.0}
    before, back = _rows(chain.model), _rows(chain.model, "backward")
    for i in stochastic:

        def piece(at: slice, i=i):
            chosen = rows[at].tolist()
            part, x_t, x_s = chain[chosen], path.states[i][chosen], path.states[i + 1][chosen]
            with torch.enable_grad():
                kernel = _kernel(part, i, x_t)
                ratio = (log_density(kernel, x_s) - path.log_probs[i][chosen]).exp()
                a = advantages[chosen]
                loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_range, 1 + clip_range))
                divergence = _divergence(part, i, x_t, kernel) if kl else torch.zeros_like(loss)
                objective = (loss + kl * divergence).sum() / len(stochastic)
                gradient = torch.autograd.grad(objective, parameters, allow_unused=True)
            for sum_, g in zip(total, gradient, strict=True):
                if g is not None:
                    sum_ += g
            share = 1 / (len(stochastic) * len(rows))
            told["loss"] += objective.item() / len(rows)
            told["kl"] += share * divergence.sum().item()
            told["clipped"] += share * ((ratio - 1).abs() > clip_range).sum().item()
            told["ratio_error"] = max(told["ratio_error"], (ratio - 1).abs().max().item())

        in_pieces(piece, len(rows), micro_batch or len(rows))
    rows_, back_ = _rows(chain.model) - before, _rows(chain.model, "backward") - back
    return total, {**told, "rows": float(rows_), "backward": float(back_)}


def _kernel(chain: Chain, i: int, x_t: Tensor) -> Kernel:
    return chain.model.kernel(x_t, chain.times[i], chain.times[i + 1], chain.cond, chain.guidance)[0]


def _divergence(chain: Chain, i: int, x_t: Tensor, kernel: Kernel) -> Tensor:
    """(B,): KL of the transition to the base model's, of equal spread, a mean over dimensions. Flow-GRPO, arXiv 2505.05470, eq. 10."""
    with torch.no_grad(), chain.model.base():
        base = _kernel(chain, i, x_t)
    return ((kernel.mean - base.mean) / kernel.std).square().flatten(1).mean(1).double() / 2  # type: ignore[attr-defined]


def _rows(model: Model, kind: str = "network") -> int:
    return getattr(model, "calls", {}).get(kind, 0)


def check_stochastic(model: Model, steps: int) -> None:
    """Raises UserError if every step of the model's chain is deterministic."""
    times = model.process.times(steps, getattr(model, "shape", (1, 1, 1))).tolist()
    state = torch.zeros(1, *getattr(model, "shape", (1, 1, 1)))
    if all(model.process.reverse(state, state, t, s).is_deterministic for t, s in pairwise(times)):
        raise UserError(DETERMINISTIC)


def _check(samples: int, minibatches: int, epochs: int, clip_range: float, advantage: str, clip: float, kl: float):
    if not 1 <= minibatches <= samples:
        raise UserError(
            f"minibatches is {minibatches} for {samples} samples of a process; it must lie in 1..{samples}. Try --minibatches 1."
        )
    if epochs < 1:
        raise UserError(f"inner_epochs is {epochs}; it must be at least 1. Leave --inner-epochs out.")
    if not (clip_range > 0 and clip > 0 and kl >= 0):
        raise UserError(
            f"clip_range is {clip_range}, advantage_clip {clip}, kl {kl}; the first two must be above 0, kl at least 0. "
            "Try --clip-range 1e-4 --advantage-clip 5 --kl 0."
        )
    if advantage not in ADVANTAGES:
        raise UserError(f"There is no advantage '{advantage}'. Known: {', '.join(ADVANTAGES)}.")
