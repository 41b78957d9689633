"""Object count by a density map: a small network whose output sums to the number of objects, all of it smooth.

The measure beside it is the parser, worlds.shapes.accuracy, "count".
Source: Lempitsky and Zisserman, Learning To Count Objects in Images, NeurIPS 2010 (density maps); the network
is our own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tropism.core import Batch, UserError
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.sources import OWN, About
from tropism.worlds import shapes, weights

STRIDE = 2
RESTING = -5.5  # an untrained map of 32 x 32 then sums to about four objects
BLOB = 2.5  # standard deviation of an object's blob, pixels


def _layer(inside: int, out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, out, size, stride, size // 2), nn.GroupNorm(4, out), nn.SiLU())


class Counter(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1], sides multiples of 8, -> density (B, 1, H/2, W/2) >= 0 whose sum is the count.

    A U-Net of three scales, 134,000 parameters, smooth throughout: its gradient is meant to be descended.
    """

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(_layer(3, 24, 5, STRIDE), _layer(24, 24))
        self.middle = nn.Sequential(_layer(24, 48, 3, 2), _layer(48, 48))
        self.coarse = nn.Sequential(_layer(48, 64, 3, 2), _layer(64, 64), nn.Conv2d(64, 48, 1))
        self.join_middle = nn.Sequential(_layer(48, 48), nn.Conv2d(48, 24, 1))
        self.join_fine = _layer(24, 24)
        self.density = nn.Conv2d(24, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(2 * images - 1)
        middle = self.middle(fine)
        middle = self.join_middle(middle + _doubled(self.coarse(middle)))
        return F.softplus(self.density(self.join_fine(fine + _doubled(middle))) + RESTING)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def density_target(centres: list[Tensor], size: int = shapes.SIZE, blob: float = BLOB) -> Tensor:
    """Gaussian blobs that sum to 1 each: centres, B of (n_i, 2) pixel (x, y), -> (B, 1, size/2, size/2) float32.

    Pixel (0, 0) reaches from 0 to 1, as in worlds.shapes.coverage. A picture without objects (n_i = 0) gives zeros.
    """
    at = (torch.arange(size // STRIDE) + 0.5) * STRIDE
    maps = []
    for xy in centres:
        xy = torch.as_tensor(xy, dtype=torch.float32).reshape(-1, 2, 1)
        across, down = torch.softmax(-(((at - xy) / blob) ** 2) / 2, -1).unbind(1)
        maps.append(torch.einsum("ny,nx->yx", down, across))
    return torch.stack(maps)[:, None]


def training_loss(counter: Counter, images: Tensor, centres: list[Tensor]) -> Tensor:
    """What trains the counter: squared error of the density, in units of one missed object, plus Huber of the count.

    images (B, 3, 64, 64) in [0, 1]; centres: B of (n_i, 2) pixel (x, y). Returns a scalar, the mean over pictures.
    """
    target = density_target(centres, images.shape[-1]).to(images)
    density = counter(images)
    one_object = STRIDE**2 / (4 * torch.pi * BLOB**2)  # the sum of squares of one blob
    shape = (density - target).square().sum((1, 2, 3)) / one_object
    return (shape + F.huber_loss(density.sum((1, 2, 3)), target.sum((1, 2, 3)), reduction="none")).mean()


class Count:
    """The reward -Huber(predicted - wanted), (B,) <= 0, `wanted` read off the shapes world's prompts. Differentiable.

    Raises UserError for a prompt of another world.
    """

    name, differentiable, about = "shapes-count", True, About((-math.inf, 0.0), 64, OWN, "bundled")

    def __init__(self, counter: Counter):
        self.frozen = Frozen(counter)

    def counts(self, samples: Tensor) -> Tensor:
        """Predicted number of objects (B,), at least 0, of pictures (B, 3, 64, 64) in [0, 1]."""
        return self.frozen.like(samples)(samples.to(at_least_float32(samples))).sum((1, 2, 3))

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt of another world, before anything is drawn."""
        _wanted(prompts)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        counts = self.counts(samples)
        return -F.huber_loss(counts, counts.new_tensor(_wanted(batch.prompts)), reduction="none")


def _wanted(prompts: list[str]) -> list[int]:
    try:
        return [shapes.parse_prompt(p).count or 0 for p in prompts]
    except ValueError as error:
        raise UserError(f"shapes-count cannot tell how many objects are wanted: {error}") from error


def shapes_count() -> Count:
    """The reward `shapes-count` with the bundled counter."""
    counter = Counter()
    counter.load_state_dict(load_file(weights.path("shapes/counter.safetensors")))
    return Count(counter)
