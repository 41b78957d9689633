"""The dial of an adapter: what its strength, or the weights of two, do to reward and diversity; measured, predicted, recommended.

The prediction needs a few pictures at three probe settings beside those that training has left (strength 0 and 1, or the two
adapters alone). It is a regression estimator (Cochran, Sampling Techniques, 3rd ed., chapter 7): a probe picture is compared with
what the run's pictures of the same prompt and noise say, so that the probes need only tell how far the truth bends off the straight line
(and are believed the less, the more they disagree).
Diversity is the same on pairs of pictures, whose mean distance is a U-statistic and so without bias however few they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from tropism.core import Batch, Reward, UserError, scored_parts
from tropism.run.evaluate import Evaluation, diversity, finite_mean

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths of one adapter that are drawn."""
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the second of two adapters; the first has the rest."""
PROBES = {1: {0.5: 4, 1.25: 4, 1.5: 8}, 2: {0.25: 5, 0.5: 6, 0.75: 5}}
"""Where the prediction's own 16 pictures are drawn, and how many at each place, by the number of adapters.

Half of them at 1.5, where pictures break down in different ways.
"""
PHASES = ("early", "middle", "late")
STRONGEST = 2.0


@dataclass(frozen=True)
class Stop:
    """A setting of the dial. group: "" or the phase that is varied; place: the strength, or the second adapter's weight.

    weights: the strength, the strengths of the three phases, or the weights of two adapters.
    """

    group: str
    place: float
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        if self.group:
            return f"{self.group} {self.place:g}"
        return " + ".join(f"{w:g}" for w in self.weights)


def stops(places: Sequence[float], adapters: int, phases: bool = False) -> list[Stop]:
    """The settings of a dial of one or two adapters; with phases, also each third of the chain varied with the others as trained.

    Raises UserError for no places, or one that is not a finite number in [0, 2] (weights: [0, 1]).
    """
    most = STRONGEST if adapters == 1 else 1.0
    what = "strength" if adapters == 1 else "weight of the second adapter"
    for place in places:
        if not (math.isfinite(place) and 0 <= place <= most):
            raise UserError(f"The {what} is {place:g}; it must lie in 0..{most:g}. Try --at 0 --at 0.5 --at 1.")
    if len(set(places)) < 2:
        raise UserError(f"The dial has {len(set(places))} settings; it needs at least 2. Try --at 0 --at 1.")
    ordered = sorted(set(places))
    if adapters == 2:
        return [Stop("", w, (1 - w, w)) for w in ordered]
    found = [Stop("", s, (s,)) for s in ordered]
    for k, phase in enumerate(PHASES if phases else ()):
        found += [Stop(phase, s, tuple(s if i == k else 1.0 for i in range(3))) for s in ordered if s != 1]
    return found


class Several:
    """The rewards of several runs, each under its run's name; the total is their sum."""

    name, differentiable = "rewards", False

    def __init__(self, rewards: dict[str, Reward]):
        self.rewards = rewards

    def parts(self, samples: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {name: scored_parts(reward, samples, batch)[0] for name, reward in self.rewards.items()}

    def total(self, parts: dict[str, Tensor], batch: Batch) -> Tensor:
        return cast(Tensor, sum(parts.values()))

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return self.total(self.parts(samples, batch), batch)


# ---------------------------------------------------------------------------------------------------- quantities


def distances(images: Tensor) -> Tensor:
    """(n, n) root-mean-square pixel differences of pictures (n, 3, H, W) in [0, 1]; NaN on the diagonal, which is no pair."""
    n, flat = len(images), images.flatten(1)
    found = torch.full((n, n), math.nan, dtype=torch.float64)
    above = torch.triu_indices(n, n, 1)
    found[above[0], above[1]] = found[above[1], above[0]] = torch.pdist(flat).double() * flat.shape[1] ** -0.5
    return found


def quantities(seen: Evaluation) -> dict[str, Tensor]:
    """Every column (n,) of the pictures, and "diversity" (n, n) where there is a pair: its mean is `evaluate.diversity`.

    Where several prompts are there, pairs of one and the same prompt are NaN: a set in which each prompt comes twice is as diverse as
    one of its halves.
    """
    columns = {name: v.double() for name, v in seen.columns.items() if name != "drift"}
    if len(seen.images) < 2:
        return columns
    apart = distances(seen.images)
    if len(set(seen.prompts)) > 1:
        same = torch.tensor([[a == b for b in seen.prompts] for a in seen.prompts])
        apart[same] = math.nan
    return columns | {"diversity": apart}


def some(seen: Evaluation, places: Sequence[int]) -> Evaluation:
    """Some of the pictures, with what was measured on them."""
    at = list(places)
    columns = {name: values[at] for name, values in seen.columns.items()}
    return Evaluation(seen.images[at], columns, [seen.prompts[i] for i in at], diversity(seen.images[at]))


def of_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some pictures' values (k,), or their pairs' (k, k)."""
    chosen = torch.as_tensor(list(rows))
    return values[chosen] if values.ndim == 1 else values[chosen][:, chosen]


def standard_error(values: Tensor) -> float:
    """Of the mean of (n,) values or (n, n) pairs: for pairs by leaving out one picture at a time (jackknife)."""
    n = len(values)
    if n < 3:
        return math.nan
    if values.ndim == 1:
        kept = values[values.isfinite()]
        return (kept.std() / math.sqrt(len(kept))).item() if len(kept) > 1 else math.nan
    without = torch.stack([of_rows(values, [j for j in range(n) if j != i]).nanmean() for i in range(n)])
    return ((n - 1) * without.var(correction=0)).sqrt().item()


# ---------------------------------------------------------------------------------------------------- prediction


def balanced(ends: Sequence[Mapping[str, Tensor]], names: Sequence[str], few: int, among: Sequence[int]) -> list[int]:
    """Which `few` pictures to probe: of 500 drawn sets, the one whose means at both ends are nearest those of all pictures."""
    if len(among) <= few:
        return list(among)
    generator, best = np.random.default_rng(0), (math.inf, list(among[:few]))
    columns = [v for end in ends for name in names if (v := end.get(name)) is not None]
    scales = [(finite_mean(v), max(v[v.isfinite()].std().item(), 1e-12)) for v in columns]
    for _ in range(500):
        rows = sorted(generator.choice(list(among), few, replace=False).tolist())
        apart = [(finite_mean(of_rows(v, rows)) - m) / s for v, (m, s) in zip(columns, scales, strict=True)]
        best = min(best, (sum(a * a for a in apart), rows))
    return best[1]


def plan(
    ends: Sequence[Mapping[str, Tensor]], names: Sequence[str], counts: Mapping[float, int], among: Sequence[int]
) -> dict[float, list[int]]:
    """Which pictures to probe at each place, smaller sets inside larger ones, each balanced."""
    rows = balanced(ends, names, max(counts.values()), among)
    return {place: balanced(ends, names, count, rows) for place, count in counts.items()}


def between(ends: tuple[Tensor, Tensor], place: float) -> Tensor:
    """What each picture's, or pair's, values at 0 and 1 say of a place by a straight line; beyond 1 it stays as at 1."""
    share = min(max(place, 0.0), 1.0)
    return (1 - share) * ends[0] + share * ends[1]


def bend(ends: tuple[Tensor, Tensor], probe: Tensor, rows: Sequence[int], place: float) -> tuple[float, float]:
    """How far the mean at a place lies off the straight line, by the probed pictures or pairs, without bias; and its standard error."""
    off = probe - of_rows(between(ends, place), rows)
    return finite_mean(off), standard_error(off)


def knot(ends: tuple[Tensor, Tensor], probe: Tensor, rows: Sequence[int], place: float) -> float:
    """The mean at a place, of values (n,) or (n, n) known at both ends and probed (k,) or (k, k) on some rows.

    A bend b with standard error e is believed by b^2 / (b^2 + e^2): where five pictures disagree about it, the line is the better guess.
    """
    b, e = bend(ends, probe, rows, place)
    belief = 1.0 if math.isnan(e) or b == 0 else b * b / (b * b + e * e)
    return finite_mean(between(ends, place)) + belief * b


def predict(
    ends: tuple[Tensor, Tensor], probes: Mapping[float, tuple[Tensor, Sequence[int]]], at: Sequence[float]
) -> list[float]:
    """The mean at every place of `at`: monotone cubics (Fritsch and Carlson, 1980) through the ends and the probes' knots.

    ends: per-picture values (n,), or per-pair (n, n), at places 0 and 1. probes: place -> (the same of some pictures, which these are).
    Beyond the last knot the curve goes on as its last piece does.
    """
    found = {0.0: finite_mean(ends[0]), 1.0: finite_mean(ends[1])}
    found |= {p: knot(ends, values, rows, p) for p, (values, rows) in probes.items() if p not in found}
    places = sorted(found)
    curve = PchipInterpolator(places, [found[p] for p in places])
    return [float(v) for v in curve(np.asarray(at, dtype=np.float64))]


def error_share(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """The mean absolute error of a prediction in shares of the measured range; NaN where nothing varies."""
    a, b = torch.tensor(predicted, dtype=torch.float64), torch.tensor(measured, dtype=torch.float64)
    span = (b.max() - b.min()).item()
    return (a - b).abs().mean().item() / span if span > 0 else math.nan


# ---------------------------------------------------------------------------------------------------- recommendation


def recommend(
    rewards: Sequence[Sequence[float]], diversity: Sequence[float] | None, base: float | None, keep: float
) -> tuple[int, bool]:
    """(which of the settings, whether any keeps enough): the most reward of those with at least `keep` of the base's diversity.

    rewards: of one adapter, or of two, one list each. For two the worse-off counts: each reward in shares of what its own
    adapter alone gives over what the other alone gives, first and last setting. Without such a setting the most diverse one. Ties go
    to the earlier setting. diversity None: every setting keeps enough.
    """
    if len(rewards) == 1:
        score = list(rewards[0])
    else:
        share = lambda values, own, other: [(v - other) / ((own - other) or 1.0) for v in values]
        first, second = rewards
        score = [
            min(pair)
            for pair in zip(share(first, first[0], first[-1]), share(second, second[-1], second[0]), strict=True)
        ]
    varied = [math.inf] * len(score) if diversity is None or base is None else list(diversity)
    enough = [i for i, d in enumerate(varied) if d >= keep * (base or 0.0)]
    if enough:
        return max(enough, key=lambda i: (score[i], -i)), True
    return max(range(len(varied)), key=lambda i: (varied[i], -i)), False
