"""Finished runs of a comparison on disk: one small file each, OUT/OBJECTIVE/METHOD/search-CONFIG-SEED.json or test-SEED.json.

It holds the configuration and the evaluations, so a page can be drawn, and a comparison gone on with, from these files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tropism.core import UserError
from tropism.race.curves import Curve, curve_of, kept_best
from tropism.race.plan import Entry, Objective, Plan
from tropism.run.checks import known
from tropism.run.evaluate import Evaluation
from tropism.run.report import spread
from tropism.run.request import fingerprint

SHOWN = 8
"""Prompts whose pictures are kept of the first test run."""


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


def asked_of(plan: Plan, job: Job) -> dict[str, Any]:
    """All that a run's result depends on, as plain values; of files that are named, a hash of their content."""
    settings = {**plan.settings, **job.entry.settings, **job.overlay}
    rewards = [*job.objective.reward, *job.objective.watch]
    return {
        **{"model": plan.model, "reward": list(job.objective.reward), "method": job.entry.method},
        **{
            "settings": settings,
            "budget": budget_of(plan, job),
            "prices": dict(job.objective.prices),
            "seed": job.seed,
        },
        **{"watch": list(job.objective.watch), "prompts_each": plan.prompts_each, "evaluated_at": points_of(plan, job)},
        "contents": _contents([plan.model, *rewards, settings.get("prompts"), settings.get("held_out")]),
    }


def budget_of(plan: Plan, job: Job) -> dict[str, float]:
    """{axis: limit} of a run: the plan's, longer or shorter."""
    share = plan.longer.get(job.entry.name, 1.0) * plan.tuning_share
    if job.is_test:
        share = {**plan.longer, **job.objective.longer}.get(job.entry.name, 1.0)
    return {axis: limit * share for axis, limit in plan.budget.items()}


def _contents(named: Sequence[Any]) -> dict[str, str]:
    """Of every prompt file, and of every file of code that a text names, also inside brackets: some letters of its hash."""
    parts = {p for text in named if isinstance(text, str) for p in (text, *re.split(r"[(),]", text))}
    return {p: found.strip(" ()") for p in sorted(parts) if (found := fingerprint(p))}


def points_of(plan: Plan, job: Job) -> list[float]:
    """The shares of a run after which it is evaluated, beside its end: a test run's points and, where it is followed beyond the plan's
    budget, those that the others have within it, so that what it is at the budget is measured.
    """
    if not job.is_test:
        return []
    parts = [i / plan.points for i in range(1, plan.points + 1)]
    longer = budget_of(plan, job)[plan.axis] / plan.budget[plan.axis]
    return sorted({round(share, 12) for share in (*parts, *(p / longer for p in parts)) if share < 1})


def keep(out: Path, plan: Plan, job: Job, rows: list[dict[str, Any]], failed: str = "") -> None:
    """Write a finished run, whole or not at all. failed: what a run that could not go on said."""
    told = asked_of(plan, job) | {"config": dict(job.overlay), "failed": failed, "evaluations": rows}
    temporary = job.file(out).with_suffix(".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(told) + "\n", "utf-8")
    temporary.replace(job.file(out))


def kept(out: Path, plan: Plan, job: Job) -> dict[str, Any] | None:
    """What was kept of a run; None if it is not finished. Raises UserError for a run of something else than the plan asks for."""
    file = job.file(out)
    if not file.is_file():
        return None
    told = json.loads(file.read_text("utf-8"))
    held, asked = _flat(told), _flat(json.loads(json.dumps(asked_of(plan, job))))
    odd = next((n for n in {**asked, **held} if held.get(n) != asked.get(n)), None)
    if odd:
        raise UserError(
            f"{file} holds a run of something else than the plan asks for: {odd} {held.get(odd, 'unset')} instead of "
            f"{asked.get(odd, 'unset')}. Choose another --out, or take the plan it was begun with."
        )
    return told


def curve(out: Path, plan: Plan, job: Job) -> Curve | None:
    """The curve of a finished run, of its best weights so far where the plan keeps them; None for one that failed or is not there.
    Raises UserError if the gold measure is not in it.
    """
    told = kept(out, plan, job)
    if not told or told["failed"]:
        return None
    found = curve_of(told["evaluations"])
    known(job.objective.gold, found.columns, f"measure of {job.objective.name}")
    return kept_best(found, job.objective.gold) if plan.keep_best else found


def keep_pictures(out: Path, job: Job, base: Evaluation, trained: Evaluation, each: int) -> None:
    """Of at most SHOWN prompts one picture of the base model and one of the trained, as bytes. each: pictures a prompt."""
    at = [i * each for i in spread(len(base.prompts) // each, SHOWN)]
    whole = lambda found: (found.images[at].clamp(0, 1) * 255).round().byte().contiguous()
    prompts = {"prompts": json.dumps([base.prompts[i] for i in at])}
    save_file(
        {"base": whole(base), "trained": whole(trained)}, job.file(out).with_suffix(".safetensors"), metadata=prompts
    )


def pictures(out: Path, job: Job) -> tuple[list[str], Tensor, Tensor] | None:
    """(prompts, the base model's pictures, the trained model's), (n, 3, H, W) in [0, 1]; None where none were kept."""
    file = job.file(out).with_suffix(".safetensors")
    if not file.is_file():
        return None
    with safe_open(file, "pt") as f:
        prompts = json.loads((f.metadata() or {})["prompts"])
        return prompts, f.get_tensor("base").float() / 255, f.get_tensor("trained").float() / 255


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a run depends on, one level deep."""
    own = {n: told.get(n) for n in ("model", "reward", "method", "seed")}
    looked = {n: told.get(n) for n in ("watch", "prompts_each", "evaluated_at")}
    inner = {f"{n} {k}": v for n in ("settings", "budget", "prices", "contents") for k, v in told.get(n, {}).items()}
    return own | inner | looked
