"""The worst pictures of a scoring, side by side: the input enlarged, the reference and the result, with findings boxed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError
from tropism.judged.findings import Finding, grouped, inside, view
from tropism.restore.distances import FeatureProxy
from tropism.restore.judge_pictures import WHOLE, Box, framed
from tropism.restore.judge_reply import Item
from tropism.restore.loading import Sources
from tropism.restore.pairs import Pair
from tropism.run import pictures
from tropism.run.report import uri

CAPTIONS = {"A": "low resolution, enlarged", "B": "reference", "C": "result"}
SHOWN = 512
"""Pixels of the longest side on the page."""
CRISP = 128
"""Pixels up to which a picture is enlarged without smoothing."""
MOST_FINDINGS = 10


@dataclass(frozen=True)
class Mark:
    """A numbered box in percent of the picture shown. slight: drawn dashed, for what is only missing."""

    number: int
    left: float
    top: float
    width: float
    height: float
    severity: int
    slight: bool


@dataclass(frozen=True)
class Case:
    """A picture on the page. shots: (caption, data address). part: what is shown of it, "" for all. more: findings that are not listed."""

    name: str
    score: float
    per_repeat: list[float]
    shots: list[tuple[str, str]]
    marks: list[Mark]
    findings: list[Finding]
    more: int
    part: str
    crisp: bool


def case(
    pair: Pair,
    sources: Sources,
    score: float,
    per_repeat: Sequence[float],
    items: Sequence[Item],
    proxy: FeatureProxy | None = None,
) -> Case | None:
    """A picture and what was found in it, of a proxy where it found it; None where its files can no longer be read."""
    try:
        frame = framed(
            sources.load(pair.sr), pair.gt and sources.load(pair.gt), None if pair.lr is None else sources.load(pair.lr)
        )
    except UserError:
        return None
    height, width = frame["C"].shape[-2:]
    every = grouped(items)
    found = every[:MOST_FINDINGS]
    part = view(found, height, width)
    cut = {label: _cut(frame[label], part) for label in sorted(frame)}
    shots = [(CAPTIONS[label], _shot(x)) for label, x in cut.items()]
    if proxy and (warm := proxy.map(frame["C"], frame["B"])) is not None:
        shots.append((f"where features differ, by {warm.max():.2g} at most", _shot(_heated(frame["C"], warm))))
    h, w = cut["C"].shape[-2:]
    told = "" if part == WHOLE else f"{w} × {h} pixels of {width} × {height}, from {_corner(part, height, width)}"
    return Case(
        pair.name,
        score,
        list(per_repeat),
        shots,
        [m for n, f in enumerate(found, 1) if (m := _mark(n, f, part))],
        found,
        len(every) - len(found),
        told,
        max(h, w) <= CRISP,
    )


def _corner(part: Box, height: int, width: int) -> str:
    return f"({round(part[0] * width)}, {round(part[1] * height)})"


def _cut(x: Tensor, part: Box) -> Tensor:
    height, width = x.shape[-2:]
    left, top, right, bottom = (round(v * n) for v, n in zip(part, (width, height) * 2, strict=True))
    return x[..., top:bottom, left:right]


def _shot(x: Tensor) -> str:
    """A picture as a data address, reduced where it is large."""
    return uri(pictures.picture(x[0], min(SHOWN, max(x.shape[-2:]))))


def _heated(x: Tensor, warm: Tensor) -> Tensor:
    """A picture (1, 3, H, W) in grey under the colours of a map (p, q), from black for 0 to yellow for its largest value."""
    share = F.interpolate(warm[None, None], x.shape[-2:], mode="bilinear")[0, 0] / warm.max().clamp_min(1e-12)
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](share.numpy())[..., :3]).permute(2, 0, 1)
    return 0.4 * x.mean(1, keepdim=True) + 0.6 * colours.to(x)


def _mark(number: int, finding: Finding, part: Box) -> Mark | None:
    box = finding.box and inside(finding.box, part)
    if not box:
        return None
    left, top, right, bottom = (100 * v for v in box)
    return Mark(number, left, top, right - left, bottom - top, finding.severity or 1, finding.omission)
