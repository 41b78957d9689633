"""Two small feature encoders of the `glyphs` world: one whose features reward, and one of another build that only judges.

Both were trained to name the digits of spoilt pictures (`tropism pretrain glyphs`) by the direction of a vector for every slot, so what
does not change a digit hardly turns it. Their 2 x 2 maps stand in for the patch tokens of a large vision network. `random` has the
first one's build and no training: a control.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tropism.worlds import glyphs, weights

WIDTH = 64
SHARPNESS = 10.0
"""Of the softmax over cosines."""


class Encoder(nn.Module):
    """Pictures (B, 3, 32, 32) in [0, 1] -> every stage's map (B, C, H, W), the last (B, 64, 2, 2); a vision tower of `rewards.towers`.

    kernel, widths: of the convolutions, each with a stride of 2.
    """

    def __init__(self, kernel: int, widths: tuple[int, int, int], act: Callable[[Tensor], Tensor]):
        super().__init__()
        stages = pairwise((1, *widths, WIDTH))
        self.stages = nn.ModuleList(nn.Conv2d(a, b, kernel, 2, kernel // 2) for a, b in stages)
        self.act, self.head = act, nn.Linear(WIDTH, glyphs.CLASSES, bias=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, found = 2 * glyphs.checked(images).mean(1, keepdim=True) - 1, []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.act(x))
            found.append(x)
        return found

    def logits(self, images: Tensor) -> Tensor:
        """(B, 4, 11): what stands in every slot, by the cosine of its vector with every class's."""
        slots = F.normalize(self(images)[-1].flatten(2).transpose(1, 2), dim=-1)
        return SHARPNESS * slots @ F.normalize(self.head.weight, dim=-1).T


def new(name: str) -> Encoder:
    """An encoder without training: "features" (3 x 3, smooth), "judge" (5 x 5, other widths) or "random". Draws from torch's generator."""
    if name == "judge":
        return Encoder(5, (12, 24, 48), F.gelu)
    return Encoder(3, (16, 32, 64), F.silu)


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
