"""Pictures scored by the distance of deep features to their references: a proxy of invented detail that needs no judge.

Source: Hallucination Score, arXiv 2507.14367, finds distances of deep features that follow it; which, could not be read there. The distance
is that of the reward `feature-distance` (rewards.feature_distance).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.restore.judge_pictures import in_8_bits
from tropism.restore.scoring import EVERY, Triple, write_table
from tropism.rewards.feature_distance import feature_distance

COLUMNS = ("name", "score", "judge", "mode", "higher_is_worse", "error", "pixels")
Distance = Callable[[Tensor, Tensor], float]
"""(result, reference), each (1, 3, H, W) in [0, 1] -> a distance, 0 for equal features."""


@dataclass(frozen=True)
class Measured:
    """A picture's distance, None where it could not be measured, and why. pixels: some letters of the hash of both pictures."""

    name: str
    score: float | None
    error: str = ""
    pixels: str = ""


class FeatureProxy:
    """The distance of deep features of a result to its reference, and where in the picture it lies.

    text: what follows "feature-distance:", SOURCE, ?OPTIONS or both. Raises UserError for what cannot be loaded or does not exist.
    """

    def __init__(self, text: str = "", device: str | torch.device = "cpu"):
        self.proxy, self.device = feature_distance(text), device

    @torch.no_grad()
    def __call__(self, sr: Tensor, gt: Tensor) -> float:
        return float(self.proxy.distance(sr.to(self.device), gt.to(self.device)))

    @torch.no_grad()
    def map(self, sr: Tensor, gt: Tensor) -> Tensor | None:
        """One distance a patch, (p, q), on the CPU; None where no patches are compared."""
        if self.proxy.tokens not in ("both", "patch"):
            return None
        return self.proxy.map(sr.to(self.device), gt.to(self.device))[0].float().cpu()


def measure_folder(distance: Distance, judge: str, triples: Iterable[Triple], out: str | Path) -> Iterator[Measured]:
    """Measure (name, sr, gt, lr) one after the other, yield each, and keep all of them in `out`, a .csv of COLUMNS.

    judge: what the table calls the distance. What `out` holds of the same pixels by the same judge is not measured again. A picture that
    cannot be read or compared is a row with an error. The table is written whole every 20 rows, at the end, and when the work is
    interrupted. Raises UserError where the table cannot be written.
    """
    rows, known, is_whole = list[Measured](), _read(out, judge), False
    try:
        for name, *sources in triples:
            rows.append(_measured(distance, known, name, sources[0], sources[1]))
            if len(rows) % EVERY == 0 and len(rows) >= len(known):
                _write(out, judge, rows)
            yield rows[-1]
        is_whole = True
    finally:
        # Interrupted before it has come to where it was: the older table holds more.
        if is_whole or len(rows) >= len(known):
            _write(out, judge, rows)


def _measured(distance: Distance, known: Mapping[str, float], name: str, *sources: Any) -> Measured:
    try:
        given: list[Any] = [s() if callable(s) else s for s in sources]
        sr, gt = (in_8_bits(s, w) for s, w in zip(given, ("result", "reference"), strict=True))
        pixels = hashlib.sha256(
            b"".join(repr(x.shape).encode() + x.cpu().numpy().tobytes() for x in (sr, gt))
        ).hexdigest()[:16]
        return Measured(name, known[pixels] if pixels in known else distance(sr, gt), pixels=pixels)
    except UserError as error:
        return Measured(name, None, str(error))


def _read(out: str | Path, judge: str) -> dict[str, float]:
    """{pixels: score} of a table of the same judge; empty where there is none, or it is of another kind."""
    try:
        with Path(out).open(encoding="utf-8", newline="") as stream:
            rows = [r for r in csv.DictReader(stream) if r["judge"] == judge and r["score"] and r["pixels"]]
            return {r["pixels"]: float(r["score"]) for r in rows}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}


def _write(out: str | Path, judge: str, rows: Iterable[Measured]) -> None:
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(COLUMNS)
    score = lambda r: "" if r.score is None else repr(r.score)
    table.writerows([r.name, score(r), judge, "gt_only", "true", r.error, r.pixels] for r in rows)
    write_table(out, stream.getvalue())
