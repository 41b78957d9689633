"""What the yields of one update report, as one row of the record."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tropism.core import Info
from tropism.run.optimiser import is_distributed


def merged(infos: list[Info]) -> Info:
    """The reports of one update's yields as one: samples and calls add up; of columns and scalars the last counts."""
    calls: dict[str, int] = {}
    for info in infos:
        calls = {k: calls.get(k, 0) + info.calls.get(k, 0) for k in calls | info.calls}
    columns = {k: v for info in infos for k, v in info.columns.items()}
    scalars = {k: v for info in infos for k, v in info.scalars.items()}
    last = next((i for i in reversed(infos) if i.images is not None), infos[-1])
    return Info(sum(i.samples for i in infos), columns, scalars, calls, last.images, last.latents)


def statistics(info: Info) -> dict[str, float]:
    """The mean of each column over all processes, and the standard deviation of the reward.

    Parts are NaN where a prompt is not meant for them; those rows do not count.
    """
    if not info.columns:
        return {}
    names = sorted(info.columns)
    sums = torch.tensor(
        [
            [v.numel(), v.double().sum().item(), v.double().pow(2).sum().item()]
            for v in (info.columns[n] if n == "reward" else _counted(info.columns[n]) for n in names)
        ],
        dtype=torch.float64,
    )
    if is_distributed():
        sums = sums.to(info.columns[names[0]].device)
        dist.all_reduce(sums)
    count, total, square = sums.cpu().unbind(1)
    mean = total / count.clamp_min(1)
    std = (square / count.clamp_min(1) - mean**2).clamp_min(0).sqrt()
    row = dict(zip(names, mean.tolist(), strict=True))
    return row | {"reward_std": std[names.index("reward")].item()} if "reward" in row else row


def _counted(column: Tensor) -> Tensor:
    return column[~column.isnan()]
