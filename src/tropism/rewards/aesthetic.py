"""Aesthetics: a small head on CLIP's image embedding, trained from pairwise votes.

It is a proxy for the voters' taste, and can be driven up while the taste goes down.
Source: LAION-Aesthetics predictor V2 (a head on the unit embedding); Bradley and Terry, Rank Analysis of Incomplete
Block Designs, Biometrika 1952 (the votes).
"""

from __future__ import annotations

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tropism.core import Batch
from tropism.rewards.clip import Clip, load_clip
from tropism.rewards.frozen import Frozen
from tropism.worlds import weights


class Head(nn.Module):
    """Unit embeddings (B, width) -> scores (B,), unbounded; only differences between scores mean anything."""

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        self.scale = width**0.5  # entries of a unit vector of this width have a root mean square of 1 / scale
        self.hidden, self.score = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.score(F.silu(self.hidden(self.scale * embeddings)))[:, 0]


def bradley_terry_loss(score_a: Tensor, score_b: Tensor, a_preferred: Tensor) -> Tensor:
    """Mean negative log-likelihood of votes: P(a preferred) = sigmoid(score_a - score_b).

    Scores (P,); a_preferred (P,) in [0, 1], or booleans: the share of voters that chose a.
    """
    return F.binary_cross_entropy_with_logits(score_a - score_b, a_preferred.to(score_a))


class Aesthetic:
    """The reward head(embedding of the picture), (B,); prompts are not read. Differentiable."""

    differentiable = True

    def __init__(self, clip: Clip, head: Head, name: str = "aesthetic"):
        self.clip, self.head, self.name = clip, Frozen(head), name

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return self.head.like(samples)(self.clip.images(samples))


def shapes_aesthetic() -> Aesthetic:
    """The reward `shapes-aesthetic`: the bundled head on the bundled CLIP of the shapes world."""
    state = load_file(weights.path("shapes/aesthetic.safetensors"))
    hidden, width = state["hidden.weight"].shape
    head = Head(width, hidden)
    head.load_state_dict(state)
    return Aesthetic(load_clip(str(weights.path("shapes/clip"))), head, "shapes-aesthetic")
