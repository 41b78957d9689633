"""What OWLv2 sees: black below or to the right up to a square, blurred if it shrinks, brought to size by straight lines.

OWLv2's processor resizes with scipy, not with PIL: a Gaussian blur, then linear interpolation, both mirrored at the edges.
Each is linear and acts along one side at a time, so one matrix a side does both.
Source: Owlv2ImageProcessorPil of Hugging Face transformers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.rewards.pixels import normalised

REACH = 4.0  # standard deviations to which scipy's Gaussian reaches


def owl_pixels(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), padded, resized and normalised as the published model expects."""
    height, width = images.shape[-2:]
    side = max(height, width)
    square = F.pad(images, (0, side - width, 0, side - height))
    along = axis(side, size).to(images)
    return normalised(along @ square @ along.T)


@lru_cache(maxsize=8)
def axis(before: int, after: int) -> Tensor:
    """The matrix (after, before), float64, whose rows sum to 1: blur, then interpolation, along one side."""
    return _interpolation(before, after) @ _blur(before, max(0.0, (before / after - 1) / 2))


def _interpolation(before: int, after: int) -> Tensor:
    at = (torch.arange(after, dtype=torch.float64) + 0.5) * before / after - 0.5
    left = at.floor()
    share = at - left
    rows = torch.arange(after)
    out = torch.zeros(after, before, dtype=torch.float64)
    out.index_put_((rows, _mirrored(left.long(), before)), 1 - share, accumulate=True)
    return out.index_put_((rows, _mirrored(left.long() + 1, before)), share, accumulate=True)


def _blur(side: int, sigma: float) -> Tensor:
    reach = int(REACH * sigma + 0.5)
    if reach == 0:
        return torch.eye(side, dtype=torch.float64)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets / sigma).double() ** 2)
    rows = torch.arange(side)[:, None].expand(-1, len(offsets))
    out = torch.zeros(side, side, dtype=torch.float64)
    columns = _mirrored(rows + offsets, side)
    return out.index_put_((rows, columns), (weights / weights.sum()).expand_as(columns), accumulate=True)


def _mirrored(index: Tensor, side: int) -> Tensor:
    """Places outside reflected about the centre of the edge pixel: ... 2 1 | 0 1 2 ... n-2 n-1 | n-2 ..."""
    if side == 1:
        return torch.zeros_like(index)
    period = 2 * (side - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)
