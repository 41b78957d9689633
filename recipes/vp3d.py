"""Does a visual prompt with rewards make better scenes than score distillation alone? Nine arms on the `solids` world, its exact denoiser.

    python recipes/vp3d.py --out runs/vp3d        about 2 hours on one core; finished runs are kept, --part 0/2 and 1/2 share them out

Twelve prompts, six that say shape and colour and six that leave one open, each on five seeds. All arms of a prompt and seed share the
start, cameras and noise, and are measured against the same v: the best of eight pictures that the model itself drew of the prompt, by the
text reward, and the solid that v shows. v is never ground truth, and no arm is told what it shows but the caption arm, by the rewarding
classifier. Arms:

    sds         text alone                                     longer      the same, with more updates: more rows and more time than full
    visual      and v in the model's condition                 caption     text alone, with a caption of v in its place
    reward      text, and the text reward                      photometric text, and a fit to v at the camera that v was seen from
    consistency text, and nearness to v near the front         stylised    full, with v of another prompt: shape from text, looks from v
    full        all three                                      full-X      full without X

The judge is a classifier of another build that rewards nothing. OUT/table.csv has every arm's means; OUT/gaps.csv the differences of full
to the others, paired by prompt and seed, with 95 % bootstrap intervals. --sweep writes OUT/sweep.csv: guidance and rate for sds and full.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tropism.rewards.load import load_reward
from tropism.run.sculpt import drawn_prompt
from tropism.scene.field import VoxelField
from tropism.scene.measures import measured
from tropism.scene.vp3d import Asked, Stage
from tropism.space.volume import render
from tropism.worlds import solids_features
from tropism.worlds.solids import Scene, parse
from tropism.worlds.solids_features import HEADS
from tropism.worlds.solids_oracle import exact

PROMPTS = (
    *("a red cube", "a green cone", "a blue torus", "a yellow cylinder", "a purple sphere", "a cyan l-block"),
    *("a cube", "a cone", "a torus", "a cylinder", "a green solid", "a purple solid"),
)
OPEN = PROMPTS[6:]
WITH = {
    "sds": (),
    "visual": ("visual",),
    "reward": ("reward",),
    "consistency": ("consistency",),
    "full": ("visual", "reward", "consistency"),
    "longer": (),
    "caption": (),
    "photometric": ("photometric",),
    "stylised": ("visual", "reward", "consistency"),
    "full-visual": ("reward", "consistency"),
    "full-reward": ("visual", "consistency"),
    "full-consistency": ("visual", "reward"),
}

UPDATES, LONGER = 160, 240
HOW: dict[str, Any] = {"guidance": 7.5, "samples": 32, "smoothness": 3.0}
LR, BETAS = 0.06, (0.9, 0.99)
PHOTOMETRIC = 0.3
"""The share that the fit to v has of the distillation's gradient at the grid."""
MEASURES = (
    "accuracy",
    "accuracy/shape",
    "accuracy/colour",
    "accuracy/worst",
    "log_prob",
    "psnr",
    "psnr/foreground",
    "ssim",
    "iou",
)
MEASURES += ("janus", "colour_spread", "floaters", "text", "seconds", "rows")


# ---------------------------------------------------------------------------------------------------- a run


class World:
    """The exact denoiser, the two rewards and the judge."""

    def __init__(self):
        self.model = exact("a cube")
        self.reward, self.consistency = load_reward("solids-text"), load_reward("solids-visual")
        self.judge = solids_features.classifier("judge")

    def visual(self, prompt: str, seed: int) -> tuple[torch.Tensor, Scene, int]:
        """v, the solid that it shows, and which of the library's pictures it is."""
        how = {"count": 8, "steps": 20, "guidance": 7.5, "seed": seed, "negative": ""}
        v = drawn_prompt(self.model, prompt, self.reward, **how).picture
        library = self.model.library
        at = int((library.over((1.0, 1.0, 1.0)) - v).square().flatten(1).sum(1).argmin())
        return v, library.scenes[int(library.which[at])], at

    def caption(self, v: torch.Tensor) -> str:
        """What the rewarding classifier calls it."""
        found = solids_features.classifier("reward").logits(v[None])
        return "a {} {}".format(*(HEADS[h][int(found[h].argmax())] for h in ("colour", "shape")))


def made(world: World, arm: str, prompt: str, seed: int, lr: float = LR, **how: Any) -> dict[str, Any]:
    """A scene of one arm, measured."""
    v, target, at = world.visual(prompt, seed)
    if arm == "stylised":
        v, other, at = world.visual(PROMPTS[(PROMPTS.index(prompt) + 3) % 6], seed)
        target = Scene((replace(target.solids[0], colour=other.solids[0].colour),))
        prompt = f"a {target.solids[0].shape}"
    uses, own = WITH[arm], HOW | how
    asked = Asked(world.caption(v) if arm == "caption" else prompt, visual=v if set(uses) & {"visual", "consistency"} else None,
                  strength=0.5 if "visual" in uses else 0.0)  # fmt: skip
    own |= {name: getattr(world, name) for name in ("reward", "consistency") if name in uses}
    field, began, before = VoxelField(32), time.process_time(), world.model.calls["network"]
    optimiser = torch.optim.Adam(field.parameters(), lr, BETAS, 1e-15)
    stage = Stage(world.model, field, asked, own)
    updates = LONGER if arm == "longer" else UPDATES
    for update in range(updates):
        stage.pace(update / updates)
        ((loss, _),) = stage(stage.batch(update, seed), state={}, update=update, seed=seed, micro_batch=None)
        optimiser.zero_grad()
        loss.backward()
        if "photometric" in uses:
            _towards(field, v, world.model.library.cameras[[at]])
        optimiser.step()
    spent = {"seconds": time.process_time() - began, "rows": world.model.calls["network"] - before}
    found = measured(field, target, truth=target, judge=world.judge)
    text = measured(field, parse(prompt), judge=world.judge)
    return {**found, "text": text["log_prob"], **spent, "target": target.prompt}


def _towards(field: VoxelField, v: torch.Tensor, camera: Any) -> None:
    """Add the gradient of the squared error to v at its own camera, at a share of the length of what is there."""
    error = (render(field, camera, v.shape[-1], samples=32).over(1.0)[0] - v).square().mean()
    (slope,) = torch.autograd.grad(error, [field.grid])
    assert field.grid.grad is not None
    field.grid.grad += slope * (PHOTOMETRIC * field.grid.grad.norm() / slope.norm().clamp_min(1e-12))


def kept(world: World, out: Path, arm: str, prompt: str, seed: int, name: str = "", **how: Any) -> dict[str, Any]:
    file = out / "runs" / f"{name or arm}-{prompt.replace(' ', '_')}-{seed}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made(world, arm, prompt, seed, **how)))
        print(file.stem, flush=True)
    return json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------------- tables


def tables(
    found: dict[tuple[str, str, int], dict[str, Any]], arms: list[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Means by arm over all prompts and over the open ones, and the paired gaps of full to every other arm."""
    rows, gaps = [], []
    for which, prompts in (("all", PROMPTS), ("open", OPEN)):
        for arm in arms:
            own = {(p, s): r for (a, p, s), r in found.items() if a == arm and p in prompts}
            mean = {m: f"{np.nanmean([r[m] for r in own.values()]):.4f}" for m in MEASURES}
            rows.append({"prompts": which, "arm": arm, "runs": len(own), **mean})
            if arm in ("full", "stylised"):
                continue
            full = {key: found["full", *key] for key in own if ("full", *key) in found}
            for measure in MEASURES[:12]:
                apart = np.array([r[measure] - own[key][measure] for key, r in full.items()])
                apart = apart[np.isfinite(apart)]
                drawn = apart[np.random.default_rng(0).integers(len(apart), size=(4000, len(apart)))].mean(1)
                low, high = np.percentile(drawn, [2.5, 97.5])
                gaps.append({"prompts": which, "full minus": arm, "measure": measure, "gap": f"{apart.mean():.4f}",
                             "low": f"{low:.4f}", "high": f"{high:.4f}", "pairs": len(apart)})  # fmt: skip
    yield "table", rows
    yield "gaps", gaps


def write(out: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sweep(world: World, out: Path) -> None:
    """Guidance and rate for plain SDS and for full, on four prompts of seed 100, which the tables do not have."""
    rows = []
    for arm in ("sds", "full"):
        for guidance in (3.0, 7.5, 20.0):
            for lr in (0.03, 0.06):
                name = f"sweep-{arm}-{guidance:g}-{lr:g}"
                runs = [kept(world, out, arm, p, 100, name, guidance=guidance, lr=lr) for p in PROMPTS[::4] + OPEN[:1]]
                mean = {
                    m: f"{np.nanmean([r[m] for r in runs]):.4f}" for m in ("accuracy", "text", "psnr", "iou", "janus")
                }
                rows.append({"arm": arm, "guidance": guidance, "lr": lr, **mean})
    write(out, "sweep", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vp3d"))
    parser.add_argument("--arms", nargs="+", default=list(WITH), choices=list(WITH))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--part", default="0/1", help="such as 0/2: the first of two shares of the runs")
    parser.add_argument("--sweep", action="store_true")
    run = parser.parse_args()
    torch.set_num_threads(1)
    world, seeds = World(), [int(s) for s in run.seeds.split(",")]
    if run.sweep:
        return sweep(world, run.out)
    part, parts = map(int, run.part.split("/"))
    every = [(arm, prompt, seed) for seed in seeds for prompt in PROMPTS for arm in run.arms]
    found = {key: kept(world, run.out, *key) for i, key in enumerate(every) if i % parts == part}
    if parts == 1:
        for name, rows in tables(found, run.arms):
            write(run.out, name, rows)
            print((run.out / f"{name}.csv").read_text())


if __name__ == "__main__":
    main()
