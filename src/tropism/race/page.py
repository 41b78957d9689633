"""The page of a comparison: what each method reached at the budget, at what cost, and the curves against every axis."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tropism.core import UserError
from tropism.race import curves, runs
from tropism.race.curves import Curve
from tropism.race.plan import Entry, Objective, Plan
from tropism.race.runs import Job
from tropism.run.ledger import AXES
from tropism.run.pictures import grid, spaced
from tropism.run.record import environment
from tropism.run.report import environment_of, uri

REACHED = 0.2
"""Share of the gap from the base to the best method that a method must close for others to be measured by its level."""

Tested = Mapping[str, Sequence[Curve]]
"""Method -> the curves of its test runs, in the order of the seeds."""


@dataclass(frozen=True)
class Row:
    """A method on an objective: its configuration, means and standard deviations over seeds at the budget, and what was spent."""

    name: str
    config: Mapping[str, Any]
    means: Mapping[str, float]
    spreads: Mapping[str, float]
    spent: Mapping[str, float]


@dataclass(frozen=True)
class Reach:
    """What a method spent, on every axis, until it was where the reference ends: (median over the seeds, how many got there).

    A seed that did not get there counts as infinite, so the median is finite only where more than half did.
    """

    name: str
    costs: Mapping[str, tuple[float, int]]


def searches(plan: Plan, objective: Objective, entry: Entry) -> list[Job]:
    """The search's runs of a method, none where there is one configuration."""
    configs = range(len(entry.search)) if plan.tuned(entry) else ()
    return [Job(objective, entry, k, seed, is_test=False) for k in configs for seed in plan.tuning_seeds]


def tests(plan: Plan, out: Path, objective: Objective, entry: Entry) -> list[Job]:
    """The test runs of a method, with the configuration that its search chose."""
    config = 0
    if plan.tuned(entry):
        found: list[list[Curve | None]] = [[] for _ in entry.search]
        for job in searches(plan, objective, entry):
            found[job.config].append(runs.curve(out, plan, job))
        config = curves.chosen(found, objective.gold)
    return [Job(objective, entry, config, seed, is_test=True) for seed in plan.seeds]


def tested(plan: Plan, out: Path, objective: Objective, entry: Entry) -> list[Curve]:
    """The curves of a method's test runs. Raises UserError if one is not there."""
    found = [runs.curve(out, plan, job) for job in tests(plan, out, objective, entry)]
    if any(c is None for c in found):
        raise UserError(
            f"{objective.name}: {entry.name} is not finished in {out}. Run the comparison again to go on with it."
        )
    return [c for c in found if c is not None]


def measures_of(objective: Objective, of: Curve) -> list[str]:
    """What is drawn and told: the trained reward on held-out prompts and in training, gold (and that of the last weights where the best are
    kept), watched rewards, diversity, drift.
    """
    watched = [name for name in of.columns if name.startswith("watch/")]
    return [
        m
        for m in dict.fromkeys(
            ["reward", "training_reward", objective.gold, curves.LAST + objective.gold, *watched, "diversity", "drift"]
        )
        if m in of.columns
    ]


# ---------------------------------------------------------------------------------------------------- numbers


def row(plan: Plan, entry: Entry, found: Sequence[Curve], config: Mapping[str, Any], measures: Sequence[str]) -> Row:
    """What a method reached when it had spent the budget, or at its end if it ended a little before."""
    limits = [min(plan.budget[plan.axis], c.spent[plan.axis][-1]) for c in found]
    at = {m: [float(c.at(plan.axis, x, m)) for c, x in zip(found, limits, strict=True)] for m in measures}
    spent = {
        axis: float(
            np.mean([np.interp(x, c.spent[plan.axis], c.spent[axis]) for c, x in zip(found, limits, strict=True)])
        )
        for axis in AXES
    }
    spread = lambda v: float(np.std(v, ddof=1)) if len(v) > 1 else math.nan
    means = {m: float(np.mean(v)) for m, v in at.items()}
    return Row(entry.name, config, means, {m: spread(v) for m, v in at.items()}, spent)


def ends(plan: Plan, objective: Objective, found: Sequence[Curve]) -> list[float]:
    """The gold scores of a method's runs when they had spent the budget, seed by seed."""
    axis = plan.axis
    return [float(c.at(axis, min(plan.budget[axis], c.spent[axis][-1]), objective.gold)) for c in found]


def paired(plan: Plan, objective: Objective, found: Tested, one: str, other: str) -> dict[str, Any]:
    """By how much a method's gold score is above another's, seed by seed, with 95 % intervals: at the budget, in the mean over it
    ("whole"), and where the quicker of the two runs ended by this processor's own seconds ("clock"); and its diversity above the
    other's where both had the same gold score: what the lower of the two ended at, where each first had it.
    """
    ours, theirs = (ends(plan, objective, found[name]) for name in (one, other))
    mean, low, high = curves.paired(ours, theirs)
    shortest = min(c.spent[plan.axis][-1] for name in (one, other) for c in found[name])
    limit = min(plan.budget[plan.axis], float(shortest))
    along = lambda name: [curves.mean_over(c, plan.axis, limit, objective.gold) for c in found[name]]
    whole = curves.paired(along(one), along(other))
    pairs = list(zip(found[one], found[other], strict=True))
    until = [min(c.spent["cpu_seconds"][-1] for c in pair) for pair in pairs]
    ended = lambda i: [float(p[i].at("cpu_seconds", x, objective.gold)) for p, x in zip(pairs, until, strict=True)]
    clock = curves.paired(ended(0), ended(1))
    told = {"name": other, "mean": mean, "low": low, "high": high, "whole": whole, "clock": clock}
    told["until"] = (min(until), max(until))
    if "diversity" not in found[one][0].columns:
        return told
    at = lambda name: [
        curves.diversity_at(c, objective.gold, min(pair))
        for c, pair in zip(found[name], zip(ours, theirs, strict=True), strict=True)
    ]
    both = [(a, b) for a, b in zip(at(one), at(other), strict=True) if math.isfinite(a + b)]
    matched = curves.paired([a for a, _ in both], [b for _, b in both]) if both else None
    return told | {"matched": matched, "seeds": len(both)}


def gap(found: Tested, name: str, column: str) -> float:
    """The share of the gap, from the base to the best method's end, that a method closes by its own end."""
    ends = {n: float(np.mean([c.last(column) for c in of])) for n, of in found.items()}
    base = float(np.mean([c.columns[column][0] for c in found[name]]))
    return (ends[name] - base) / (max(ends.values()) - base) if max(ends.values()) > base else 0.0


def reach(found: Tested, reference: str, column: str) -> list[Reach]:
    """What every method spent until its seed-by-seed curve was where the reference ends in the mean."""
    level = float(np.mean([c.last(column) for c in found[reference]]))
    rows = []
    for name, of in found.items():
        costs = {}
        for axis in AXES:
            paid = sorted(curves.cost_to_reach(c, level, column, axis) for c in of)
            middle = (paid[(len(paid) - 1) // 2] + paid[len(paid) // 2]) / 2
            costs[axis] = (middle, sum(map(math.isfinite, paid)))
        rows.append(Reach(name, costs))
    return rows


def levels(plan: Plan, objective: Objective, found: Tested) -> list[dict[str, Any]]:
    """Of the trained reward and of gold: how far the reference went, and where that is far enough, what all spent to get there."""
    told = []
    for column in dict.fromkeys(["reward", objective.gold]) if plan.level_of else ():
        closed = gap(found, plan.level_of, column)
        rows = reach(found, plan.level_of, column) if closed >= REACHED else []
        told.append({"column": column, "gap": closed, "rows": rows})
    return told


# ---------------------------------------------------------------------------------------------------- page


def write(plan: Plan, out: Path, command: str) -> Path:
    """race.csv, search.csv, a figure an objective and report.html; returns the page."""
    sections = [_section(plan, out, objective) for objective in plan.objectives]
    _csv(out / "race.csv", sections)
    searched = _searched(plan, out)
    page = out / "report.html"
    page.write_text(
        environment_of()
        .get_template("race.html.jinja")
        .render(plan=plan, axes=AXES, sections=sections, searched=searched, command=command, environment=environment()),
        encoding="utf-8",
        errors="replace",
    )
    return page


def _section(plan: Plan, out: Path, objective: Objective) -> dict[str, Any]:
    found = {e.name: tested(plan, out, objective, e) for e in plan.entries}
    measures = measures_of(objective, next(iter(found.values()))[0])
    rows = [row(plan, e, found[e.name], tests(plan, out, objective, e)[0].overlay, measures) for e in plan.entries]
    file = out / f"{objective.name}.png"
    drawn(plan, objective, found, measures).savefig(file, dpi=110)
    best = max(rows, key=lambda r: r.means[objective.gold]).name
    base = {m: float(np.mean([c.columns[m][0] for c in found[best]])) for m in measures}
    return {
        "budgets": {e.name: _budgets(plan, objective, e) for e in plan.entries},
        **{"objective": objective, "rows": rows, "measures": measures, "figure": uri(file), "best": best, "base": base},
        "paired": [paired(plan, objective, found, best, r.name) for r in rows if r.name != best],
        "levels": levels(plan, objective, found),
        "pictures": _side_by_side(plan, out, objective),
    }


def _budgets(plan: Plan, objective: Objective, entry: Entry) -> tuple[float, float]:
    """What a search run and a test run of a method may spend on the plan's axis; 0 where nothing is searched."""
    limit = lambda is_test: runs.budget_of(plan, Job(objective, entry, 0, plan.seeds[0], is_test))[plan.axis]
    return limit(False) if plan.tuned(entry) else 0.0, limit(True)


def _side_by_side(plan: Plan, out: Path, objective: Objective) -> str | None:
    """The base model and every method on the same prompts and noise, a column each; also as OBJECTIVE-pictures.png."""
    found = {e.name: runs.pictures(out, tests(plan, out, objective, e)[0]) for e in plan.entries}
    known = {name: kept for name, kept in found.items() if kept is not None}
    if not known:
        return None
    prompts, base, _ = next(iter(known.values()))
    cells = [[base[i], *(kept[2][i] for kept in known.values())] for i in range(len(prompts))]
    file = out / f"{objective.name}-pictures.png"
    grid(cells, prompts, [""] * len(prompts), heads=("base", *known)).save(file)
    return uri(file)


def _searched(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Every configuration that was tried, with the gold score its tuning runs ended at; also as search.csv."""
    rows = []
    for objective in plan.objectives:
        for entry in plan.entries:
            for k in range(len(entry.search)) if plan.tuned(entry) else ():
                jobs = [job for job in searches(plan, objective, entry) if job.config == k]
                found = [runs.curve(out, plan, job) for job in jobs]
                why = next(
                    (told["failed"] for job in jobs if (told := runs.kept(out, plan, job)) and told["failed"]), ""
                )
                score = float(np.mean([math.nan if c is None else c.last(objective.gold) for c in found]))
                own = {"objective": objective.name, "method": entry.name, "config": entry.search[k]}
                rows.append({**own, "score": score, "why": why})
    with (out / "search.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["objective", "method", "configuration", "gold", "failed"])
        for r in rows:
            writer.writerow([r["objective"], r["method"], json.dumps(r["config"]), f"{r['score']:.6g}", r["why"]])
    return rows


def _csv(file: Path, sections: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["objective", "method", "configuration", "measure", "base", "mean", "sd", *AXES])
        for section in sections:
            for r in section["rows"]:
                for m in section["measures"]:
                    numbers = (section["base"][m], r.means[m], r.spreads[m], *(r.spent[a] for a in AXES))
                    told = (section["objective"].name, r.name, json.dumps(dict(r.config)), m)
                    writer.writerow([*told, *(f"{v:.6g}" for v in numbers)])


def drawn(plan: Plan, objective: Objective, found: Tested, measures: Sequence[str]) -> Figure:
    """A row a measure, a column an axis; every method's mean over seeds with a band of one standard deviation."""
    axes = list(dict.fromkeys([plan.axis, "reward_queries", "reward_gradients", "forwards", "backwards", "seconds"]))
    figure = Figure(figsize=(4.2 * len(axes), 2.6 * len(measures)))
    panels = figure.subplots(len(measures), len(axes), squeeze=False, sharey="row")
    spaced(figure, len(measures), len(axes))
    for line, measure in zip(panels, measures, strict=True):
        for panel, axis in zip(line, axes, strict=True):
            for number, (name, of) in enumerate(found.items()):
                x, mean, spread = curves.band(of, axis, measure)
                panel.plot(x, mean, color=f"C{number}", label=name)
                panel.fill_between(x, mean - spread, mean + spread, color=f"C{number}", alpha=0.18, linewidth=0)
            panel.grid(alpha=0.25)
            panel.locator_params(axis="x", nbins=5)
        line[0].set_ylabel(measure + (" (gold)" if measure == objective.gold and measure != "reward" else ""))
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(AXES[axis])
    panels[0][0].legend(fontsize=8)
    return figure
