"""Krippendorff's alpha: how far the raters of the same pictures agree beyond chance, with ratings missing here and there.

alpha = 1 - D_o / D_e, the disagreement within pictures over the disagreement between any two ratings. 1 is agreement, 0 is chance.
Source: Computing Krippendorff's Alpha-Reliability, Krippendorff 2011, sections C to E (also Content Analysis, 4th edition, chapter 12).
"""

from __future__ import annotations

import numpy as np

from tropism.core import UserError

METRICS = ("ordinal", "interval", "nominal")


def krippendorff(table: np.ndarray, metric: str = "ordinal") -> float:
    """Alpha of ratings (raters, pictures), NaN where a rater gave none; NaN if all ratings are one value, when it is not defined.

    metric: what a difference of two ratings weighs. "ordinal": by the ratings that lie between them; "interval": its square;
    "nominal": 1. Raises UserError for another metric, and where no picture has two ratings.
    """
    if metric not in METRICS:
        raise UserError(f"There is no alpha '{metric}'. Take one of {', '.join(METRICS)}.")
    values, pairs = coincidences(np.asarray(table, float))
    if not pairs.any():
        raise UserError(
            "No picture has ratings of two people, so nothing is known of how far they agree. Ask at least two, better three."
        )
    return float(alpha(values, pairs.sum(0)[None], metric)[0])


def coincidences(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values (V,) that occur, and per picture the pairs of ratings of it (pictures, V, V), each weighed 1 / (ratings - 1).

    A picture with fewer than two ratings has no pair; the pairs of another add up to its ratings.
    """
    values = np.unique(table[~np.isnan(table)])
    many = (table[:, :, None] == values).sum(0).astype(float)  # pictures, V
    ratings = many.sum(1)
    pairs = many[:, :, None] * many[:, None, :] - many[:, :, None] * np.eye(len(values))
    return values, np.where(ratings > 1, 1 / np.maximum(ratings - 1, 1), 0.0)[:, None, None] * pairs


def alpha(values: np.ndarray, pairs: np.ndarray, metric: str) -> np.ndarray:
    """(D,) alpha of D tables of coincidences (D, V, V) over the values (V,); NaN where all ratings are one value."""
    held = pairs.sum(2)  # D, V
    n = held.sum(1)
    squared = _differences(values, held, metric)
    observed = (pairs * squared).sum((1, 2))
    expected = np.einsum("dc,dk,dck->d", held, held, squared) / np.maximum(n - 1, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - observed / np.where(expected > 0, expected, np.nan)


def _differences(values: np.ndarray, held: np.ndarray, metric: str) -> np.ndarray:
    """(D or 1, V, V) squared differences of two values."""
    if metric == "nominal":
        return 1 - np.eye(len(values))[None]
    if metric == "interval":
        return ((values[:, None] - values[None]) ** 2)[None]
    middle = held.cumsum(1) - held / 2  # of the ratings in their order: those between c and k, and half of each
    return (middle[:, :, None] - middle[:, None, :]) ** 2
