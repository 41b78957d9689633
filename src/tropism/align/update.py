"""What the methods that follow a reward's own gradient share: the chain of an update, its loss, its penalty, its report."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tropism.align.rollout import Chain, Loss, StepLoss, Swept, surrogate, sweep
from tropism.core import Batch, Cond, Draw, Info, Model, Reward, UserError, name_of

AGREEMENT_EVERY = 10
"""Updates between measurements of how the parts of a combination agree; each costs one pass through the decoder a part."""


class NotFinite(UserError):
    """Rewards, gradients or weights of a run are no finite numbers any more: its settings, or its reward, blew it up."""


def begin(
    model: Model, reward: Reward, batch: Batch, *, seed: int, update: int, steps: int, guidance: float
) -> tuple[Chain, Tensor]:
    """This update's chain, no step of it active yet, and its start x_T (B, *S), keyed by the batch's global indices."""
    with torch.no_grad():
        draw = Draw(seed, update, batch.index)
        cond = model.encode(batch, draw)
        times = model.process.times(steps, cond.shape)
        x_T, first = model.start(cond, draw, times)
    apart = update % AGREEMENT_EVERY == 0 and len(getattr(reward, "terms", ())) > 1
    off = (False,) * steps
    return Chain(model, reward, batch, cond, draw, tuple(times.tolist()), guidance, off, first, apart=apart), x_T


def climb(chain: Chain, x_T: Tensor, loss: Loss, micro_batch: int | None) -> Swept:
    """The gradient of the chain's summed loss. Raises UserError for a reward that has none."""
    swept = sweep(chain, x_T, loss, list(chain.model.trainable().values()), micro_batch)
    if not swept.has_graph:
        raise UserError(
            f"Reward '{name_of(chain.reward)}' returned values without a gradient, and this method needs one. "
            "Compute the reward from the images with torch operations, without .item(), numpy, PIL or torch.no_grad()."
        )
    return swept


def step_of(chain: Chain, swept: Swept) -> tuple[Tensor, Info]:
    """(a loss whose backward is the swept gradient, what it reports): one yield of an algorithm."""
    value = swept.losses.sum() + swept.step_losses.sum()
    return surrogate(swept.gradient, list(chain.model.trainable().values()), value), report(swept, chain)


def reward_loss(hinge: float | None, target: float | None) -> Callable[[Tensor], Tensor]:
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


def report(swept: Swept, chain: Chain) -> Info:
    """What the update says of itself."""
    samples, parts = len(chain.batch), sum(name.startswith("part_norm/") for name in swept.agreement)
    scalars = {
        "active_steps": float(sum(chain.active[i] for i in chain.running)),
        "clamped": swept.clamped,
        "loss": swept.losses.mean().item(),
        "drift_penalty": swept.step_losses.mean().item(),
        "micro_batch": float(swept.piece),
    }
    scalars |= {name: values.mean().item() for name, values in swept.agreement.items()}
    scalars |= {f"step_norm/{i}": n for i, n in sorted(swept.step_norms.items())}
    return Info(
        samples,
        {"reward": swept.rewards, **swept.parts},
        scalars,
        {**swept.rows, "decode": samples, "reward": samples, "reward_gradient": samples * (1 + parts)},
        swept.images,
        swept.ends,
    )
