"""The command that repeats a committed result and says whether it came out again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from tropism.commands.train import align
from tropism.core import UserError
from tropism.run.checks import at_least_one
from tropism.run.recipes import (
    Curve,
    Difference,
    Recipe,
    bundled,
    changed_settings,
    check_seeds,
    curve_of,
    differences,
    draw,
    read_recipe,
    write_recipe,
    write_table,
)
from tropism.run.record import environment, read_lines


@dataclass(frozen=True)
class Reproduced:
    """A repeated recipe: the worst difference of every seed and column, the worst first (none after `write`)."""

    recipe: Recipe
    measured: dict[int, Curve]
    differences: list[Difference]

    @property
    def passed(self) -> bool:
        """Whether every column of every seed is within its tolerance."""
        return bool(self.differences) and all(d.share <= 1 for d in self.differences)


def reproduce(
    name: str | None = None,
    *,
    out: str | Path | None = None,
    seeds: str | Sequence[int] | None = None,
    threads: int = 1,
    resume: bool = False,
    write: str | Path | None = None,
) -> Reproduced | None:
    """Repeat a committed recipe and compare it with its reference curves; without a name, list what there is.

    name: a bundled recipe, or a .yaml file of the same form. out: a new folder; runs go to OUT/seed-N, then reproduced.csv and
    reproduced.png. seeds: numbers, or text such as "0,2"; default those of the reference. threads: the reference's is 1.
    resume: go on with the runs in `out`. write: instead of comparing, write the recipe with these curves as its reference.
    Raises UserError for a recipe, folder or seed that is not there, and for runs in `out` that have other settings.
    """
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    if name is None:
        for line in listing():
            say(line)
        return None
    at_least_one(threads=threads)
    recipe = read_recipe(name)
    chosen = _numbers(seeds) or list(recipe.reference) or [0, 1, 2]
    if write is None:
        check_seeds(recipe, chosen)
    folder = _folder(out or Path("runs") / f"reproduce-{recipe.name}", resume)
    seconds, measured = [], {}
    for seed in chosen:
        began = time.monotonic()
        measured[seed] = _one(recipe, seed, folder / f"seed-{seed}", threads, resume)
        seconds.append(time.monotonic() - began)
    if write is not None:
        slowest = recipe.seconds if resume else round(max(seconds))
        today = {"date": str(date.today()), "made_with": _made_with(), "seconds": slowest}
        write_recipe(replace(recipe, reference=measured, **today), Path(write))
        say(f"Written: {write}, with {len(chosen)} seeds as the reference. Its tolerances are those it had.")
        return Reproduced(recipe, measured, [])
    done = Reproduced(recipe, measured, differences(recipe, measured))
    write_table(recipe, measured, folder / "reproduced.csv")
    draw(recipe, measured, folder / "reproduced.png")
    for line in verdict(done):
        say(line)
    return done


def _numbers(seeds: str | Sequence[int] | None) -> list[int]:
    try:
        return [int(s) for s in (seeds.split(",") if isinstance(seeds, str) else seeds or ())]
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r} is not a list of numbers. Try --seeds 0,1,2.") from error


def listing() -> list[str]:
    """What there is to reproduce: name, time, and what it shows."""
    found = [read_recipe(name) for name in bundled()]
    lines = [f"{r.name:<16} {max(1, math.ceil(r.seconds / 60)):>2} min a seed  {r.shows}" for r in found]
    return [*lines, "Times are of one core, three seeds each. Run one: tropism reproduce NAME --out DIR"]


def verdict(done: Reproduced) -> list[str]:
    """A line for every column with its worst seed, then PASS or FAIL."""
    recipe, worst = done.recipe, {}
    for d in done.differences:
        worst.setdefault(d.column, d)
    lines = [f"{'column':<28} {'reference':>10} {'measured':>10} {'tolerance':>10}  worst at"]
    lines += [
        f"{d.column:<28} {d.reference:>10.4g} {d.measured:>10.4g} {d.tolerance:>10.2g}  "
        f"seed {d.seed}, update {d.update}{'' if d.share <= 1 else '  OUTSIDE'}"
        for d in worst.values()
    ]
    first = done.differences[0]
    said = f"{first.share:.2g} tolerances, {first.column} of seed {first.seed} at update {first.update}"
    lines.append(f"{'PASS' if done.passed else 'FAIL'}: {recipe.name}; largest deviation {said}.")
    if not done.passed:
        lines.append(f"The reference is of {recipe.date}, with {recipe.made_with}; this is {_made_with()}.")
    return lines


def _folder(out: str | Path, resume: bool) -> Path:
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not resume):
        raise UserError(f"{folder} is not empty. Add --resume to go on with the runs in it, or choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _one(recipe: Recipe, seed: int, folder: Path, threads: int, resume: bool) -> Curve:
    begun = resume and (folder / "config.yaml").is_file()
    if begun:
        _check_same(recipe, yaml.safe_load((folder / "config.yaml").read_text("utf-8")) or {}, folder)
    how: dict[str, Any] = {"seed": seed, "threads": threads, "resume": begun, "doctor": False}
    align(recipe.method, out=folder, command=f"tropism reproduce {recipe.name}", **how, **recipe.settings)
    return curve_of(read_lines(folder / "metrics.jsonl"))


def _check_same(recipe: Recipe, config: Mapping[str, Any], folder: Path) -> None:
    if changed := changed_settings(recipe, config):
        raise UserError(
            f"The run in {folder} was begun with another {' and another '.join(changed)} than the recipe {recipe.name} has. "
            "Choose another --out."
        )


def _made_with() -> str:
    """Versions, instructions and threads: what rounding depends on."""
    found = environment()
    versions = ", ".join(f"{p} {found['versions'][p]}" for p in ("tropism", "torch", "diffusers"))
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{versions}, {found['platform']} {instructions}, {found['threads']} thread{'s' * (found['threads'] > 1)}"
