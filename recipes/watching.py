"""What watching a run costs on the bundled shapes world: rows through the network and processor seconds, with the sentinel and without.

    python recipes/watching.py --out docs/results/sentinel       3 minutes on one core

The same run twice a seed, `--on-alarm keep` (the default) and `off`, evaluated at the end alone, in turn: AlignProp with a random suffix,
half of eight steps on average, with guidance. Rows are counted by a hook on the network, evaluations excluded.
Seeds 0, 1, 2. Prints and writes watching.csv.
"""

import argparse
import csv
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from study import CHAIN

from tropism.commands import align
from tropism.run import products

HOW = {"model": "shapes", "reward": "shapes-count", "updates": 30, "batch": 8, "evaluate_every": 0, "doctor": False}
SEEDS = (0, 1, 2)


class Rows:
    """Rows through the UNet so far, none of them an evaluation's."""

    def __init__(self):
        self.count, self.open = 0, True

    def __call__(self, module, inputs, _):
        if self.open and type(module).__name__ == "UNet2DConditionModel":
            self.count += len(inputs[0])

    @contextmanager
    def shut(self):
        self.open = False
        yield
        self.open = True


def measured(folder: Path, seed: int, on_alarm: str) -> tuple[int, float]:
    """(rows, processor seconds) of a run without its evaluations."""
    rows, began, spent = Rows(), time.process_time(), 0.0
    evaluate = products.Judge.measure

    def apart(*args, **kwargs):
        nonlocal spent
        at = time.process_time()
        with rows.shut():
            found = evaluate(*args, **kwargs)
        spent += time.process_time() - at
        return found

    hook = torch.nn.modules.module.register_module_forward_hook(rows)
    products.Judge.measure = apart
    try:
        options = {**CHAIN, "truncation": "suffix-uniform"}
        align("alignprop", out=folder, seed=seed, on_alarm=on_alarm, options=options, overwrite=True, threads=1, **HOW)
    finally:
        hook.remove()
        products.Judge.measure = evaluate
    return rows.count, time.process_time() - began - spent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("docs/results/sentinel"))
    parser.add_argument("--runs", type=Path, default=Path("runs/watching"))
    run = parser.parse_args()
    lines = []
    for seed in SEEDS:
        (rows, seconds), (alone, without) = (measured(run.runs / k, seed, k) for k in ("keep", "off"))
        lines.append((seed, rows, alone, 100 * (rows / alone - 1), 100 * (seconds / without - 1)))
    more, slower = (np.array([line[i] for line in lines]) for i in (3, 4))
    print(
        f"rows {more.mean():+.2f} % (at most {more.max():.2f}); processor seconds {slower.mean():+.1f} ± {slower.std(ddof=1):.1f} %"
    )
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "watching.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("seed", "rows", "rows off", "more rows %", "more processor seconds %"), *lines])


if __name__ == "__main__":
    main()
