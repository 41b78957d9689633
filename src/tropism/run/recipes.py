"""Recipes whose result is committed: a run's settings, its reference curves, and how far a repetition may be from them."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tropism.core import UserError
from tropism.run.pictures import spaced

Curve = dict[str, list[float]]
"""The evaluated updates' record, column by column; "update" is one of them."""


@dataclass(frozen=True)
class Recipe:
    """A run that can be repeated. settings: of `commands.align`, without out and seed. seconds: of one core, a seed.

    tolerance: column -> largest allowed difference to the reference, in the column's own unit, at every evaluated update.
    reference: seed -> curve.
    """

    name: str
    shows: str
    method: str
    settings: dict[str, Any]
    seconds: float = math.nan
    date: str = ""
    made_with: str = ""
    tolerance_from: str = ""
    tolerance: dict[str, float] = field(default_factory=dict)
    reference: dict[int, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Where a column of one seed is farthest from its reference, in units of its tolerance (inf: missing or not finite)."""

    seed: int
    column: str
    update: int
    reference: float
    measured: float
    tolerance: float

    @property
    def share(self) -> float:
        off = abs(self.measured - self.reference)
        return off / self.tolerance if math.isfinite(off) else math.inf


def bundled() -> dict[str, Path]:
    """The file of every recipe in the package, by its name."""
    found = Path(str(files("tropism") / "recipes")).glob("*.yaml")
    return {p.stem: p for p in sorted(found)}


def read_recipe(name: str) -> Recipe:
    """A bundled recipe by its name, or that of a .yaml file. Raises UserError for one that is missing or not of this form."""
    known = bundled()
    path = Path(name) if name.endswith(".yaml") else known.get(name)
    if path is None or not path.is_file():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise UserError(f"There is no recipe '{name}'. {hint}Known: {', '.join(known)}, or a .yaml file.")
    try:
        read = yaml.safe_load(path.read_text("utf-8"))
        recipe = Recipe(path.stem, **read)
        ours = [isinstance(x, dict) for x in (recipe.settings, recipe.tolerance, recipe.reference)]
        assert all(ours) and not any(v <= 0 for v in recipe.tolerance.values())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} is no recipe ({error}). It has shows, method, settings, and after --write a reference; see the bundled ones."
        ) from error
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """As YAML, curves one column a line."""
    values = {k: v for k, v in asdict(recipe).items() if k not in ("name", "tolerance", "reference")}
    lines = [yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)]
    lines.append("tolerance:\n" if recipe.tolerance else "tolerance: {}\n")
    lines += [f"  {column}: {_number(value)}\n" for column, value in recipe.tolerance.items()]
    lines.append("reference:\n" if recipe.reference else "reference: {}\n")
    for seed, curve in recipe.reference.items():
        lines.append(f"  {seed}:\n")
        lines += [f"    {column}: [{', '.join(map(_number, values))}]\n" for column, values in curve.items()]
    path.write_text("".join(lines), encoding="utf-8")


def _number(value: float) -> str:
    """As YAML reads it back: 1e-06 without a point is a word there."""
    text = ".nan" if math.isnan(value) else repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def curve_of(lines: Sequence[Mapping[str, Any]]) -> Curve:
    """What a run's metrics.jsonl says of its evaluated updates: held-out columns, drift and diversity, to 7 digits."""
    evaluated = [row for row in lines if "held_out/reward" in row]
    names = [n for n in (evaluated or [{}])[-1] if n.startswith("held_out/") or n in ("drift", "diversity")]
    rounded = lambda value: float(f"{value:.7g}") if isinstance(value, int | float) else math.nan
    none = lambda name, row: 0.0 if name == "drift" and row["update"] == 0 else None  # before training there is none
    return {
        "update": [row["update"] for row in evaluated],
        **{n: [rounded(row.get(n, none(n, row))) for row in evaluated] for n in names},
    }


def differences(recipe: Recipe, measured: Mapping[int, Curve]) -> list[Difference]:
    """The worst place of every column with a tolerance and every seed, the worst first.

    A column or an update that is missing is infinitely far.
    """
    found = []
    for seed, ours in measured.items():
        theirs = recipe.reference[seed]
        for column, tolerance in recipe.tolerance.items():
            places = [
                Difference(seed, column, int(update), value, _at(ours, column, update), tolerance)
                for update, value in zip(theirs["update"], theirs[column], strict=True)
            ]
            found.append(max(places, key=lambda d: d.share))
    return sorted(found, key=lambda d: -d.share)


def check_seeds(recipe: Recipe, seeds: Sequence[int]) -> None:
    """Raises UserError for a seed without a reference."""
    for seed in seeds:
        if seed not in recipe.reference:
            have = (
                f"it has {', '.join(map(str, recipe.reference))}"
                if recipe.reference
                else "it has none; make it with --write"
            )
            raise UserError(f"The recipe {recipe.name} has no reference for seed {seed}: {have}.")


def _at(curve: Curve, column: str, update: float) -> float:
    """NaN where the curve does not have it."""
    values = dict(zip(curve.get("update", []), curve.get(column, []), strict=False))
    return values.get(update, math.nan)


def changed_settings(recipe: Recipe, config: Mapping[str, Any]) -> list[str]:
    """The recipe's settings that a run folder's config.yaml has otherwise."""
    options = recipe.settings.get("options", {})
    wanted = {**{k: v for k, v in recipe.settings.items() if k != "options"}, "method": recipe.method}
    wanted["reward"] = [wanted["reward"]] if isinstance(wanted.get("reward"), str) else wanted.get("reward")
    of_run = config.get("options") or {}
    return [k for k, v in wanted.items() if config.get(k) != v] + [k for k, v in options.items() if of_run.get(k) != v]


def write_table(recipe: Recipe, measured: Mapping[int, Curve], path: Path) -> None:
    """Every number beside its reference, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["seed", "update", "column", "reference", "measured", "difference", "tolerance"])
        for seed in measured:
            theirs = recipe.reference[seed]
            for column, tolerance in recipe.tolerance.items():
                for update, value in zip(theirs["update"], theirs[column], strict=True):
                    ours = _at(measured[seed], column, update)
                    table.writerow([seed, update, column, value, ours, f"{ours - value:.3g}", tolerance])


def draw(recipe: Recipe, measured: Mapping[int, Curve], path: Path) -> None:
    """A panel for each column: reference in black with its tolerance, measured in colour, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(4, len(recipe.tolerance))
    down = math.ceil(len(recipe.tolerance) / across)
    figure = Figure(figsize=(3.6 * across, 2.6 * down), dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flat
    spaced(figure, down, across)
    for panel, (column, tolerance) in zip(panels, recipe.tolerance.items(), strict=False):
        for i, seed in enumerate(measured):
            theirs = recipe.reference[seed]
            low, high = ([v + sign * tolerance for v in theirs[column]] for sign in (-1, 1))
            panel.fill_between(theirs["update"], low, high, color="0.85")
            panel.plot(theirs["update"], theirs[column], color="black", linewidth=0.8)
            ours = [_at(measured[seed], column, update) for update in theirs["update"]]
            panel.plot(theirs["update"], ours, "o--", color=f"C{i}", markersize=3, linewidth=0.8, label=f"seed {seed}")
        panel.set_title(column, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_xlabel("update", fontsize=7)
    for panel in panels:
        panel.set_axis_off()
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path)
