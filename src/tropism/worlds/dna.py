"""A world of regulatory DNA: sequences of 200 bases from a motif grammar, with known activities in two cell types and a hidden one.

Tokens are 0..3 for A, C, G, T. Backgrounds are first-order Markov chains of three GC levels; on them stand 0 to 6 binding sites of
known factors, either strand, sometimes several of one factor in a row. Consensus sequences are textbook ones, not measured matrices.
Activities are smooth in the bases, so that they also score probabilities (B, L, 4) and have gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ALPHABET = "ACGT"
LENGTH = 200
MOTIFS = {
    "HNF4A": "AGGTCANAGGTCA",
    "HNF1A": "GTTAATNATTAAC",
    "FOXA": "TGTTTAC",
    "CEBPB": "TTGCGCAA",
    "GATA1": "WGATAR",
    "SP1": "GGGGCGGGG",
    "AP1": "TGASTCA",
    "NRF1": "GCGCATGCGC",
    "SNAI": "CAGGTG",
}
"""Consensus by factor; W = A/T, R = A/G, S = C/G, N = any."""
_CODES = {"A": "A", "C": "C", "G": "G", "T": "T", "W": "AT", "R": "AG", "S": "CG", "N": "ACGT"}
KEPT = 0.85
"""Chance of a consensus base in a site."""

LIVER = {"HNF4A": 1.4, "HNF1A": 1.2, "FOXA": 0.9, "CEBPB": 0.8, "AP1": 0.3, "SP1": 0.3, "SNAI": -1.0}
BLOOD = {"GATA1": 1.5, "SP1": 0.5, "AP1": 0.5, "NRF1": 0.4, "SNAI": -0.6}
GOLD = {"HNF4A": 1.1, "HNF1A": 1.3, "FOXA": 1.0, "CEBPB": 0.6, "AP1": 0.2, "NRF1": 0.3, "SNAI": -1.2}
"""Weights of the factors: a liver-like cell, a blood-like one, and the liver measured by an assay that guides nothing."""


# ---------------------------------------------------------------------------------------------------- sequences


def matrix(factor: str) -> np.ndarray:
    """Base probabilities (width, 4) of a factor's site."""
    rows = []
    for code in MOTIFS[factor]:
        allowed = [ALPHABET.index(base) for base in _CODES[code]]
        row = np.full(4, (1 - KEPT) / max(4 - len(allowed), 1)) if len(allowed) < 4 else np.full(4, 0.25)
        row[allowed] = KEPT / len(allowed) if len(allowed) < 4 else 0.25
        rows.append(row / row.sum())
    return np.stack(rows)


def _background(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, LENGTH) Markov sequences; a base repeats more often than it should, CG is rare."""
    gc = rng.choice([0.40, 0.48, 0.55], size=n)
    stationary = np.stack([(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2], 1)
    tilt = np.ones((4, 4)) + 0.35 * np.eye(4)
    tilt[1, 2] = 0.35
    steps = stationary[:, None, :] * tilt
    cumulative = (steps / steps.sum(-1, keepdims=True)).cumsum(-1)
    found = np.empty((n, LENGTH), np.int64)
    u = rng.random((n, LENGTH))
    found[:, 0] = (stationary.cumsum(1) < u[:, :1]).sum(1).clip(0, 3)
    for i in range(1, LENGTH):
        found[:, i] = (cumulative[np.arange(n), found[:, i - 1]] < u[:, i : i + 1]).sum(1).clip(0, 3)
    return found


def sequences(n: int, seed: int) -> Tensor:
    """(n, 200) tokens of the world, a pure function of n and seed."""
    rng = np.random.default_rng([20_240_808, seed])
    found, factors = _background(n, rng), list(MOTIFS)
    for row in found:
        count = rng.integers(0, 7)
        same = rng.random() < 0.3
        chosen = (
            [factors[rng.integers(len(factors))]] * count
            if same
            else [factors[i] for i in rng.integers(0, len(factors), count)]
        )
        for factor in chosen:
            site = np.array([rng.choice(4, p=p) for p in matrix(factor)])
            if rng.random() < 0.5:
                site = 3 - site[::-1]
            at = rng.integers(0, LENGTH - len(site))
            row[at : at + len(site)] = site
    return torch.from_numpy(found)


def text(tokens: Tensor) -> list[str]:
    """Letters of tokens (B, L)."""
    return ["".join(ALPHABET[i] for i in row) for row in tokens.tolist()]


def one_hot(samples: Tensor) -> Tensor:
    """(B, L, 4) of tokens; probabilities as they are."""
    return samples if samples.is_floating_point() else F.one_hot(samples, 4).to(torch.float32)


# ---------------------------------------------------------------------------------------------------- activity


@cache
def _log_odds(factor: str) -> Tensor:
    """(4, width) log-odds of a site against equal bases, float64."""
    return torch.from_numpy(np.log(matrix(factor) / 0.25)).T.contiguous()


def occupancy(samples: Tensor, factor: str, sharpness: float = 1.5, threshold: float = 0.65) -> Tensor:
    """(B, positions) in [0, 1]: how well a site of the factor stands at each place, the better strand's.

    A place with `threshold` of the largest log-odds is half occupied.
    """
    bases = one_hot(samples).transpose(1, 2)
    weights = _log_odds(factor).to(bases)
    best = weights.clamp_min(0).amax(0).sum() * threshold
    both = torch.stack([weights, weights.flip(0, 1)])
    scores = F.conv1d(bases, both)
    return torch.sigmoid(sharpness * (scores - best)).amax(1)


def activity(samples: Tensor, weights: Mapping[str, float], synergy: float = 0.6, threshold: float = 0.65) -> Tensor:
    """(B,): weighted, saturating sums of occupancies, a bonus for HNF4A and HNF1A sites 10 to 60 bases apart, squashed to (-3, 3).

    samples: tokens (B, L), or probabilities (B, L, 4).
    """
    places = {f: occupancy(samples, f, threshold=threshold) for f in weights}
    total = sum((w * torch.tanh(places[f].sum(1) / 1.5) for f, w in weights.items()), torch.zeros(()))
    if "HNF4A" in weights and "HNF1A" in weights:
        near = F.conv1d(places["HNF1A"][:, None], places["HNF1A"].new_ones(1, 1, 51))[:, 0, 10:]
        pairs = (places["HNF4A"][:, : near.shape[1]] * near).sum(1)
        total = total + synergy * torch.tanh(pairs)
    return 3 * torch.tanh((total - 0.3) / 3)


def liver(samples: Tensor, batch=None) -> Tensor:
    """Activity in the liver-like cell, about -1 to 2.5."""
    return activity(samples, LIVER)


def specific(samples: Tensor, batch=None) -> Tensor:
    """Activity in the liver-like cell less that in the blood-like one."""
    return activity(samples, LIVER) - activity(samples, BLOOD)


def gold(samples: Tensor, batch=None) -> Tensor:
    """The hidden assay: other weights, a stricter threshold, no pair bonus, and a loss for runs of one base."""
    runs = longest_run(samples.argmax(-1) if samples.is_floating_point() else samples)
    return activity(samples, GOLD, synergy=0.0, threshold=0.75) - 0.15 * (runs - 6).clamp_min(0)


# ---------------------------------------------------------------------------------------------------- measures


def longest_run(tokens: Tensor) -> Tensor:
    """(B,) length of the longest run of one base."""
    longest, current = torch.ones(len(tokens)), torch.ones(len(tokens))
    for i in range(1, tokens.shape[1]):
        current = torch.where(tokens[:, i] == tokens[:, i - 1], current + 1, 1.0)
        longest = torch.maximum(longest, current)
    return longest


def gc(tokens: Tensor) -> Tensor:
    """(B,) share of C and G."""
    return ((tokens == 1) | (tokens == 2)).float().mean(1)


def words(tokens: Tensor, k: int = 3) -> Tensor:
    """(4^k,) share of each word of k bases over all sequences."""
    place = 4 ** torch.arange(k - 1, -1, -1)
    numbers = (tokens.unfold(1, k, 1) * place).sum(-1).flatten()
    return torch.bincount(numbers, minlength=4**k).double() / len(numbers)


def sites(tokens: Tensor) -> dict[str, Tensor]:
    """{factor: (B,) sites that are more than half occupied}."""
    return {f: (occupancy(tokens, f) > 0.5).sum(1) for f in MOTIFS}
