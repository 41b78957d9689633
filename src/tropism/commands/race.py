"""The command that runs methods at one budget, on several seeds, each with the same search, and draws what came of it."""

from __future__ import annotations

import inspect
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tropism.align.update import NotFinite
from tropism.commands.train import METHODS, NOT_CONFIG, OF_FIT, align, bound, judge_of
from tropism.core import UserError
from tropism.prompts.batches import own_rows
from tropism.race import curves, page, runs
from tropism.race.page import searches, tests
from tropism.race.plan import Entry, Plan, plan_of, read
from tropism.race.runs import Job
from tropism.rewards.workers import end
from tropism.run import ledger, request
from tropism.run.checks import known
from tropism.run.evaluate import Evaluation
from tropism.run.fit import fit
from tropism.run.record import Recorder

MOST_UPDATES = 100_000
WITHOUT_EFFECT = ("ramp", "on_alarm", "trackers")
"""Settings of `align` for a run that somebody looks at: those of a comparison are not watched, and their rewards are not ramped."""
OF_RACE = (
    *WITHOUT_EFFECT,
    "out",
    "seed",
    "budget",
    "updates",
    "evaluate_every",
    "method",
    "options",
    "model",
    "reward",
    "watch",
)


def plan_from(
    file: Path | None,
    methods: Sequence[str],
    model: str | None,
    reward: Sequence[str],
    gold: str | None,
    watch: Sequence[str],
    prompts: str | None,
    budget: Sequence[str],
    seeds: int | None,
) -> Plan:
    """The plan of a file, or of a command line: one objective, every method with the six configurations of `race.plan.SEARCH`.

    model, gold, seeds: by default the bundled shapes, the reward itself, and 5.
    Raises UserError for both, for no reward or no budget, and for what a plan cannot be.
    """
    if file:
        flags = {"method": methods, "model": model, "reward": reward, "gold": gold, "watch": watch, "prompts": prompts}
        given = [f"--{n}" for n, v in {**flags, "budget": budget, "seeds": seeds}.items() if v not in (None, [], ())]
        if given:
            raise UserError(
                f"Both --plan and {', '.join(given)} are given. Write it into the plan, or leave --plan out."
            )
        return read(file)
    if not (reward and budget):
        raise UserError(
            "Methods are compared on a reward, at a budget of a run. Add --reward jpeg --budget seconds=120."
        )
    name = re.sub(r"[^\w.+-]+", "-", "+".join(reward)).strip("-.+") or "reward"
    found = {
        "model": model or "shapes",
        "objectives": {name: {"reward": list(reward), "gold": gold or "reward", "watch": list(watch)}},
        "methods": {m: {"settings": {"eta": 1.0}} if m == "ddpo" else {} for m in methods},
        "budget": ledger.budget_of(budget),
        "seeds": range(5 if seeds is None else seeds),
        "tuning_seeds": [max(100, seeds or 0)],
        "settings": {"evaluate_eta": 0.0, **({"prompts": prompts} if prompts else {})},
    }
    return plan_of(found)


def race(
    plan: Plan,
    *,
    out: Path | str,
    only: Mapping[str, str] | None = None,
    search_only: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    command: str = "",
) -> Path | None:
    """Search, then test, every method on every objective, and write the page; returns it. What is finished is not run again.

    only: {"objective": name, "method": name}: just these runs, without a page (to share the work between processes).
    search_only: end after the search, without a page.
    Raises UserError for a plan that cannot be.
    """
    out, only = Path(out), only or {}
    place = {"device": device, "threads": threads}
    plan = replace(plan, settings={"dtype": dtype, **plan.settings})
    for entry in plan.entries:
        for config in entry.search:
            _resolved(plan, entry, config, {})
    objectives = [o for o in plan.objectives if only.get("objective", o.name) == o.name]
    entries = [e for e in plan.entries if only.get("method", e.name) == e.name]
    if not (objectives and entries):
        raise UserError(f"The plan has no {' and '.join(f'{k} {v!r}' for k, v in only.items())}.")
    bases: dict[str, Evaluation] = {}
    for objective in objectives:
        for entry in entries:
            for job in searches(plan, objective, entry):
                _done(plan, job, out, place, bases)
            if search_only:
                continue
            for job in tests(plan, out, objective, entry):
                _done(plan, job, out, place, bases)
    return None if only or search_only else page.write(plan, out, command)


def _done(plan: Plan, job: Job, out: Path, place: Mapping[str, Any], bases: dict[str, Evaluation]) -> None:
    """Run a job unless it is kept. A search run that blows up has lost; one that ends for another reason, or a test run that ends for
    any, ends the comparison and leaves nothing behind, so it is tried again when the comparison goes on.
    """
    if runs.kept(out, plan, job):
        return
    Console(soft_wrap=True, highlight=False, markup=False).print(str(job))
    folder, failed = job.file(out).with_suffix(""), ""
    try:
        _run(plan, job, out, place, bases)
    except UserError as error:
        if job.is_test or not isinstance(error, NotFinite):
            raise UserError(f"{job}: {error} What is finished is kept: start the comparison again to go on.") from error
        failed = str(error)
    runs.keep(out, plan, job, curves.evaluations(folder), failed)
    runs.curve(out, plan, job)  # a gold measure that is none is told now, and not after the whole search
    if not job.is_test:
        shutil.rmtree(folder)


def _resolved(
    plan: Plan, entry: Entry, config: Mapping[str, Any], place: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of `align`, options of the method). place: device, dtype and threads, where the plan names none.

    Raises UserError for a name that is neither.
    """
    defaults = {n: p.default for n, p in inspect.signature(align).parameters.items() if n not in NOT_CONFIG}
    own = request.hyperparameters(METHODS[entry.method])
    asked = {**place, **plan.settings, **entry.settings, **config}
    common = [n for n in plan.settings if n in _anyones()]  # an option of some methods, meant for all that have it
    for name in asked:
        if name in WITHOUT_EFFECT:
            raise UserError(f"{entry.name} sets {name}, which has no effect in a comparison. Leave it out of the plan.")
        if name not in common:
            known(name, [*(n for n in defaults if n not in OF_RACE), *own], f"setting of {entry.name}")
    settings = {**defaults, **{n: v for n, v in asked.items() if n in defaults}}
    return settings, {n: v for n, v in asked.items() if n in own}


def _anyones() -> set[str]:
    return {name for method in METHODS.values() for name in request.hyperparameters(method)}


def _run(plan: Plan, job: Job, out: Path, place: Mapping[str, Any], bases: dict[str, Evaluation]) -> None:
    """Train with the job's budget into the run's folder. bases: evaluations of base models so far, by how they were drawn."""
    entry, objective, budget = job.entry, job.objective, runs.budget_of(plan, job)
    folder = job.file(out).with_suffix("")
    settings, options = _resolved(plan, entry, job.overlay, place)
    settings |= {"method": entry.method, "out": str(folder), "seed": job.seed, "watch": list(objective.watch)}
    settings |= {
        "updates": MOST_UPDATES,
        "evaluate_every": 0,
        "budget": [f"{a}={v:g}" for a, v in budget.items() if a != "priced"],
    }
    function, reward = METHODS[entry.method], list(objective.reward)
    asked = request.read(entry.method, function, plan.model, reward, options, settings)
    asked.embed()
    kept = {**settings, "model": plan.model, "reward": reward, "options": asked.hyper}
    try:
        with Recorder(folder, request.as_plain(kept), overwrite=True, console=Console(file=io.StringIO())) as recorder:
            eta = settings["eta"] if settings["evaluate_eta"] is None else settings["evaluate_eta"]
            looks = [str(settings[n]) for n in ("height", "width", "scheduler", "setting", "quantize", "t5", "dtype")]
            drawn = repr((objective.name, job.seed, asked.sampling(), eta, looks, asked.held))
            judge = judge_of(asked, folder, {}, plan.prompts_each, bases.get(drawn))
            fit(
                bound(function, asked, settings["normalise"], {}),
                asked.model.trainable(),
                lambda update: own_rows(asked.batch(update)),
                recorder=recorder,
                evaluate=judge,
                evaluate_at=runs.points_of(plan, job),
                budget=budget,
                prices=objective.prices,
                keep=1,
                **{name: settings[name] for name in OF_FIT},
            )
            bases[drawn] = judge.before
        if job.is_test and job.seed == plan.seeds[0]:
            runs.keep_pictures(out, job, judge.before, judge.after, plan.prompts_each)
        shutil.rmtree(folder / "samples", ignore_errors=True)
    finally:
        end(asked.reward)
