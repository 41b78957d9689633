"""What the runs of a comparison measured: curves against every axis, the search's choice, paired differences, costs to reach a level."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tropism.run.ledger import AXES


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run. spent: axis -> (n,), from 0 on. columns: measure -> (n,), NaN where it was not measured."""

    spent: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]

    def at(self, axis: str, where: np.ndarray | float, column: str) -> np.ndarray:
        """A column linearly between evaluations, at so much spent; NaN beyond the run's end."""
        x, y = self.spent[axis], self.columns[column]
        inside = np.asarray(where) <= x[-1] * (1 + 1e-9)
        return np.where(inside, np.interp(where, x, y), math.nan)

    def last(self, column: str) -> float:
        return float(self.columns[column][-1])


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run folder, numbers only: what was spent, every held-out column, and as "training_reward" the mean reward of the
    training samples since the evaluation before (of the base model: the first update's).
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    kept = lambda name: name in ("update", "drift", "diversity", "spent") or name.startswith("held_out/")
    rows, since = [], []
    for line in lines:
        since += [line["reward"]] if line.get("reward") is not None else []
        if "held_out/reward" in line:
            told = since or [n["reward"] for n in lines if n.get("reward") is not None][:1]
            rows.append(
                {n: v for n, v in line.items() if kept(n)}
                | ({"training_reward": sum(told) / len(told)} if told else {})
            )
            since = []
    return rows


def curve_of(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """The curve of a run's `evaluations`, the first of the base model."""
    spent = {axis: np.array([row.get("spent", {}).get(axis, 0.0) for row in rows]) for axis in AXES}
    names = [n for n in rows[-1] if n.startswith("held_out/") or n in ("drift", "diversity", "training_reward")]
    value = lambda row, name: math.nan if row.get(name) is None else float(row[name])
    columns = {n.removeprefix("held_out/"): np.array([value(row, n) for row in rows]) for n in names}
    if "drift" in columns:
        columns["drift"] = np.nan_to_num(columns["drift"], nan=0.0)  # the base itself has not drifted
    return Curve(spent, columns)


LAST = "last/"
"""What is put before the gold measure of a run's last weights where its best ones are kept."""


def kept_best(curve: Curve, gold: str) -> Curve:
    """The curve of what a run that keeps its best weights would hand over: at every evaluation the columns of the best one so far by the
    held-out "reward", the first of equals. The gold measure never chooses; that of the weights as they were stays as LAST + gold.
    """
    score = np.nan_to_num(curve.columns["reward"], nan=-math.inf)
    at = [int(np.argmax(score[: i + 1])) for i in range(len(score))]
    best = {n: v if n == "training_reward" else v[at] for n, v in curve.columns.items()}
    return Curve(curve.spent, {**best, LAST + gold: curve.columns[gold]})


def chosen(tried: Sequence[Sequence[Curve | None]], column: str) -> int:
    """The configuration (its runs, None for one that blew up) whose last `column` is highest in the mean over tuning seeds.

    One that blew up on any seed, or whose score is not finite there, loses to every one that did not.
    """
    last = lambda c: math.nan if c is None else c.last(column)
    means = [np.mean([last(c) for c in runs]) if runs else math.nan for runs in tried]
    return int(np.argmax(np.nan_to_num(means, nan=-math.inf)))


def cost_to_reach(curve: Curve, level: float, column: str, axis: str) -> float:
    """What was spent when the column first was at `level`, linearly between evaluations; infinite if it never was."""
    x, y = curve.spent[axis], curve.columns[column]
    if y[0] >= level:
        return 0.0
    for i in range(1, len(y)):
        if y[i] >= level:
            share = (level - y[i - 1]) / (y[i] - y[i - 1])
            return float(x[i - 1] + share * (x[i] - x[i - 1]))
    return math.inf


def mean_over(curve: Curve, axis: str, limit: float, column: str) -> float:
    """The mean of a column over what was spent from nothing to `limit`, linearly between evaluations: how good a run was all along."""
    x = np.unique([*curve.spent[axis][curve.spent[axis] < limit], limit])
    return float(np.trapezoid(curve.at(axis, x, column), x) / limit)


def paired(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of ours - theirs, pair by pair, with Student's interval."""
    from scipy.stats import t

    d = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    half = t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def diversity_at(curve: Curve, gold: str, level: float) -> float:
    """The diversity of a run where its gold score first was at `level`, linearly between evaluations; NaN if it never was, and for
    a level below the base model's.
    """
    y, d = curve.columns[gold], curve.columns["diversity"]
    if level <= y[0]:
        return float(d[0]) if level == y[0] else math.nan
    for i in range(1, len(y)):
        if y[i] >= level:
            share = 1.0 if y[i] == y[i - 1] else min(1.0, max(0.0, (level - y[i - 1]) / (y[i] - y[i - 1])))
            return float(d[i - 1] + share * (d[i] - d[i - 1]))
    return math.nan


def band(curves: Sequence[Curve], axis: str, column: str, n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, standard deviation) over the runs, up to where the shortest of them ends."""
    x = np.linspace(0, min(c.spent[axis][-1] for c in curves), n)
    values = np.stack([c.at(axis, x, column) for c in curves])
    return x, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(n)
