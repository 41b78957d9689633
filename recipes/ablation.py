"""What each part of our own recipe is worth: one part changed at a time, on the objectives and at the budget of recipes/methods.yaml.

    python recipes/ablation.py --methods docs/results/methods --out runs/ablation [--objective NAME] [--method NAME]

The recipe is what its search chose for an objective, and its first test runs are taken from --methods. Hardware: one core a process,
about 90 seconds a run, 21 runs an objective. A page an objective: OUT/OBJECTIVE/report.html. What is there is not run again.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from tropism.commands.race import race
from tropism.race import page
from tropism.race.plan import Entry, read
from tropism.run.checks import known

OURS, SEEDS = "Tropism", (0, 1, 2)
CHANGED = {
    "as it is": {},
    "8 steps with guidance 2": {"steps": 8, "guidance": 2.0},
    "batches of 8": {"batch": 8},
    "a constant rate": {"schedule": "constant"},
    "no average": {"ema": 0.0},
    "no drift penalty": {"drift": 0.0},
    "a random suffix": {"truncation": "suffix-uniform"},
    "the whole chain": {"truncation": "full"},
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", type=Path, default=Path("docs/results/methods"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--plan", type=Path, default=Path(__file__).parent / "methods.yaml")
    parser.add_argument("--objective")
    parser.add_argument("--method")
    run = parser.parse_args()
    plan = read(run.plan)
    known(run.objective or plan.objectives[0].name, [o.name for o in plan.objectives], "objective")
    plan = replace(plan, settings={"dtype": "float32", **plan.settings})
    ours = next(e for e in plan.entries if e.name == OURS)
    for objective in plan.objectives:
        if run.objective in (None, objective.name):
            chosen = page.tests(plan, run.methods, objective, ours)[0].overlay
            entries = tuple(Entry(n, ours.method, {**ours.settings, **chosen, **c}) for n, c in CHANGED.items())
            for seed in SEEDS:
                kept = Path(objective.name) / OURS / f"test-{seed}.json"
                there = run.out / objective.name / objective.name / "as it is" / kept.name
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(run.methods / kept, there)
            one = replace(
                plan, objectives=(replace(objective, longer={}),), entries=entries, seeds=SEEDS, longer={}, level_of=""
            )
            only = {"method": run.method} if run.method else None
            race(one, out=run.out / objective.name, only=only, threads=1, command="python recipes/ablation.py")


if __name__ == "__main__":
    main()
