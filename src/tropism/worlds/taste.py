"""The hidden taste of the shapes world: a rule that voters follow, that no reward is allowed to read.

The aesthetic reward is trained from noisy votes of this rule on ordinary pictures; the rule itself is the gold measure, so a
proxy that is driven too far can be told from a picture that got better. It likes warm light up to a point, and an airy
brightness up to a point; ordinary pictures lie mostly below both.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WARMTH, WARMTH_WIDTH = 0.20, 0.22
BRIGHTNESS, BRIGHTNESS_WIDTH = 0.66, 0.16


def gold(images: Tensor) -> Tensor:
    """The rule, (B,) at most 0, of pictures (B, 3, H, W) in [0, 1]: warmth is mean(R - B), brightness mean luma (Rec. 601)."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    warmth, brightness = red - blue, 0.299 * red + 0.587 * green + 0.114 * blue
    return -0.5 * (((warmth - WARMTH) / WARMTH_WIDTH) ** 2 + ((brightness - BRIGHTNESS) / BRIGHTNESS_WIDTH) ** 2)


def votes(images: Tensor, pairs: Tensor, rng: np.random.Generator) -> Tensor:
    """One noisy vote a pair: (P,) booleans, True if the first of `pairs` (P, 2) is preferred; P = sigmoid(2 (gold_a - gold_b))."""
    score = gold(images)
    chance = torch.sigmoid(2 * (score[pairs[:, 0]] - score[pairs[:, 1]]))
    return torch.from_numpy(rng.random(len(pairs))) < chance
