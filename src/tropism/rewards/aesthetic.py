"""Aesthetics: a small head on CLIP's image embedding: LAION's published one, or our own trained from pairwise votes.

It is a proxy for the voters' taste, and can be driven up while the taste goes down.
Source: LAION-Aesthetics predictor V2 (a head on the unit embedding, as DDPO, arXiv 2305.13301, uses it); Bradley and
Terry, Rank Analysis of Incomplete Block Designs, Biometrika 1952 (the votes).
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tropism.core import Batch, UserError
from tropism.rewards.clip import Clip, load_clip
from tropism.rewards.frozen import Frozen
from tropism.rewards.sources import NOT_CONFIRMED, OWN, About, read_weights
from tropism.worlds import weights

LAION_CLIP = "openai/clip-vit-large-patch14"
LAION_HEAD, LAION_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class Head(nn.Module):
    """Unit embeddings (B, width) -> scores (B,), unbounded; only differences between scores mean anything."""

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        self.scale = width**0.5  # entries of a unit vector of this width have a root mean square of 1 / scale
        self.hidden, self.score = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.score(F.silu(self.hidden(self.scale * embeddings)))[:, 0]


class LinearHead(nn.Module):
    """Features (B, width) -> scores (B,): linear layers with nothing between them, as LAION and ImageReward publish.

    Together they are one affine map. They are kept apart so that float32 rounds as it did for their authors.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0]) for weight, _ in layers)
        for layer, (weight, bias) in zip(self.layers, layers, strict=True):
            layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features)
        return features[:, 0]


def linear_head(state: dict[str, Tensor], width: int, source: str) -> LinearHead:
    """The head of a state dict "layers.N.weight", "layers.N.bias"; the numbers left out are dropout, off when judging.

    Raises UserError unless it leads from `width` to one number.
    """
    numbers = sorted(int(n[1]) for name in state if (n := re.fullmatch(r"layers\.(\d+)\.weight", name)))
    layers = [(state[f"layers.{n}.weight"], state.get(f"layers.{n}.bias")) for n in numbers]
    widths = [weight.shape[1] for weight, _ in layers] + [1]
    fits = [w.shape[0] == after and b is not None for (w, b), after in zip(layers, widths[1:], strict=True)]
    if not layers or widths[0] != width or not all(fits):
        raise UserError(
            f"{source} holds no head of linear layers from {width} features to 1 score (found widths {widths}). "
            "Give the head that was trained on this network."
        )
    return LinearHead([(weight, bias) for weight, bias in layers if bias is not None])


def bradley_terry_loss(score_a: Tensor, score_b: Tensor, a_preferred: Tensor) -> Tensor:
    """Mean negative log-likelihood of votes: P(a preferred) = sigmoid(score_a - score_b).

    Scores (P,); a_preferred (P,) in [0, 1], or booleans: the share of voters that chose a.
    """
    return F.binary_cross_entropy_with_logits(score_a - score_b, a_preferred.to(score_a))


class Aesthetic:
    """The reward head(embedding of the picture), (B,); prompts are not read. Differentiable."""

    differentiable = True

    def __init__(self, clip: Clip, head: nn.Module, name: str = "aesthetic", about: About | None = None):
        self.clip, self.head, self.name, self.about = clip, Frozen(head), name, about

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return self.head.like(samples)(self.clip.images(samples))


def laion_aesthetic(head: str = LAION_HEAD, clip: str = LAION_CLIP) -> Aesthetic:
    """The reward `aesthetic`: LAION's predictor V2 on OpenAI's CLIP L/14, about 1 to 10 for pictures, unbounded.

    head: a .pth or .safetensors file, its folder, or a hub id. Raises UserError where either cannot be read.
    """
    seen = load_clip(clip)
    layers = linear_head(read_weights(head, LAION_FILE), seen.width, head)
    about = About((float("-inf"), float("inf")), seen.size, NOT_CONFIRMED, f"{head} on {clip}")
    return Aesthetic(seen, layers, "aesthetic" if head == LAION_HEAD else f"aesthetic:{head}", about)


def shapes_aesthetic() -> Aesthetic:
    """The reward `shapes-aesthetic`: the bundled head on the bundled CLIP of the shapes world."""
    state = load_file(weights.path("shapes/aesthetic.safetensors"))
    hidden, width = state["hidden.weight"].shape
    head = Head(width, hidden)
    head.load_state_dict(state)
    clip = load_clip(str(weights.path("shapes/clip")))
    return Aesthetic(clip, head, "shapes-aesthetic", About((float("-inf"), float("inf")), clip.size, OWN, "bundled"))
