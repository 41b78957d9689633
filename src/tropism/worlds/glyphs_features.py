"""Two small feature encoders of the `glyphs` world: one whose features reward, and one of another build that only judges.

Both were trained to name the digits of spoilt pictures (`tropism pretrain glyphs`). Their 4 x 4 maps stand in for the patch tokens of a
large vision network, and the mean of the map for its class token. `random` has the first one's build and no training: a control.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tropism.worlds import glyphs, weights

WIDTH = 64


class Encoder(nn.Module):
    """Pictures (B, 3, 32, 32) in [0, 1] -> a map (B, 64, 4, 4). Strides of 2 but the last; kernel, widths: of its convolutions."""

    def __init__(self, kernel: int, widths: tuple[int, int, int], smooth: bool):
        super().__init__()
        sides = (1, *widths, WIDTH)
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, kernel, 2 if i < len(widths) else 1, kernel // 2)
            for i, (a, b) in enumerate(pairwise(sides))
        )
        self.act = F.silu if smooth else F.gelu
        self.head = nn.Linear(4 * WIDTH, glyphs.CLASSES)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Every stage's map, (B, C, H, W); the last is (B, 64, 4, 4)."""
        x, found = 2 * glyphs.checked(images).mean(1, keepdim=True) - 1, []
        for stage in self.stages:
            x = self.act(stage(x))
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images)[-1]

    def logits(self, images: Tensor) -> Tensor:
        """(B, 4, 11): what stands in every slot, of its 2 x 2 part of the map."""
        x = (
            self(images).unflatten(3, (2, 2)).unflatten(2, (2, 2))
        )  # (B, 64, 2, 2, 2, 2): slot row, row, slot column, column
        return self.head(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


def new(name: str) -> Encoder:
    """An encoder without training: "features" (3 x 3, smooth), "judge" (5 x 5, other widths) or "random". Draws from torch's generator."""
    if name == "judge":
        return Encoder(5, (12, 24, 48), smooth=False)
    return Encoder(3, (16, 32, 64), smooth=True)


@cache
def encoder(name: str) -> Encoder:
    """A bundled encoder, frozen: "features", "judge", or "random" of seed 0."""
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = new(name)
    else:
        network = new(name)
        network.load_state_dict(load_file(weights.path(f"glyphs/{name}.safetensors")))
    return network.eval().requires_grad_(False)
