"""Distillation of guided samples: the model's own denoising loss on what a guide has drawn, so that the guide becomes weights.

Source: RAFT (fine-tuning on reward-ranked samples), arXiv 2304.06767; the masked bound: arXiv 2406.07524, eq. 10.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from tropism.align.rollout import surrogate
from tropism.core import Batch, Cond, Draw, Info, Model, Stream

SNR = (1.0, 5.0)
"""Bounds of the signal-to-noise ratio as the weight of a clean state's squared error (arXiv 2202.00512 and 2303.09556)."""


def denoising_losses(model: Model, clean: Tensor, cond: Cond, times: Tensor, noise: Tensor, guidance: float) -> Tensor:
    """How badly the model knows clean states (B, *S) from their noisy ones at times (B,): losses (B,).

    Gaussian chains: the mean squared error of x_0, weighted by the clipped signal-to-noise ratio. Tokens: the masked bound, in nats.
    noise: standard normals (B, *S). guidance: as the chain is to be run.
    """
    process, noise = model.process, noise.to(clean.device)
    x_t = process.forward(clean, times, noise)
    x0 = model.x0(x_t, model.predict(x_t, times, cond, guidance), times)
    if clean.is_floating_point():
        ratio = [(float(process.alpha(t)) / max(float(process.sigma(t)), 1e-6)) ** 2 for t in times.tolist()]
        weight = torch.tensor(ratio, device=clean.device).clamp(*SNR)
        return (x0 - clean).pow(2).flatten(1).mean(1) * weight
    chance = x0.gather(-1, clean[..., None])[..., 0].clamp_min(torch.finfo(x0.dtype).tiny)
    return -(chance.log() * (x_t == process.mask)).sum(1) / times.to(x0)  # type: ignore[attr-defined]


def distil(
    model: Model,
    clean: Tensor,
    batch: Batch,
    *,
    state: dict,
    update: int,
    seed: int,
    micro_batch: int | None = None,
    steps: int,
    guidance: float,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """One update on the clean states (N, *S) that the batch's meta names by "sample"; yields one (loss, Info).

    steps: of the chain whose times are trained on, one of them a row, at random. guidance: of that chain.
    """
    draw, rows = Draw(seed, update, batch.index), torch.tensor([m["sample"] for m in batch.meta or []])
    with torch.no_grad():
        cond = model.encode(batch, draw)
    times = model.process.times(steps, cond.shape)[:-1]
    u = torch.special.ndtr(draw(Stream.TIMESTEP, 0, (1,))[:, 0].double()).cpu()
    chosen = times[(u * len(times)).long().clamp_max(len(times) - 1)].to(clean.device)
    noise, parameters = draw(Stream.TRANSITION, 0, clean.shape[1:]), list(model.trainable().values())
    gradient, losses = [torch.zeros_like(p) for p in parameters], []
    before = dict(getattr(model, "calls", {}))
    for part in torch.arange(len(batch)).split(micro_batch or len(batch)):
        each = denoising_losses(model, clean[rows[part]], cond[part], chosen[part], noise[part], guidance)
        found = torch.autograd.grad(each.sum(), parameters, allow_unused=True)
        gradient = [a if g is None else a + g for a, g in zip(gradient, found, strict=True)]
        losses.append(each.detach())
    every = torch.cat(losses)
    rows = getattr(model, "calls", {}).get("network", 0) - before.get("network", 0)
    calls = {"network": rows, "backward": rows}
    info = Info(len(batch), {"denoising_loss": every.float().cpu()}, calls=calls)
    yield surrogate(gradient, parameters, every.sum()), info
    return state
