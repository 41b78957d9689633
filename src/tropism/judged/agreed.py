"""Agreement with people as a table and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from tropism.restore.agreement import MEASURES, Agreement
from tropism.restore.ratings import Ratings, Scores
from tropism.restore.scoring import write_table
from tropism.run.report import environment_of

TABLE, PAGE = "agreement.csv", "agreement.html"
MEANS = {
    "pearson": ("Pearson correlation", "how far the numbers lie on a line; 0 is chance, 1 is perfect"),
    "spearman": ("Spearman correlation", "the same of their ranks: whether the order is right"),
    "kendall": ("Kendall's tau-b", "pairs ordered alike less pairs ordered oppositely, corrected for ties"),
    "pairwise": (
        "Pairwise accuracy",
        "of two pictures that both sides tell apart, how often the order is right; 0.5 is chance",
    ),
    "kappa": ("Weighted kappa", "agreement on the level itself, quadratic weights; 0 is chance, 1 is perfect"),
    "auroc": (
        "AUROC",
        "how often a picture with something invented has the higher score than one without; 0.5 is chance",
    ),
}
"""What each measure is called on the page, and what it says."""
SHARES = {
    "ceiling": (
        "Ceiling of Spearman",
        "the most that scores without ties could reach, since people's numbers are tied",
    ),
    "told_apart": (
        "Pairs told apart",
        "of the pairs that people tell apart, the share that the scores tell apart at all",
    ),
}


@dataclass(frozen=True)
class Group:
    """The agreement over some pictures, and each of them as (name, score, people's number), higher being worse in both."""

    found: Agreement
    points: tuple[tuple[str, float, float], ...]


def group(scores: Scores, human: Scores | Ratings, found: Agreement) -> Group:
    """What was found, with the pictures that both sides have."""
    x, y = (side.worse_up.values for side in (scores, human.means if isinstance(human, Ratings) else human))
    return Group(found, tuple((name, x[name], y[name]) for name in x if name in y))


@overload
def only(side: Scores, names: Collection[str]) -> Scores: ...
@overload
def only(side: Ratings, names: Collection[str]) -> Ratings: ...
def only(side: Scores | Ratings, names: Collection[str]) -> Scores | Ratings:
    """One side of some pictures."""
    if isinstance(side, Ratings):
        return replace(side, levels={n: given for n, given in side.levels.items() if n in names})
    values = {n: v for n, v in side.values.items() if n in names}
    return replace(side, values=values, left_out=tuple(n for n in side.left_out if n in names))


def rows(found: Agreement) -> Iterator[tuple[str, str, str, float | None, float | None, float | None, str]]:
    """(name, its words, what it says, value, low, high, why not) of everything in an agreement."""
    for name in MEASURES:
        m = getattr(found, name)
        yield name, *MEANS[name], m.value, m.low, m.high, m.why
    for name, words in SHARES.items():
        yield name, *words, getattr(found, name), None, None, ""
    for metric, m in found.alpha.items():
        words = (f"Krippendorff's alpha, {metric}", "how far people agree with each other; 0 is chance, 1 is perfect")
        yield f"alpha_{metric}", *words, m.value, m.low, m.high, m.why


def write(
    folder: Path, groups: Mapping[str, Group], scores: str, other: str, whose: str, said: Sequence[str], command: str
) -> Path:
    """agreement.csv (group, pictures, measure, value, low, high, why) and agreement.html; returns the page. Raises UserError.

    scores, other: the two sides' names. whose: whose numbers the other side's are, for the drawing. said: of the raters.
    """
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(["group", "pictures", "measure", "value", "low", "high", "why"])
    for name, of in groups.items():
        for measure, _, _, value, low, high, why in rows(of.found):
            numbers = ["" if v is None else repr(float(v)) for v in (value, low, high)]
            table.writerow([name, of.found.pictures, measure, *numbers, why])
    write_table(folder / TABLE, stream.getvalue())
    text = (
        environment_of()
        .get_template("agreement.html.jinja")
        .render(
            groups=[(name, of, list(rows(of.found)), dots(of.points)) for name, of in groups.items()],
            scores=scores,
            other=other,
            whose=whose,
            said=said,
            command=command,
        )
    )
    write_table(folder / PAGE, text.encode("utf-8", "replace").decode())
    return folder / PAGE


def dots(points: Sequence[tuple[str, float, float]]) -> dict:
    """The pictures as points of a drawing 100 wide and 100 high, with the ends of both axes; equal ones once, with how many they are."""
    sides = [[p[i] for p in points] for i in (1, 2)]
    ends = [(min(s), max(s)) for s in sides]
    place = lambda v, end: 50.0 if end[0] == end[1] else 100 * (v - end[0]) / (end[1] - end[0])
    held = dict[tuple[float, float], list[str]]()
    for name, x, y in points:
        held.setdefault((place(x, ends[0]), 100 - place(y, ends[1])), []).append(name)
    drawn = [(x, y, 1.1 * min(len(names), 25) ** 0.5, ", ".join(names[:5])) for (x, y), names in held.items()]
    return {"points": drawn, "x": ends[0], "y": ends[1]}
