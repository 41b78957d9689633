"""How pictures look, without a network: dark share, edges, colours, a small feature vector, and how varied a set is by it.

These watch a training run: they say that something changed, not whether it got better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DARK = 0.1
"""Luma below which a pixel is dark."""
GRID, LEVELS = 4, 4
"""Cells a side of the feature grid; levels a channel of the colour histogram."""


def luma(images: Tensor) -> Tensor:
    """(B, H, W) of pictures (B, 3, H, W) in [0, 1]; Rec. 601."""
    return images.mul(images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def dark_share(images: Tensor) -> Tensor:
    """(B,) in [0, 1]: share of pixels darker than DARK."""
    return (luma(images) < DARK).flatten(1).double().mean(1)


def _edges(images: Tensor) -> Tensor:
    """(B, H, W): the size of luma's forward differences, 0 on the last row and column."""
    y = luma(images)
    across, down = F.pad(y.diff(dim=2), (0, 1)), F.pad(y.diff(dim=1), (0, 0, 0, 1))
    return (across.square() + down.square()).sqrt()


def edge_density(images: Tensor) -> Tensor:
    """(B,): mean size of luma's differences between neighbouring pixels."""
    return _edges(images).flatten(1).double().mean(1)


def colour_entropy(images: Tensor) -> Tensor:
    """(B,) in bits, 0 to 6: entropy of a picture's histogram of LEVELS levels a channel."""
    levels = (images.clamp(0, 1) * LEVELS).long().clamp_max(LEVELS - 1)
    place = levels[:, 0] * LEVELS**2 + levels[:, 1] * LEVELS + levels[:, 2]
    counts = torch.stack([torch.bincount(p.flatten(), minlength=LEVELS**3) for p in place]).double()
    share = counts / counts.sum(1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(1) / math.log(2)


def features(images: Tensor) -> Tensor:
    """(B, 4 GRID^2) float64: mean colour and mean edge of every cell of a grid, each in [0, 1] or a little above."""
    x = images.detach().float()
    cells = torch.cat([x, _edges(x).unsqueeze(1)], 1)
    return F.adaptive_avg_pool2d(cells, GRID).flatten(1).double()


def distances(points: Tensor) -> Tensor:
    """(B, B): root-mean-square difference of features."""
    return torch.cdist(points, points) / math.sqrt(points.shape[1])


def median_distance(points: Tensor) -> float:
    """Half of all pairs of different samples are nearer than this; 1 where there is none."""
    apart = distances(points)
    known = apart[apart > 0]
    return known.median().item() if len(known) else 1.0


def variety(points: Tensor, prompts: Sequence[str]) -> float:
    """Mean feature distance over pairs of equal prompt; over all pairs where no prompt occurs twice; NaN below two samples."""
    n, apart = len(prompts), distances(points)
    upper = torch.ones(n, n, dtype=torch.bool, device=apart.device).triu(1)
    same = torch.tensor([[p == q for q in prompts] for p in prompts], device=apart.device) & upper
    chosen = same if bool(same.any()) else upper
    return apart[chosen].mean().item() if bool(chosen.any()) else math.nan


def vendi(points: Tensor, width: float) -> float:
    """The effective number of different samples, 1 to B: exp of the entropy of the eigenvalues of K / B, K = exp(-d^2 / 2 width^2).

    The Vendi Score, arXiv 2210.02410, eq. 1.
    """
    kernel = (-(distances(points) ** 2) / (2 * max(width, 1e-12) ** 2)).exp() / len(points)
    values = torch.linalg.eigvalsh(kernel).clamp_min(0)
    return torch.exp(-torch.special.xlogy(values, values).sum()).item()


def frechet(points: Tensor, others: Tensor) -> float:
    """Squared Frechet distance of two sets of features taken as Gaussians with independent dimensions.

    The full covariance of FID (arXiv 1706.08500, eq. 6) would need more samples than a training batch has.
    """
    shift = (points.mean(0) - others.mean(0)).square().sum()
    spread = (points.std(0, correction=0) - others.std(0, correction=0)).square().sum()
    return (shift + spread).item()
