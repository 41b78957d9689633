"""How well two columns over pictures agree, in many resamplings of the pictures at once.

A resampling is how often each picture was drawn, so every statistic here takes counts (D, G): one formula gives the value itself
(each picture once), its bootstrap distribution and its jackknife. Each equals scipy.stats' own on the drawn-out sample.
Source: An Introduction to the Bootstrap, Efron and Tibshirani 1993, section 14.3 (BCa); What Teachers Should Know about the
Bootstrap, Hesterberg 2015, arXiv 1411.5279 (the expanded percentile interval, by Student's t); Weighted Kappa, Cohen 1968; Rank
Correlation Methods, Kendall 1970, chapter 3 (ties).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import t

from tropism.noise import Stream, generator

PIECE = 2_000_000
"""Numbers that are held at a time."""
LEVEL = 0.95
Statistics = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Counts (D, G) -> {name: (D,)}, NaN where a statistic is not defined."""


def intervals(statistics: Statistics, counts: np.ndarray, draws: int, seed: int) -> dict[str, tuple[float, float]]:
    """The ends of each statistic's 95 % bootstrap interval (bias-corrected and accelerated), NaN where it has none.

    counts: (G,) pictures in each group of pictures that are equal to the statistics; drawing pictures with replacement is one
    multinomial draw over the groups. Draws in which a statistic is not defined are left out; of too few others it has no interval.
    """
    n, size = int(counts.sum()), max(1, PIECE // len(counts))
    rng = generator(seed, Stream.EVAL, 0)
    sizes = [min(size, draws - done) for done in range(0, draws, size)]
    drawn = _joined([statistics(rng.multinomial(n, counts / n, k).astype(float)) for k in sizes])
    one, there = np.eye(len(counts))[counts > 0], counts[counts > 0]
    left_out = _joined([statistics(counts - one[i : i + size]) for i in range(0, len(one), size)])
    value = statistics(counts[None].astype(float))
    return {k: _bca(float(value[k][0]), drawn[k], left_out[k], there) for k in value}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _bca(value: float, drawn: np.ndarray, left_out: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Efron's interval from the draws (D,) and the values without one picture of each group (G,) of `counts`."""
    kept = drawn[~np.isnan(drawn)]
    if math.isnan(value) or len(kept) < len(drawn) / 2 or not len(kept):
        return math.nan, math.nan
    fair = (
        np.mean(kept < value) + np.mean(kept == value) / 2
    )  # half of what is tied, or a coarse statistic looks biased
    shift = float(ndtri(np.clip(fair, 1 / (2 * len(kept)), 1 - 1 / (2 * len(kept)))))
    known = ~np.isnan(left_out)
    pull = np.average(left_out[known], weights=counts[known]) - left_out[known] if known.any() else np.zeros(1)
    often = counts[known] if known.any() else np.ones(1)
    second = float((often * pull**2).sum())
    speed = float((often * pull**3).sum()) / (6 * second**1.5) if second > 0 else 0.0
    low, high = np.quantile(kept, [_place(shift, speed, z) for z in (-_reach(counts.sum()), _reach(counts.sum()))])
    return float(low), float(high)


def _reach(n: float) -> float:
    """The normal quantile of an end, widened as Student's interval of n pictures is: the bootstrap's own is too narrow for few."""
    return float(t.ppf((1 + LEVEL) / 2, n - 1) * math.sqrt(n / (n - 1)))


def _place(shift: float, speed: float, z: float) -> float:
    """The share of the draws below an end of the interval; z: that end's normal quantile."""
    rest = 1 - speed * (shift + z)
    return float(ndtr(shift + (shift + z) / rest)) if rest > 0 else float(speed > 0)  # beyond the pole, of few pictures


# ---------------------------------------------------------------------------------------------------- statistics


def constant(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(D,) whether x (G,) has only one value among the pictures that were drawn."""
    return np.where(w > 0, x, -np.inf).max(1) == np.where(w > 0, x, np.inf).min(1)


def pearson(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(D,) the correlation of x and y, each (G,) or (D, G), where picture g counts w[:, g] times; NaN without spread."""
    n = w.sum(1, keepdims=True)
    dx, dy = (v - (w * v).sum(1, keepdims=True) / n for v in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((w * dx * dy).sum(1) / np.sqrt((w * dx**2).sum(1) * (w * dy**2).sum(1)), -1, 1)


def held(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pictures have each of x's values, in their order (D, U), and where each group's value stands there (G,)."""
    values, at = np.unique(x, return_inverse=True)
    order = np.argsort(at, kind="stable")
    starts = np.searchsorted(at[order], np.arange(len(values)))
    return np.add.reduceat(w[:, order], starts, axis=1), at


def ranks(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(D, G) ranks from 1 on, equal values sharing the mean of theirs."""
    many, at = held(x, w)
    return (many.cumsum(1) - (many - 1) / 2)[:, at]


def pairs(many: np.ndarray) -> np.ndarray:
    """(D,) pairs of pictures within the same group, of (D, U) pictures a group."""
    return (many * (many - 1)).sum(1) / 2


def concordant_less_discordant(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(D,) pairs that x and y order alike less those that they order oppositely."""
    found, wide = np.zeros(len(w)), max(1, PIECE // len(x))
    for i in range(0, len(x), wide):
        part = slice(i, i + wide)
        signs = np.sign(x[:, None] - x[None, part]) * np.sign(y[:, None] - y[None, part])
        found += ((w @ signs) * w[:, part]).sum(1)
    return found / 2


def kappa(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(D,) Cohen's kappa with quadratic weights, of whole levels (G,): 1 - E (x - y)^2 over what independent levels would have."""
    mean = lambda v: (w * v).sum(1) / w.sum(1)
    expected = mean(x**2) + mean(y**2) - 2 * mean(x) * mean(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - mean((x - y) ** 2) / np.where(expected > 0, expected, np.nan)


def auroc(x: np.ndarray, wrong: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(D,) how often a wrong picture (G, bool) has the higher x than one that is not, ties counting half."""
    bad = (w * wrong).sum(1)
    both = bad * (w.sum(1) - bad)
    above = (w * wrong * ranks(x, w)).sum(1) - bad * (bad + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return above / np.where(both > 0, both, np.nan)


def correlations(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    """{name: (D,)} of Pearson, Spearman, Kendall's tau-b, and the accuracy on pairs that neither x nor y (G,) leaves tied.

    Groups of equal (x, y) are expected, each pair of values once: pictures of one group are tied in both.
    """
    flat = constant(x, w) | constant(y, w)
    total, tied_x, tied_y = pairs(w.sum(1, keepdims=True)), pairs(held(x, w)[0]), pairs(held(y, w)[0])
    difference, told = concordant_less_discordant(x, y, w), total - tied_x - tied_y + pairs(w)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "pearson": pearson(x, y, w),
            "spearman": pearson(ranks(x, w), ranks(y, w), w),
            "kendall": difference / np.sqrt((total - tied_x) * (total - tied_y)),
            "pairwise": (1 + difference / told) / 2,
        }
    return {k: np.where(flat, np.nan, v) for k, v in found.items()}
