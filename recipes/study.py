"""What the recipes on the shapes world share: the runs over seeds, held-out measures, entropies, and a table."""

import argparse
import json
import time
from collections import Counter
from datetime import date
from math import log2
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

from tropism.commands import Run, align
from tropism.models.lora import EVERY_LAYER
from tropism.rewards.jpeg import bytes_above_flat
from tropism.run.evaluate import Evaluation
from tropism.worlds import shapes, taste

matplotlib.use("Agg")
SAMPLING = {"steps": 8, "guidance": 2.0}
CHAIN = {**SAMPLING, "truncation": "2"}
LAST = {**SAMPLING, "truncation": "1", "drift": 0.28, "drift_detach": True}
"""The last step alone takes the grain away and leaves what the earlier ones laid out; drift holds it to the base."""
WIDE = {"lr": 3e-3, "ema": 0.95, "rank": 16, "targets": EVERY_LAYER}
"""Adapters on every layer: grain is drawn by the convolutions."""
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
        "bytes above flat": bytes_above_flat(found.images).double().mean().item(),
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
    """--seeds, --out, --threads and --resume of a recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default=seeds)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with the runs that are there")
    found = parser.parse_args()
    found.seeds = [int(s) for s in found.seeds.split(",")]
    return found


def runs(
    run: argparse.Namespace, name: str, reward: list[str], options: dict, **settings
) -> tuple[list[Run], list[float]]:
    """One AlignProp run a seed on the shapes model, judged on every held-out prompt; the runs and their seconds, evaluations included."""
    done, seconds = [], []
    for seed in run.seeds:
        began = time.time()
        done.append(
            align(
                "alignprop",
                model="shapes",
                reward=reward,
                held_out=HELD_OUT,
                seed=seed,
                out=run.out / f"{name}-{seed}",
                options=options,
                resume=run.resume,
                overwrite=not run.resume,
                threads=run.threads,
                **{"batch": 16, "rank": 8, "evaluate_every": 0, "evaluate_prompts": len(HELD_OUT), **settings},
            )
        )
        seconds.append(time.time() - began)
    return done, seconds


def compared(run: argparse.Namespace, name: str, reward: list[str], options: dict, **settings) -> dict:
    """`runs`, and the `table` of its measures before and after."""
    done, seconds = runs(run, name, reward, options, **settings)
    return table(name, run.out, [measures(d.before) for d in done], [measures(d.after) for d in done], seconds)


def followed(run: argparse.Namespace, name: str, reward: list[str], options: dict, *, key: str, **settings) -> None:
    """`compared` with the curve on held-out prompts: OUT/NAME.png, and the share of the missing accuracy `key` closed."""
    compared(run, name, reward, options, **settings)
    folders = [run.out / f"{name}-{seed}" for seed in run.seeds]
    update, score, right = (
        curve(folders, column) for column in ("update", "held_out/reward", f"held_out/parser/{key}")
    )
    panels(run.out / f"{name}.png", update[0], {" + ".join(reward): score, f"accuracy: {key}": right})
    best, mean = right.mean(0).argmax(), right.mean(0)
    for what, k in (("at the end", -1), (f"at its best, update {update[0, best]:.0f}", best)):
        share = ", ".join(f"{s:.2f}" for s in (right[:, k] - right[:, 0]) / (1 - right[:, 0]))
        print(f"  {key} {mean[k]:.3f} {what}; share of the missing accuracy closed: {share}")


def panels(file: Path, update: torch.Tensor, columns: dict[str, torch.Tensor], mark: float | None = None) -> None:
    """One panel for each column (runs, evaluations): every run in grey, the mean in blue, a dotted line at `mark`."""
    figure, axes = pyplot.subplots(1, len(columns), figsize=(4.5 * len(columns), 3.2))
    for axis, (title, values) in zip(axes, columns.items(), strict=True):
        axis.plot(update, values.T, color="0.7")
        axis.plot(update, values.mean(0), color="tab:blue")
        axis.set(xlabel="update", title=title)
        if mark is not None:
            axis.axvline(mark, color="tab:red", linestyle=":")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def curve(folders: list[Path], column: str) -> torch.Tensor:
    """A column of the evaluated updates' records, (runs, evaluations)."""
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    return torch.tensor([[r[column] for r in run if "held_out/reward" in r] for run in lines], dtype=torch.float64)


def table(name: str, out: Path, before: list[dict], after: list[dict], seconds: list[float]):
    """Print and keep (OUT/NAME.json) means and standard deviations over seeds, before and after."""
    print(
        f"\n{name}: {len(after)} seeds, {len(HELD_OUT)} held-out prompts, {max(seconds):.0f} s at most, {date.today()}"
    )
    rows = {}
    for key in after[0]:
        a, b = (torch.tensor([m[key] for m in side], dtype=torch.float64) for side in (before, after))
        spread = b.std().item() if len(b) > 1 else float("nan")
        rows[key] = {
            "before": a.mean().item(),
            "after": b.mean().item(),
            "sd": spread,
            "base": a.tolist(),
            "each": b.tolist(),
        }
        print(f"  {key:24s} {a.mean():9.3f} -> {b.mean():9.3f}  (sd {spread:.3f})")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(
        json.dumps({"rows": rows, "seconds": seconds, "date": str(date.today())}, indent=1) + "\n"
    )
    return rows
