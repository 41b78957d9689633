"""The page of a scoring: one self-contained file without scripts. Numbers first, then what they cannot tell, then pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import binomtest

from tropism.core import UserError
from tropism.judged.cases import Case
from tropism.restore.distances import Measured
from tropism.restore.levels import HIGHEST, LEVELS
from tropism.restore.scoring import Row, Summary, bootstrap, summary, write_table
from tropism.run.report import environment_of

GRAVE = 4
"""The level from which something important is wrong."""
LONG = 40
"""Rows of the table that are shown at once."""


@dataclass(frozen=True)
class Line:
    """A picture in the table. findings, omissions: a repeat's mean; None where they are not known."""

    name: str
    score: float | None
    error: str = ""
    per_repeat: tuple[float, ...] = ()
    sd: float | None = None
    findings: float | None = None
    omissions: float | None = None
    swap: float | None = None


@dataclass(frozen=True)
class Scored:
    """All that the page tells. what: the folder's name. judge: a model's name, or features:SOURCE. mode: full, gt_only or lr_only.

    levels: whether scores are levels from 1 to 5; else they are distances. runs: a ledger of each run of the command, as JSON values.
    """

    what: str
    judge: str
    mode: str
    levels: bool
    lines: Sequence[Line]
    summary: Summary
    cases: Sequence[Case]
    notes: Sequence[str]
    runs: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: str


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """The table's lines of a judge's rows."""
    return [_judged(row) if row.result else Line(row.name, None, row.error) for row in rows]


def _judged(row: Row) -> Line:
    assert row.result is not None
    found = row.result
    count = sum(not item.omission for item in found.items) / len(found.per_repeat)
    sd = None if math.isnan(found.sd) else found.sd
    per_repeat = tuple(found.per_repeat)
    return Line(row.name, found.score, row.error, per_repeat, sd, count, found.omissions, row.swap_difference)


def measured(rows: Sequence[Measured]) -> tuple[list[Line], Summary]:
    """The table's lines of distances, and their mean with its interval."""
    lines = [Line(row.name, row.score, row.error) for row in rows]
    scores = [row.score for row in rows if row.score is not None]
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    return lines, Summary(mean, *bootstrap(scores), len(scores), len(rows) - len(scores), 0, math.nan)


def judged(rows: Sequence[Row]) -> tuple[list[Line], Summary]:
    """The table's lines of a judge's rows, and their mean with its interval."""
    return lines_of(rows), summary(rows)


# ---------------------------------------------------------------------------------------------------- words


FEW = 8
"""Pictures below which a bootstrap interval covers the mean in less than nine of ten cases."""

SPREAD = 12
"""Pictures above the lowest level below which the interval covers the mean in less than 93 of 100 cases."""


def headline(told: Scored) -> str:
    """The mean and its interval in one sentence, which the command prints too."""
    found, what = told.summary, f"mean of {told.summary.scored} pictures"
    value = f"{found.mean:.2f} (1 is best, 5 worst)" if told.levels else f"{found.mean:.4f} (0: equal features)"
    digits = 2 if told.levels else 4
    interval = (
        "no interval from a single picture"
        if math.isnan(found.low)
        else f"95 % interval {found.low:.{digits}f} to {found.high:.{digits}f}"
    )
    if 1 < found.scored < FEW:
        interval += " (too narrow, of so few)"
    elif told.levels and sum((line.score or 1) > 1 for line in told.lines if line.score is not None) < SPREAD:
        interval += f" (a little too narrow: fewer than {SPREAD} pictures are above level 1)"
    failed = f"; {found.failed} could not be scored" if found.failed else ""
    return f"{'Hallucination score' if told.levels else 'Feature distance'} {value}, {what}, {interval}{failed}."


def unknown(told: Scored) -> list[str]:
    """What these scores cannot tell."""
    agree = "tropism hallucination agree compares them with people's ratings or a known count."
    if not told.levels:
        return [
            "A distance of features does not say what is invented, and it also rises with blur, noise and shifts. It orders pictures; its "
            "unit means nothing. Where it lies is shown patch by patch, each picture in colours of its own.",
            f"How well it follows invented detail on pictures like these is not known from this page; {agree}",
        ]
    said = []
    if told.mode == "lr_only":
        said = [
            "No references were given. The judge saw what went in and what came out, so it finds only what contradicts the input. Detail "
            "that fits the input and is wrong all the same (another digit, another face, other words) is not seen.",
            "So these scores tend to be too low, and they must not be compared with scores made with references.",
        ]
    if told.mode == "gt_only":
        said = [
            "The judge saw no low-resolution pictures, so it cannot tell what a model could have known from what it had to guess."
        ]
    return [
        *said,
        f"A judge is a model and errs as models do. How far this one agrees with people on pictures like these is not known from this "
        f"page; {agree}",
    ]


def levels(lines: Sequence[Line]) -> list[tuple[int, str, int, float]]:
    """(level, its words, pictures, their share in percent of the fullest) with scores rounded, halves up."""
    scores = [math.floor(line.score + 0.5) for line in lines if line.score is not None]
    counts = {level: scores.count(level) for level in LEVELS}
    most = max(*counts.values(), 1)
    return [(level, text, counts[level], 100 * counts[level] / most) for level, text in LEVELS.items()]


def grave(lines: Sequence[Line]) -> tuple[float, float, float]:
    """The share of pictures at level 4 or 5 and the ends of its 95 % interval (Wilson's)."""
    above = [math.floor(line.score + 0.5) >= GRAVE for line in lines if line.score is not None]
    if not above:
        return 0.0, math.nan, math.nan
    ends = binomtest(sum(above), len(above)).proportion_ci(method="wilson")
    return sum(above) / len(above), float(ends.low), float(ends.high)


def total(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All runs' ledgers added up; the cost is None where one of those that asked anything is not known."""
    counts = ("requests", "replies", "uncounted", "cached", "tokens_in", "tokens_out")
    costs = [run["cost"] for run in runs if run["replies"]]
    known = None if None in costs or not costs else math.fsum(costs)
    return {name: sum(run[name] for run in runs) for name in counts} | {"cost": known}


# ---------------------------------------------------------------------------------------------------- page


def write(file: Path, told: Scored) -> Path:
    """Write the page; all text in it is escaped, and its policy forbids scripts and the network. Raises UserError."""
    worst = sorted((line for line in told.lines if line.score is not None), key=lambda n: -(n.score or 0))
    text = (
        environment_of()
        .get_template("scores.html.jinja")
        .render(
            told=told,
            headline=headline(told),
            unknown=unknown(told),
            levels=levels(told.lines) if told.levels else [],
            highest=HIGHEST,
            grave=grave(told.lines) if told.levels else None,
            worst=worst,
            failed=[line for line in told.lines if line.error],
            places={c.name: n for n, c in enumerate(told.cases, 1)},
            total=total(told.runs),
            long=LONG,
            settings=yaml.safe_dump(dict(told.settings), sort_keys=False, allow_unicode=True),
            environment=yaml.safe_dump(dict(told.environment), sort_keys=False, allow_unicode=True),
        )
    )
    try:
        write_table(file, text.encode("utf-8", "replace").decode())
    except UserError as error:
        raise UserError(f"The page could not be written. {error}") from error
    return file
