"""Does a guide's gain stay in the weights, and when does training pay? Guide, distil and, for pictures, train; then one page.

    python recipes/distil.py molecules --out runs/keep          QED of 256 molecules, SVDD with 5 children; 5 minutes a seed on one core
    python recipes/distil.py shapes --out runs/keep             JPEG bytes of 64 pictures, beside AlignProp; 7 minutes a seed

Printed for each seed: mean reward of the plain model, the guide, the distilled model (and AlignProp), the share of the gain that is kept,
the hidden gold measure of each, and from how many samples on each kind of training takes fewer network rows than the guide.
"""

import argparse
import csv
from pathlib import Path

import torch

from tropism import commands
from tropism.run.compared import measured, pays_from
from tropism.run.guided import finished_run

GUIDED = {
    "molecules": {"reward": "qed", "samples": 256, "options": {"m": 5, "steps": 24}},
    "shapes": {"reward": "jpeg-bytes", "samples": 64, "options": {"m": 5}},
}
DISTILLED = {
    "molecules": {"updates": 400, "batch": 32, "lr": 5e-4, "ema": 0.98},
    "shapes": {"updates": 150, "batch": 16, "lr": 1e-3, "rank": 16},
}


def one(name: str, seed: int, out: Path) -> None:
    """One seed."""
    folder, again = out / f"{name}-{seed}", {"overwrite": True, "threads": 1}
    guided, distilled, trained = (str(folder / kind) for kind in ("guided", "distilled", "trained"))
    commands.guide("svdd", model=name, out=guided, pool=2, seed=seed, **GUIDED[name], **again)
    commands.distil(guided, out=distilled, seed=seed, **DISTILLED[name], **again)
    runs = [guided, distilled]
    if name == "shapes":
        commands.align("alignprop", model=name, reward="jpeg", out=trained, updates=60, batch=16, seed=seed, **again)
        runs.append(trained)
    entries = commands.compare(runs, out=folder / "page", **again)
    gold = next(v for n, v in measured(finished_run(guided), entries) if n.endswith(("gold", "gold_taste")))
    gain = entries[1].line.mean - entries[0].line.mean
    with (out / f"{name}.csv").open("a", newline="") as f:
        for entry, hidden in zip(entries, gold, strict=True):
            kept = (entry.line.mean - entries[0].line.mean) / gain
            row = (seed, entry.line.name, entry.line.mean, kept, hidden, entry.line.network, entry.network)
            csv.writer(f).writerow([*row, pays_from(entry, entries[1]) if entry.is_trained else ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=GUIDED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/keep"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        one(asked.domain, seed, asked.out)
    print(
        "seed, run, mean reward, share of the gain, gold, rows a sample, rows before, takes fewer rows than the guide from"
    )
    print((asked.out / f"{asked.domain}.csv").read_text())


if __name__ == "__main__":
    main()
