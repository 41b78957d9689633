"""Finished runs of a comparison on disk: one small file each, OUT/OBJECTIVE/METHOD/search-CONFIG-SEED.json or test-SEED.json.

It holds the configuration and the evaluations, so a page can be drawn, and a comparison gone on with, from these files alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.core import UserError
from tropism.race.curves import Curve, curve_of
from tropism.race.plan import Entry, Objective


@dataclass(frozen=True)
class Job:
    """One run of a comparison: configuration number `config` of a method, for the search or for the test."""

    objective: Objective
    entry: Entry
    config: int
    seed: int
    is_test: bool

    @property
    def name(self) -> str:
        return f"test-{self.seed}" if self.is_test else f"search-{self.config}-{self.seed}"

    @property
    def overlay(self) -> Mapping[str, Any]:
        return self.entry.search[self.config]

    def file(self, out: Path) -> Path:
        return out / self.objective.name / self.entry.name / f"{self.name}.json"

    def __str__(self) -> str:
        what = "test" if self.is_test else "search"
        return f"{self.objective.name}: {self.entry.name}, {what} {dict(self.overlay)}, seed {self.seed}"


def keep(out: Path, job: Job, rows: list[dict[str, Any]], failed: str = "") -> None:
    """Write a finished run, whole or not at all. failed: what a run that could not go on said."""
    told = {"config": dict(job.overlay), "settings": dict(job.entry.settings), "failed": failed, "evaluations": rows}
    temporary = job.file(out).with_suffix(".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(told) + "\n", "utf-8")
    temporary.replace(job.file(out))


def kept(out: Path, job: Job) -> dict[str, Any] | None:
    """What was kept of a run; None if it is not finished. Raises UserError for a run of another configuration."""
    file = job.file(out)
    if not file.is_file():
        return None
    told = json.loads(file.read_text("utf-8"))
    held, asked = told["settings"] | told["config"], dict(job.entry.settings) | dict(job.overlay)
    if held != asked:
        raise UserError(f"{file} holds a run of {held}, but the plan asks for {asked}. Choose another --out.")
    return told


def curve(out: Path, job: Job) -> Curve | None:
    """The curve of a finished run; None for one that failed or is not there."""
    told = kept(out, job)
    return curve_of(told["evaluations"]) if told and not told["failed"] else None
