"""The command that runs methods at one budget, on several seeds, each with the same search, and draws what came of it."""

from __future__ import annotations

import inspect
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tropism.commands.train import METHODS, NOT_CONFIG, OF_FIT, align, bound, judge_of
from tropism.core import UserError
from tropism.prompts.batches import own_rows
from tropism.race import curves, page
from tropism.race.plan import Entry, Objective, Plan
from tropism.rewards.workers import end
from tropism.run import request
from tropism.run.checks import known
from tropism.run.evaluate import Evaluation
from tropism.run.fit import fit
from tropism.run.record import Recorder

DONE = "done.json"
MOST_UPDATES = 100_000
OF_RACE = ("out", "seed", "budget", "updates", "evaluate_every", "method", "options", "model", "reward", "watch")


def race(
    plan: Plan,
    *,
    out: Path | str,
    only: Mapping[str, str] | None = None,
    search_only: bool = False,
    threads: int | None = 1,
    command: str = "",
) -> Path | None:
    """Search, then test, every method on every objective, and write the page; returns it. What is finished is not run again.

    only: {"objective": name, "method": name}: just these runs, without a page (to share the work between processes).
    search_only: end after the search, without a page.
    Raises UserError for a plan that cannot be.
    """
    out, only = Path(out), only or {}
    plan = replace(plan, settings={**plan.settings, "threads": threads})
    for entry in plan.entries:
        for config in entry.search:
            _resolved(plan, entry, config)
    objectives = [o for o in plan.objectives if only.get("objective", o.name) == o.name]
    entries = [e for e in plan.entries if only.get("method", e.name) == e.name]
    if not (objectives and entries):
        raise UserError(f"The plan has no {' and '.join(f'{k} {v!r}' for k, v in only.items())}.")
    bases: dict[str, Evaluation] = {}
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    for objective in objectives:
        for entry in entries:
            config = _searched(plan, objective, entry, out, bases, say)
            for seed in () if search_only else plan.seeds:
                _one(plan, objective, entry, config, seed, out, bases, say, is_test=True)
    return None if only or search_only else page.write(plan, out, command)


def _searched(plan: Plan, objective: Objective, entry: Entry, out: Path, bases: dict, say: Any) -> int:
    """The configuration that the search chose."""
    if not plan.tuned(entry):
        return 0
    tried = [
        [
            curve
            for seed in plan.tuning_seeds
            if (curve := _one(plan, objective, entry, k, seed, out, bases, say, is_test=False))
        ]
        for k in range(len(entry.search))
    ]
    return curves.chosen(tried, objective.gold)


def folder_of(out: Path, objective: Objective, entry: Entry, config: int, seed: int, is_test: bool) -> Path:
    return out / objective.name / entry.name / (f"test-{seed}" if is_test else f"search-{config}-{seed}")


def _one(
    plan: Plan,
    objective: Objective,
    entry: Entry,
    config: int,
    seed: int,
    out: Path,
    bases: dict[str, Evaluation],
    say: Any,
    *,
    is_test: bool,
) -> curves.Curve | None:
    """One run, unless it is there; its curve, or None if it failed (a run that blew up has lost the search)."""
    folder = folder_of(out, objective, entry, config, seed, is_test)
    told = {"config": entry.search[config], "seed": seed, "objective": objective.name, "method": entry.name}
    if not (folder / DONE).is_file():
        say(f"{objective.name}: {entry.name}, {'test' if is_test else 'search'} {told['config']}, seed {seed}")
        share = plan.longer.get(entry.name, 1.0) if is_test else plan.tuning_share
        budget = {axis: limit * share for axis, limit in plan.budget.items()}
        try:
            _run(
                plan, objective, entry, entry.search[config], seed, folder, budget, bases, plan.points if is_test else 0
            )
        except UserError as error:
            if is_test:
                raise
            told["failed"] = str(error)
        (folder / DONE).write_text(json.dumps(told) + "\n")
    kept = json.loads((folder / DONE).read_text())
    if kept["config"] != dict(told["config"]):
        raise UserError(
            f"{folder} holds a run of {kept['config']}, but the plan asks for {told['config']}. Choose another --out."
        )
    return None if "failed" in kept else curves.read(folder)


def _resolved(plan: Plan, entry: Entry, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of `align`, options of the method). Raises UserError for a name that is neither."""
    defaults = {n: p.default for n, p in inspect.signature(align).parameters.items() if n not in NOT_CONFIG}
    own = request.hyperparameters(METHODS[entry.method])
    asked = {**plan.settings, **entry.settings, **config}
    common = [
        n for n in plan.settings if n not in own and n in _anyones()
    ]  # another method's option, meant for all that have it
    for name in asked:
        if name not in common:
            known(name, [*(n for n in defaults if n not in OF_RACE), *own], f"setting of {entry.name}")
    settings = {**defaults, **{n: v for n, v in asked.items() if n in defaults}}
    return settings, {n: v for n, v in asked.items() if n in own}


def _anyones() -> set[str]:
    return {name for method in METHODS.values() for name in request.hyperparameters(method)}


def _run(
    plan: Plan,
    objective: Objective,
    entry: Entry,
    config: Mapping[str, Any],
    seed: int,
    folder: Path,
    budget: Mapping[str, float],
    bases: dict[str, Evaluation],
    points: int,
) -> None:
    settings, options = _resolved(plan, entry, config)
    settings |= {"method": entry.method, "out": str(folder), "seed": seed, "watch": list(objective.watch)}
    settings |= {"updates": MOST_UPDATES, "evaluate_every": 0, "budget": [f"{a}={v:g}" for a, v in budget.items()]}
    function, reward = METHODS[entry.method], list(objective.reward)
    asked = request.read(entry.method, function, plan.model, reward, options, settings)
    asked.embed()
    kept = {**settings, "model": plan.model, "reward": reward, "options": asked.hyper}
    quiet = Console(file=io.StringIO())
    try:
        with Recorder(folder, request.as_plain(kept), overwrite=True, console=quiet) as recorder:
            etas = settings["eta"] if settings["evaluate_eta"] is None else settings["evaluate_eta"]
            sampled = f"{objective.name} {seed} {asked.sampling()} {etas} {settings['evaluate_prompts']}"
            judge = judge_of(asked, folder, {}, plan.prompts_each, bases.get(sampled))
            fit(
                bound(function, asked, settings["normalise"], {}),
                asked.model.trainable(),
                lambda update: own_rows(asked.batch(update)),
                recorder=recorder,
                evaluate=judge,
                evaluate_points=points,
                budget=budget,
                keep=1,
                **{name: settings[name] for name in OF_FIT},
            )
            bases[sampled] = judge.before
        shutil.rmtree(folder / "samples", ignore_errors=True)
        if not points:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    finally:
        end(asked.reward)
