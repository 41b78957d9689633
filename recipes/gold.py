"""A measure that nothing is trained on: bytes saved, on pictures that still show what was asked for."""

import torch

from tropism.rewards.jpeg import bytes_above_flat
from tropism.worlds import shapes

BASE = 1625.0
"""Bytes above flat of the bundled model's own pictures (docs/shapes.md)."""


def useful_saving(images: torch.Tensor, batch) -> torch.Tensor:
    """(B,), at most 1: the share of the base's bytes above flat that a picture saves; 0 unless the parser reads its whole prompt off it."""
    right = shapes.accuracy(images, batch.prompts)["all"]
    return right * (1 - bytes_above_flat(images).to(right) / BASE)
