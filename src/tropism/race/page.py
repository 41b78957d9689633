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

from tropism.race import curves
from tropism.race.curves import Curve
from tropism.race.plan import Entry, Objective, Plan
from tropism.run.ledger import AXES
from tropism.run.report import environment_of, uri

REACHED = 0.2
"""Share of the gap between the base and the best method that a method must have closed for others to be measured by its level."""
DRAWN = ("reward_queries", "forwards", "seconds")


@dataclass(frozen=True)
class Row:
    """A method on an objective: its chosen configuration, means and standard deviations over seeds at the budget, and what was spent."""

    name: str
    config: Mapping[str, Any]
    means: Mapping[str, float]
    spreads: Mapping[str, float]
    spent: Mapping[str, float]


def tests_of(plan: Plan, out: Path, objective: Objective, entry: Entry) -> list[Curve]:
    return [curves.read(out / objective.name / entry.name / f"test-{seed}") for seed in plan.seeds]


def measures_of(objective: Objective) -> list[str]:
    """What is drawn and told: the trained reward held out, the gold measure, watched rewards, diversity, drift."""
    gold = [] if objective.gold == "reward" else [objective.gold]
    watched = [f"watch/{w.rpartition(':')[2]}" for w in objective.watch]
    return list(dict.fromkeys(["reward", *gold, *watched, "diversity", "drift"]))


def at_budget(plan: Plan, curve: Curve, column: str) -> float:
    """A column where the run had spent the plan's budget; its last value if it ended a little before."""
    limit = min(plan.budget[plan.axis], curve.spent[plan.axis][-1])
    return float(curve.at(plan.axis, limit, column))


def row(plan: Plan, objective: Objective, entry: Entry, runs: Sequence[Curve], config: Mapping[str, Any]) -> Row:
    found = {m: [at_budget(plan, c, m) for c in runs] for m in measures_of(objective) if m in runs[0].columns}
    last = [min(plan.budget[plan.axis], c.spent[plan.axis][-1]) for c in runs]
    spent = {
        a: float(np.mean([np.interp(x, c.spent[plan.axis], c.spent[a]) for c, x in zip(runs, last, strict=True)]))
        for a in AXES
    }
    spread = lambda v: float(np.std(v, ddof=1)) if len(v) > 1 else math.nan
    return Row(
        entry.name,
        config,
        {m: float(np.mean(v)) for m, v in found.items()},
        {m: spread(v) for m, v in found.items()},
        spent,
    )


def reach(
    plan: Plan, found: Mapping[str, Sequence[Curve]], level_of: str, column: str
) -> tuple[float, dict[str, dict[str, list[float]]]]:
    """(share of the gap that `level_of` closes, {method: {axis: cost to reach its last level, one a seed}}).

    The level of a seed is the mean of the method's last values over all seeds; the gap is that from the base to the best method at the end.
    """
    level = float(np.mean([c.last(column) for c in found[level_of]]))
    base = float(np.mean([c.columns[column][0] for c in found[level_of]]))
    best = max(float(np.mean([c.last(column) for c in runs])) for runs in found.values())
    costs = {
        name: {axis: [curves.cost_to_reach(c, level, column, axis) for c in runs] for axis in AXES}
        for name, runs in found.items()
    }
    return (level - base) / (best - base) if best > base else 0.0, costs


def write(plan: Plan, out: Path, command: str) -> Path:
    """race.csv, search.csv, a figure an objective and report.html; returns the page."""
    sections = []
    for objective in plan.objectives:
        found = {e.name: tests_of(plan, out, objective, e) for e in plan.entries}
        chosen = {
            e.name: json.loads((out / objective.name / e.name / f"test-{plan.seeds[0]}" / "done.json").read_text())
            for e in plan.entries
        }
        rows = [row(plan, objective, e, found[e.name], chosen[e.name]["config"]) for e in plan.entries]
        file = out / f"{objective.name}.png"
        drawn(plan, objective, found).savefig(file, dpi=110)
        best = max(rows, key=lambda r: r.means[objective.gold])
        sections.append(
            {
                "objective": objective,
                "rows": rows,
                "measures": [m for m in measures_of(objective) if m in rows[0].means],
                "figure": uri(file),
                "best": best.name,
                "paired": [_against(plan, objective, found, best.name, r.name) for r in rows if r.name != best.name],
                "base": {m: float(np.mean([c.columns[m][0] for c in found[best.name]])) for m in rows[0].means},
            }
        )
    _csv(plan, out, sections)
    searched = search_table(plan, out)
    environment = json.loads(next(out.rglob("env.json")).read_text())
    page = out / "report.html"
    page.write_text(
        environment_of()
        .get_template("race.html.jinja")
        .render(plan=plan, axes=AXES, sections=sections, searched=searched, command=command, environment=environment),
        encoding="utf-8",
        errors="replace",
    )
    return page


def _against(
    plan: Plan, objective: Objective, found: Mapping[str, Sequence[Curve]], best: str, other: str
) -> dict[str, Any]:
    ours, theirs = ([at_budget(plan, c, objective.gold) for c in found[name]] for name in (best, other))
    mean, low, high = curves.paired(ours, theirs)
    return {"name": other, "mean": mean, "low": low, "high": high}


def search_table(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Every configuration that was tried, with the gold score its tuning runs ended at."""
    rows = []
    for objective in plan.objectives:
        for entry in [e for e in plan.entries if plan.tuned(e)]:
            for k, config in enumerate(entry.search):
                runs = [out / objective.name / entry.name / f"search-{k}-{seed}" for seed in plan.tuning_seeds]
                told = [json.loads((r / "done.json").read_text()) for r in runs]
                scores = [
                    math.nan if "failed" in t else curves.read(r).last(objective.gold)
                    for r, t in zip(runs, told, strict=True)
                ]
                why = next((t["failed"] for t in told if "failed" in t), "")
                rows.append(
                    {
                        "objective": objective.name,
                        "method": entry.name,
                        "config": config,
                        "score": float(np.mean(scores)),
                        "why": why,
                    }
                )
    with (out / "search.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["objective", "method", "configuration", "gold", "failed"])
        writer.writerows(
            [r["objective"], r["method"], json.dumps(r["config"]), f"{r['score']:.6g}", r["why"]] for r in rows
        )
    return rows


def _csv(plan: Plan, out: Path, sections: Sequence[Mapping[str, Any]]) -> None:
    with (out / "race.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["objective", "method", "configuration", "measure", "base", "mean", "sd", *AXES])
        for section in sections:
            for r in section["rows"]:
                for m in section["measures"]:
                    numbers = (section["base"][m], r.means[m], r.spreads[m], *(r.spent[a] for a in AXES))
                    writer.writerow(
                        [section["objective"].name, r.name, json.dumps(r.config), m, *(f"{v:.6g}" for v in numbers)]
                    )


def drawn(plan: Plan, objective: Objective, found: Mapping[str, Sequence[Curve]]) -> Figure:
    """A row a measure, a column an axis; every method's mean over seeds with a band of one standard deviation."""
    measures = [m for m in measures_of(objective) if all(m in c.columns for runs in found.values() for c in runs)]
    axes = list(dict.fromkeys([*DRAWN[:2], plan.axis if plan.axis not in DRAWN[:2] else DRAWN[2]]))
    figure = Figure(figsize=(4.2 * len(axes), 2.6 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), len(axes), squeeze=False, sharey="row")
    for line, measure in zip(panels, measures, strict=True):
        for panel, axis in zip(line, axes, strict=True):
            for number, (name, runs) in enumerate(found.items()):
                x, mean, spread = curves.band(runs, axis, measure)
                panel.plot(x, mean, color=f"C{number}", label=name)
                panel.fill_between(x, mean - spread, mean + spread, color=f"C{number}", alpha=0.18, linewidth=0)
            panel.grid(alpha=0.25)
        line[0].set_ylabel(f"{measure}{' (gold)' if measure == objective.gold and measure != 'reward' else ''}")
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(AXES[axis])
    panels[0][0].legend(fontsize=8)
    return figure
