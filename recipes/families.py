"""A colour reward rises on every family's tiny pipeline (random weights, real classes): 20 updates, held-out prompts.

CPU, about 4 minutes for all eight on one thread; expected: every seed of every family rises by more than 3 standard errors of
the paired change, and the adapter reloads in the plain diffusers pipeline with a difference of 0.
    python recipes/families.py [--seeds 0 1 2] [--families flux sd3 ...]
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_families import BUILDERS  # the pipelines of the conformance suite

from tropism.commands import align


def redness(images, batch):
    """Red above the mean of green and blue, (B,)."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def run(name: str, folder: Path, seed: int, out: Path) -> tuple[float, float, float, float]:
    """(before, after, standard error of the paired change, reload difference) on 16 held-out prompts."""
    done = align(
        "alignprop",
        model=str(folder),
        reward=redness,
        prompts="animals",
        evaluate_prompts=16,
        out=out,
        updates=20,
        batch=8,
        lr=1e-2,
        seed=seed,
        options={"steps": 4, "guidance": 1.0 if name == "schnell" else 3.0, "truncation": "full"},
        height=16,
        width=16,
        evaluate_every=0,
        threads=1,
    )
    before, after = done.before.columns["redness"], done.after.columns["redness"]
    change = after - before
    return (
        before.mean().item(),
        after.mean().item(),
        (change.std() / math.sqrt(len(change))).item(),
        done.reload_difference,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=list(BUILDERS))
    asked = parser.parse_args()
    print(
        "| family | before | after, mean ± sd of the seeds | smallest change in standard errors | reload difference |"
    )
    print("|---|---:|---:|---:|---:|")
    for name in asked.families:
        with tempfile.TemporaryDirectory() as scratch:
            folder = BUILDERS[name](Path(scratch) / name)
            found = [run(name, folder, seed, Path(scratch) / f"run-{seed}") for seed in asked.seeds]
        before, after = ([row[i] for row in found] for i in (0, 1))
        spread = stdev(after) if len(after) > 1 else 0.0
        least = min((b - a) / error for a, b, error, _ in found)
        print(
            f"| {name} | {mean(before):.4f} | {mean(after):.4f} ± {spread:.4f} | {least:.1f} | {max(r[3] for r in found):.1g} |"
        )


if __name__ == "__main__":
    main()
