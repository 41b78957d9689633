"""AlignProp: back-propagate a differentiable reward through the denoising chain into the model's weights.

Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from tropism.align.rollout import Chain, StepLoss, Swept, surrogate, sweep
from tropism.align.truncation import Policy, active_steps
from tropism.core import Batch, Cond, Draw, Info, Model, Reward, Stream, UserError, generator, name_of


def alignprop(
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
    truncation: str | int | Policy = "suffix-uniform",
    detach_input: bool = False,
    hinge: float | None = None,
    target: float | None = None,
    drift: float = 0.0,
    drift_detach: bool = False,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """One update: sample the whole chain, ascend the reward's own gradient through its active steps. Yields one (loss, Info).

    steps: N denoising steps. guidance: w of uncond + w (cond - uncond).
    truncation: which steps carry a gradient; see `align.truncation`. detach_input: DRTune's stop-gradient on the network's
    input (arXiv 2405.00760), the linear path x_t -> x_s keeps its gradient.
    hinge: loss max(0, hinge - r) instead of -r. target: loss |r - target|.
    drift: weight of the mean squared difference between this model's and the base model's outputs on the active steps.
    drift_detach: the base's prediction sees x_t without its gradient (cheaper, biased).
    Raises UserError for both hinge and target, a negative drift, or a truncation that cannot be.
    """
    loss = reward_loss(hinge, target)
    with torch.no_grad():
        draw = Draw(seed, update, batch.index)
        cond = model.encode(batch, draw)
        times = model.process.times(steps, cond.shape)
        x_T, first = model.start(cond, draw, times)
    runs = steps - first
    active = (False,) * first + active_steps(truncation, runs, generator(seed, Stream.TRUNCATION, update))
    chain = Chain(
        model,
        reward,
        batch,
        cond,
        draw,
        tuple(times.tolist()),
        guidance,
        active,
        first,
        detach_input=detach_input,
        step_loss=drift_penalty(model, guidance, drift, sum(active), drift_detach),
    )
    parameters = list(model.trainable().values())
    swept = sweep(chain, x_T, loss, parameters, micro_batch)
    if not swept.has_graph:
        raise UserError(
            f"Reward '{name_of(reward)}' returned values without a gradient, and AlignProp needs one. "
            "Compute the reward from the images with torch operations, without .item(), numpy, PIL or torch.no_grad()."
        )
    value = swept.losses.sum() + swept.step_losses.sum()
    yield surrogate(swept.gradient, parameters, value), report(swept, len(batch), active)
    return state


def reward_loss(hinge: float | None, target: float | None):
    """The elementwise loss of a reward: -r, the hinge max(0, c - r), or the distance |r - c|."""
    if hinge is not None and target is not None:
        raise UserError(
            f"Both hinge ({hinge}) and target ({target}) are given, but a reward has one loss. Drop one of them."
        )
    if hinge is not None:
        return lambda r: (hinge - r).clamp_min(0)
    return (lambda r: (r - target).abs()) if target is not None else (lambda r: -r)


def drift_penalty(model: Model, guidance: float, weight: float, active: int, detach: bool) -> StepLoss | None:
    """weight / K * mean over dimensions of (out - base's out)^2, at the same x_t, as a step loss; None for weight 0."""
    if weight < 0:
        raise UserError(f"drift is {weight}; a negative weight would reward leaving the base model. Use 0 or more.")
    if weight == 0:
        return None

    def penalty(x_t: Tensor, out: Tensor, t: float, cond: Cond) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach), model.base():
            reference = model.predict(x_t.detach() if detach else x_t, t, cond, guidance)
        return weight / active * (out - reference).pow(2).flatten(1).mean(1)

    return penalty


def report(swept: Swept, samples: int, active: tuple[bool, ...]) -> Info:
    """What the update says of itself."""
    scalars = {
        "active_steps": float(sum(active)),
        "clamped": swept.clamped,
        "loss": swept.losses.mean().item(),
        "drift_penalty": swept.step_losses.mean().item(),
        "micro_batch": float(swept.piece),
    }
    scalars |= {f"step_norm/{i}": n for i, n in sorted(swept.step_norms.items())}
    return Info(
        samples,
        {"reward": swept.rewards, **swept.parts},
        scalars,
        {**swept.rows, "decode": samples, "reward": samples},
        swept.images,
    )
