"""A judge's findings as a person reads them: the same one told once, its place, and the part of a large picture that shows most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tropism.restore.judge_pictures import WHOLE, Box
from tropism.restore.judge_reply import Item

SIDE = 384
"""Pixels of a crop's side; pictures that are hardly larger are shown whole."""
ALIKE = 0.5
"""Intersection over union from which two boxes are one place."""


@dataclass(frozen=True)
class Finding:
    """What one or several repeats found in one place. repeats: which of them. severity: the highest that was given, 1 to 3, or None."""

    box: Box | None
    kind: str
    description: str
    severity: int | None
    omission: bool
    repeats: frozenset[int] = field(default_factory=frozenset)


def grouped(items: Sequence[Item]) -> list[Finding]:
    """The findings of all repeats and tiles, those of one place told once, the gravest and most often seen first."""
    groups = list[Finding]()
    for item in sorted(items, key=lambda i: -(i.severity or 0)):
        at = next((n for n, found in enumerate(groups) if _same(found, item)), None)
        if at is None:
            seen = frozenset({item.repeat})
            groups.append(Finding(item.box, item.kind, item.description, item.severity, item.omission, seen))
        else:
            groups[at] = replace(groups[at], repeats=groups[at].repeats | {item.repeat})
    return sorted(groups, key=lambda f: (-(f.severity or 0), -len(f.repeats)))


def _same(found: Finding, item: Item) -> bool:
    if found.omission != item.omission:
        return False
    if found.box is None or item.box is None:
        return (found.box, found.kind, found.description) == (item.box, item.kind, item.description)
    return overlap(found.box, item.box) >= ALIKE


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    both = _area(_meeting(one, other))
    return both / (_area(one) + _area(other) - both)


def _meeting(one: Box, other: Box) -> Box:
    return max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def view(findings: Sequence[Finding], height: int, width: int, side: int = SIDE) -> Box:
    """The part of a picture to show, as shares: all of a small one, else `side` pixels square around the gravest findings.

    Of the squares around each finding's middle, the one that holds most, by severity; as large as that finding's box where it is
    larger. Without a place that is known, the whole.
    """
    places = [f for f in findings if f.box is not None]
    if max(height, width) <= 4 * side // 3 or not places:
        return WHOLE
    return max((_around(f.box or WHOLE, height, width, side) for f in places), key=lambda v: _held(v, places))


def _around(box: Box, height: int, width: int, side: int) -> Box:
    """A square of `side` pixels, or larger to hold the box, with the box in its middle where the picture's edge allows it."""
    pixels = max(side, (box[2] - box[0]) * width, (box[3] - box[1]) * height)
    ends = []
    for low, high, n in ((box[0], box[2], width), (box[1], box[3], height)):
        share = min(1.0, pixels / n)
        start = min(max((low + high - share) / 2, 0.0), 1 - share)
        ends.append((start, start + share))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def _held(part: Box, places: Sequence[Finding]) -> float:
    """How much a part shows: severities of the findings, each by the share of its box that is inside."""
    return sum((f.severity or 1) * _area(_meeting(part, f.box)) / _area(f.box) for f in places if f.box)


def inside(box: Box, part: Box) -> Box | None:
    """A box of the whole picture as shares of a part of it, cut at the part's edge; None where it lies outside."""
    cut = _meeting(box, part)
    if not _area(cut):
        return None
    width, height = part[2] - part[0], part[3] - part[1]
    return (
        (cut[0] - part[0]) / width,
        (cut[1] - part[1]) / height,
        (cut[2] - part[0]) / width,
        (cut[3] - part[1]) / height,
    )
