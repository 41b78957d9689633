"""How well scores of pictures agree with people, or with an exact count: correlations, levels, pairs, each with an interval.

Every interval is over pictures: a picture is drawn with all of its ratings, since ratings of one picture are not independent.
Source: Weighted Kappa, Cohen 1968; Computing Krippendorff's Alpha-Reliability, Krippendorff 2011; Better Bootstrap Confidence Intervals,
Efron 1987.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tropism.core import UserError
from tropism.restore import resampled
from tropism.restore.krippendorff import METRICS, alpha, coincidences
from tropism.restore.levels import LOWEST
from tropism.restore.ratings import Ratings, Scores

FEWEST = 3
"""Pictures, below which no agreement is told."""
MEASURES = ("pearson", "spearman", "kendall", "pairwise", "kappa", "auroc")


@dataclass(frozen=True)
class Measure:
    """A value with the ends of its 95 % interval over pictures. None: not defined, and `why` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"not defined: {self.why}"
        return f"{self.value:+.3f} " + (f"(no interval: {self.why})" if self.low is None else self._interval())

    def _interval(self) -> str:
        return f"[{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Agreement:
    """How scores agree with people over `pictures` pictures.

    pearson, spearman, kendall (tau-b): correlations, in [-1, 1]. pairwise: the share of pairs ordered alike, among those that neither
    side leaves tied; told_apart: the share of the pairs that people tell apart which the scores tell apart too. kappa: quadratic weights,
    of levels, means rounded with halves up. auroc: how often a picture that people call wrong (above) has the higher score, ties
    counting half. ceiling: the largest Spearman that scores without ties could reach, given people's ties. alpha: Krippendorff's, between
    the raters, by metric; empty where no single ratings are known. notes: what was turned, left out or should be known.
    """

    pictures: int
    pearson: Measure
    spearman: Measure
    kendall: Measure
    pairwise: Measure
    kappa: Measure
    auroc: Measure
    ceiling: float | None
    told_apart: float | None
    alpha: dict[str, Measure]
    raters: int
    ratings: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{name:22s}{getattr(self, name)}" for name in MEASURES]
        lines += [f"{'alpha ' + metric:22s}{found}" for metric, found in self.alpha.items()]
        shares = {"ceiling of spearman": self.ceiling, "pairs told apart": self.told_apart}
        lines += [f"{name:22s}{'not defined' if v is None else f'{v:+.3f}'}" for name, v in shares.items()]
        who = f", {self.ratings} ratings of {self.raters} people" if self.raters else ""
        return "\n".join([f"{self.pictures} pictures{who}", *lines, *self.notes])


def agreement(
    scores: Scores,
    human: Scores | Ratings,
    *,
    above: float | None = None,
    common: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> Agreement:
    """How `scores` agree with `human`: people's ratings, or one number a picture such as their mean or an exact count.

    above: a picture counts as wrong where people's number is above this, higher being worse; default half a level above the lowest, so
    that the mean of many raters is not wrong for one of them, and of other numbers than levels the lowest there is. common: compare the
    pictures that both have, instead of refusing others. draws: of the bootstrap, by `seed`. Where higher is better, numbers are turned,
    and the notes say so.
    Raises UserError for names that only one side has, and fewer than 3 pictures.
    """
    if draws < 100:
        raise UserError(f"draws is {draws}; the ends of a 95 % interval need at least 100. Try draws=2000.")
    means = human.means if isinstance(human, Ratings) else human
    names, notes = _names(scores, means, common)
    notes += [_turned(side.source) for side in (scores, means) if not side.higher_is_worse]
    x, y = (np.array([side.worse_up.values[n] for n in names], float) for side in (scores, means))
    least = (LOWEST + 0.5 if means.levels else float(y.min())) if above is None else above
    levels = scores.levels and means.levels
    found = _measured(x, y, least, levels, draws, seed)
    raters, many, alphas = 0, 0, {}
    if isinstance(human, Ratings):
        table = human.table(names)
        raters, many = int((~np.isnan(table)).any(1).sum()), int((~np.isnan(table)).sum())
        alphas = _alphas(table, draws, seed)
    return Agreement(
        len(names),
        **found,
        ceiling=ceiling(y),
        told_apart=_told_apart(x, y),
        alpha=alphas,
        raters=raters,
        ratings=many,
        notes=tuple(notes),
    )


def ceiling(human: Sequence[float] | np.ndarray) -> float | None:
    """The largest Spearman correlation that any numbers without ties can have with `human` (n,), given its own ties.

    sqrt(1 - sum(t^3 - t) / (n^3 - n)) over groups of t equal values; None if all are equal. Numbers that are tied where `human` is can
    come closer to 1. Source: the variance of tied ranks, Kendall, Rank Correlation Methods, chapter 3.
    """
    y = np.asarray(human, float)
    t, n = np.unique(y, return_counts=True)[1].astype(float), float(len(y))
    return None if len(t) < 2 else math.sqrt(1 - float((t**3 - t).sum()) / (n**3 - n))


# ---------------------------------------------------------------------------------------------------- names


def _names(scores: Scores, human: Scores, common: bool) -> tuple[list[str], list[str]]:
    """(names that are compared, notes). Raises UserError."""
    failed = [n for n in scores.left_out if n in human.values]
    only = {
        human.source: [n for n in scores.values if n not in human.values],
        scores.source: [n for n in human.values if n not in scores.values and n not in failed],
    }
    names = [n for n in scores.values if n in human.values]
    notes = [f"{len(failed)} pictures have no score and are left out, the first {failed[0]!r}."] if failed else []
    for lacking, missing in only.items():
        if missing and not common:
            raise UserError(
                f"{lacking} has nothing for {_listed(missing)} of {len(missing) + len(names)} pictures"
                f"{_alike(missing, lacking, scores, human)}. Name them alike, or compare the {len(names)} that both have by common=True."
            )
        if missing:
            notes.append(f"{len(missing)} pictures are left out, for which {lacking} has nothing.")
    if len(names) < FEWEST:
        raise UserError(
            f"{scores.source} and {human.source} have {len(names)} pictures in common; agreement needs at least {FEWEST}, and dozens "
            "for an interval that says anything. Score and rate more pictures."
        )
    return names, notes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(n) for n in names[:3]) + more


def _alike(missing: Iterable[str], lacking: str, scores: Scores, human: Scores) -> str:
    """What a missing name may be called on the other side."""
    there = list((human if lacking == human.source else scores).values)
    stem = lambda name: name.rsplit("/", 1)[-1].split(".")[0].lower()
    close = {stem(n): n for n in there}
    found = [(n, close[stem(n)]) for n in missing if stem(n) in close]
    return f" (is {found[0][0]!r} there called {found[0][1]!r}?)" if found else ""


def _turned(source: str) -> str:
    return f"In {source} higher is better; its numbers were turned, so that higher is worse on both sides."


# ---------------------------------------------------------------------------------------------------- measures


def _measured(x: np.ndarray, y: np.ndarray, above: float, levels: bool, draws: int, seed: int) -> dict[str, Measure]:
    """Every measure of x and y (n,), both higher for worse."""
    places, counts = np.unique(np.stack([x, y], 1), axis=0, return_counts=True)
    (gx, gy), (level_x, level_y) = places.T, np.floor(places + 0.5).T
    wrong = gy > above

    def statistics(w: np.ndarray) -> dict[str, np.ndarray]:
        found = resampled.correlations(gx, gy, w)
        found["kappa"] = resampled.kappa(level_x, level_y, w) if levels else np.full(len(w), math.nan)
        return found | {"auroc": resampled.auroc(gx, wrong, w)}

    value = {k: float(v[0]) for k, v in statistics(counts[None].astype(float)).items()}
    ends = resampled.intervals(statistics, counts, draws, seed)
    flat = {name: np.ptp(v) == 0 for name, v in (("score", x), ("rating", y))}
    return {k: _measure(value[k], ends[k], _why(k, flat, levels, wrong.all(), above)) for k in MEASURES}


def _measure(value: float, ends: tuple[float, float], why: str) -> Measure:
    if math.isnan(value):
        return Measure(None, why=why)
    if math.isnan(ends[0]):
        return Measure(value, why="in most draws of the pictures it is not defined")
    return Measure(value, *ends)


def _why(name: str, flat: dict[str, bool], levels: bool, all_wrong: bool, above: float) -> str:
    """Why a measure has no value."""
    if name == "kappa" and not levels:
        return "it is for levels from 1 to 5 on both sides"
    if name == "auroc":
        return f"people put {'every' if all_wrong else 'no'} picture above {above:g}; give another `above`"
    same = [side for side, is_flat in flat.items() if is_flat]
    if same:
        return f"every picture has the same {' and the same '.join(same)}"
    return "no pair of pictures is told apart by both sides"


def _told_apart(x: np.ndarray, y: np.ndarray) -> float | None:
    """Of the pairs with different y, the share with different x; None without any."""
    one = lambda v: float(resampled.pairs(np.unique(v, axis=0, return_counts=True)[1][None].astype(float))[0])
    rest = one(np.zeros(len(y))) - one(y)
    return None if rest == 0 else 1 - (one(x) - one(np.stack([x, y], 1))) / rest


def _alphas(table: np.ndarray, draws: int, seed: int) -> dict[str, Measure]:
    """Krippendorff's alpha of ratings (raters, pictures), by metric, its interval over pictures."""
    values, pairs = coincidences(table)
    if not pairs.any():
        return {m: Measure(None, why="no picture has ratings of two people") for m in METRICS}
    kept, counts = np.unique(pairs.reshape(len(pairs), -1), axis=0, return_counts=True)

    def statistics(w: np.ndarray) -> dict[str, np.ndarray]:
        tables = (w @ kept).reshape(len(w), len(values), len(values))
        return {m: alpha(values, tables, m) for m in METRICS}

    value = {m: float(v[0]) for m, v in statistics(counts[None].astype(float)).items()}
    ends = resampled.intervals(statistics, counts, draws, seed)
    return {m: _measure(value[m], ends[m], "every rating is the same level") for m in METRICS}
