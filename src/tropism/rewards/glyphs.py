"""Rewards of the `glyphs` world: nearness to the original in the features of a small encoder that ships with it.

`glyphs-features` is for training, `glyphs-judge`, of another build, for watching, and `glyphs-random`, untrained, is the control.
"""

from __future__ import annotations

from functools import partial

from tropism.rewards.feature_distance import FeatureDistance
from tropism.worlds.glyphs_features import encoder


def nearness(name: str) -> FeatureDistance:
    """Minus the mean, over slots, of 1 - cosine of the encoder's last vectors, (B,) in [-2, 0]; needs batch.reference (B, 3, 32, 32)."""
    return FeatureDistance(encoder(name), tokens="patch", name=f"glyphs-{name}", source="tropism pretrain glyphs")


REWARDS = {f"glyphs-{name}": partial(nearness, name) for name in ("features", "judge", "random")}
