"""What the recipes on the shapes world share: held-out measures of a finished run, entropies, and a table over seeds."""

import argparse
import json
from collections import Counter
from datetime import date
from math import log2
from pathlib import Path

import torch

from tropism.rewards.jpeg import true_bytes
from tropism.run.evaluate import Evaluation
from tropism.worlds import shapes, taste

FLAT = 690
HELD_OUT = [s.prompt for s in shapes.scenes(held_out=True)]


def entropy(values: list) -> float:
    """Bits of the empirical distribution of what the parser read, unreadable being a value of its own."""
    n = len(values)
    return -sum(c / n * log2(c / n) for c in Counter(values).values())


def measures(found: Evaluation) -> dict[str, float]:
    """Honest measures of a set of pictures: bytes above flat, parser accuracies, entropies, the hidden taste, and the rewards."""
    read = shapes.read(found.images)
    right = shapes.accuracy(found.images, found.prompts)
    return {
        "bytes above flat": true_bytes(found.images).double().mean().item() - FLAT,
        **{f"accuracy {k}": v.mean().item() for k, v in right.items()},
        "entropy background": entropy([r.background for r in read]),
        "entropy colour": entropy([r.colour for r in read]),
        "gold taste": taste.gold(found.images).mean().item(),
        **{
            f"reward {k}": v.mean().item()
            for k, v in found.columns.items()
            if k.startswith(("shapes-", "jpeg")) and k != "jpeg_kB"
        },
    }


def options(seeds: str = "0,1,2") -> argparse.Namespace:
    """--seeds, --out and --threads of a recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default=seeds)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--threads", type=int, default=2)
    found = parser.parse_args()
    found.seeds = [int(s) for s in found.seeds.split(",")]
    return found


def table(name: str, out: Path, before: list[dict], after: list[dict], seconds: list[float]):
    """Print and keep (OUT/NAME.json) means and standard deviations over seeds, before and after."""
    print(
        f"\n{name}: {len(after)} seeds, {len(HELD_OUT)} held-out prompts, {max(seconds):.0f} s at most, {date.today()}"
    )
    rows = {}
    for key in after[0]:
        a, b = (torch.tensor([m[key] for m in side], dtype=torch.float64) for side in (before, after))
        spread = b.std().item() if len(b) > 1 else float("nan")
        rows[key] = {"before": a.mean().item(), "after": b.mean().item(), "sd": spread, "each": b.tolist()}
        print(f"  {key:24s} {a.mean():9.3f} -> {b.mean():9.3f}  (sd {spread:.3f})")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(
        json.dumps({"rows": rows, "seconds": seconds, "date": str(date.today())}, indent=1) + "\n"
    )
    return rows
