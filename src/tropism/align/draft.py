"""DRaFT-K and DRaFT-LV: the reward's gradient through the last steps alone.

Directly Fine-Tuning Diffusion Models on Differentiable Rewards, arXiv 2309.17400, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor

from tropism.align.rollout import Chain, Swept
from tropism.align.truncation import active_steps
from tropism.align.update import begin, climb, drift_penalty, reward_loss, step_of
from tropism.core import TERMINAL, Batch, Info, Model, Reward, Stream, UserError, generator


def draft(
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
    k: int = 1,
    hinge: float | None = None,
    drift: float = 0.0,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """DRaFT-K, one update: sample the whole chain, ascend the reward's gradient through its last k steps. Yields one (loss, Info).

    k: steps that carry a gradient; N is the full chain (DRaFT). hinge: loss max(0, hinge - r) instead of -r.
    drift: weight of the squared distance to the base model's outputs on the active steps.
    Raises UserError for a k outside 1..N or a negative drift.
    """
    loss = reward_loss(hinge, None)
    chain, x_T = begin(model, reward, batch, seed=seed, update=update, steps=steps, guidance=guidance)
    chain = _last(chain, k, seed, update, drift)
    yield step_of(chain, climb(chain, x_T, loss, micro_batch))
    return state


def draft_lv(
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
    noised: int = 2,
    hinge: float | None = None,
    drift: float = 0.0,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """DRaFT-LV, one update: DRaFT-1, and the same gradient again at copies of x_0 noised to the last step. Yields one (loss, Info).

    noised: copies n of each sample, each with noise of its own; the gradient is the mean of 1 + n, so it costs 1 + n rewards a sample.
    hinge, drift: as in `draft`. Raises UserError for n below 1.
    """
    if noised < 1:
        raise UserError(
            f"noised is {noised}; DRaFT-LV noises each sample at least once. Try --noised 2, or align draft."
        )
    loss = reward_loss(hinge, None)
    chain, x_T = begin(model, reward, batch, seed=seed, update=update, steps=steps, guidance=guidance)
    chain = _last(chain, 1, seed, update, drift)
    found = climb(chain, x_T, loss, micro_batch)
    copies = []
    for n in range(noised):
        again, start = _noised(chain, found.ends, n)
        copies.append(climb(again, start, loss, micro_batch))
    value, info = step_of(chain, _mean(found, copies))
    for name in ("decode", "reward", "reward_gradient"):
        info.calls[name] += noised * len(batch)
    yield value, info
    return state


def _last(chain: Chain, k: int, seed: int, update: int, drift: float) -> Chain:
    """The chain with its last k steps active."""
    runs = len(chain.times) - 1 - chain.first
    active = active_steps(k, runs, generator(seed, Stream.TRUNCATION, update))
    penalty = drift_penalty(chain.model, chain.guidance, drift, k, detach=False)
    return replace(chain, active=(False,) * chain.first + active, step_loss=penalty)


def _noised(chain: Chain, ends: Tensor, n: int) -> tuple[Chain, Tensor]:
    """The chain of one step from x_0 noised to the last time, and that start."""
    t, last = chain.times[-2], len(chain.times) - 2
    noise = chain.draw(Stream.RENOISE, last, tuple(ends.shape[1:]), k=n).to(ends.device)
    start = chain.model.process.forward(ends, t, noise)
    return replace(chain, times=(t, TERMINAL), active=(True,), first=0, stop=0, apart=False), start


def _mean(found: Swept, copies: list[Swept]) -> Swept:
    """One gradient and loss of the sample and its noised copies; rewards and pictures are the sample's own."""
    of, share = [found, *copies], 1 / (1 + len(copies))
    return replace(
        found,
        gradient=[share * sum(g[1:], g[0]) for g in zip(*(s.gradient for s in of), strict=True)],
        losses=share * sum((s.losses for s in copies), found.losses),
        step_losses=share * sum((s.step_losses for s in copies), found.step_losses),
        rows={name: sum(s.rows[name] for s in of) for name in found.rows},
    )
