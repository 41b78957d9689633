"""DRTune: gradients reach a few spaced steps along the sampler's linear path alone, and the chain may end early.

Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models, arXiv 2405.00760, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np
from torch import Tensor

from tropism.align.update import begin, climb, drift_penalty, reward_loss, step_of
from tropism.core import Batch, Info, Model, Reward, Stream, UserError, generator


def drtune(
    model: Model,
    reward: Reward,
    batch: Batch,
    *,
    state: dict,
    update: int,
    seed: int,
    micro_batch: int | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    train_steps: int = 3,
    stop_share: float = 0.4,
    hinge: float | None = None,
    drift: float = 0.0,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """One update: `train_steps` equally spaced steps, inputs of the network detached, x_0 predicted at a random early stop.

    train_steps: K. stop_share: the chain ends at a step drawn among this share of its last ones; 0 runs it to its end.
    hinge: loss max(0, hinge - r) instead of -r. drift: weight of the squared distance to the base's outputs on the active steps.
    The defaults are those of a public implementation; the paper's own were not at hand. Yields one (loss, Info).
    Raises UserError for K below 1 or a share outside [0, 1].
    """
    if not 0 <= stop_share <= 1:
        raise UserError(f"stop_share is {stop_share}; it is a share of the chain and must lie in [0, 1]. Try 0.4.")
    loss = reward_loss(hinge, None)
    chain, x_T = begin(model, reward, batch, seed=seed, update=update, steps=steps, guidance=guidance)
    rng = generator(seed, Stream.TIMESTEP, update)
    runs = steps - chain.first
    late = int(rng.integers(0, max(1, round(stop_share * runs)))) if stop_share else 0
    active = (False,) * chain.first + spaced(runs - late, train_steps, rng) + (False,) * late
    chain = replace(
        chain,
        active=active,
        stop=steps - 1 - late if stop_share else None,
        detach_input=True,
        step_loss=drift_penalty(model, guidance, drift, sum(active), detach=False),
    )
    yield step_of(chain, climb(chain, x_T, loss, micro_batch))
    return state


def spaced(n: int, k: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """min(k, n) of n steps at equal distances, the first of them drawn. Raises UserError for k below 1."""
    if k < 1:
        raise UserError(f"train_steps is {k}; at least one step must carry a gradient. Try --train-steps 3.")
    gap = n // min(k, n)
    begin = int(rng.integers(0, n - gap * (min(k, n) - 1)))
    chosen = {begin + gap * i for i in range(min(k, n))}
    return tuple(i in chosen for i in range(n))
