"""Does a visual prompt with rewards make better scenes than score distillation alone? Nine arms on the `solids` world.

    python recipes/vp3d.py --out runs/vp3d        about 3 hours on one core; finished runs are kept, --part 0/2 and 1/2 share them out

Twelve prompts, six that say shape and colour and six that leave one open, each on five seeds. All arms of a prompt and seed share the
start, cameras and noise, and are measured against the same v: the best of eight pictures that the model itself drew of the prompt, by the
text reward, and the solid that v shows. v is never ground truth, and no arm is told what it shows but the caption arm, by the rewarding
classifier. Arms:

    sds         text alone                                     longer      the same, with more updates: more rows and more time than full
    visual      and v in the model's condition                 caption     text alone, with a caption of v in its place
    reward      text, and the text reward                      photometric text, and a fit to v at the camera that v was seen from
    consistency text, and nearness to v near the front         stylised    full, with v of another prompt: shape from text, looks from v
    full        all three                                      full-X      full without X

The judge is a classifier of another build that rewards nothing. OUT/runs.csv has every run, OUT/table.csv every arm's means, OUT/gaps.csv
the differences of full to the others, paired by prompt and seed, with 95 % bootstrap intervals, of pairs and, since the seeds of a prompt
are alike, of whole prompts. --sweep writes OUT/sweep.csv: guidance and rate for sds and full.
The diffusion model is the exact denoiser. --model solids takes the network that was trained on that world: four arms on four prompts and
two seeds, to OUT/trained-table.csv and OUT/trained-gaps.csv. So does a folder of `tropism pretrain solids`, with --adapter.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tropism.models.load import load_model
from tropism.rewards.load import load_reward
from tropism.run.sculpt import Visual, drawn_prompt
from tropism.scene.field import VoxelField
from tropism.scene.measures import border, measured
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
SOME = (PROMPTS[0], PROMPTS[2], OPEN[1], OPEN[4])
"""For the trained network: two that say all and two that leave one open."""
EXACT = "solids-exact"
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
TRAINED = ("sds", "caption", "photometric", "full")
"""The arms of the trained network."""
TRAINED_STRENGTH = 2.0
"""Of v for the trained network: at .5 its colours do not reach the back."""
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
MEASURES += ("face", "janus", "colour_spread", "floaters", "text", "chamfer", "consistency", "seconds", "rows")


# ---------------------------------------------------------------------------------------------------- a run


class World:
    """A diffusion model, the library of pictures that it should know, the two rewards and the judge."""

    def __init__(self, name: str, adapter: str | None):
        known, self.name = exact("a cube"), name
        self.library, self.adapter = known.library, adapter
        self.strength = 0.5 if name == EXACT else TRAINED_STRENGTH
        self.model: Any = known if name == EXACT else load_model(name, lora=None, visual=adapter)
        self.reward, self.consistency = load_reward("solids-text"), load_reward("solids-visual")
        self.judge = solids_features.classifier("judge")

    def drawn(self, prompt: str, seed: int) -> Visual:
        """Eight pictures that the model draws of a prompt, and the best of them by the text reward."""
        how = {"count": 8, "steps": 20, "guidance": self.model.guidance, "seed": seed, "negative": ""}
        return drawn_prompt(self.model, prompt, self.reward, **how)

    def visual(self, prompt: str, seed: int) -> tuple[torch.Tensor, Scene, int]:
        """v, the solid that it shows, and which of the library's pictures it is."""
        v = self.drawn(prompt, seed).picture
        near = self.library.over(border(v)) - v  # on v's own background: a network draws on any colour
        at = int(near.square().flatten(1).sum(1).argmin())
        return v, self.library.scenes[int(self.library.which[at])], at

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
                  strength=world.strength if "visual" in uses else 0.0)  # fmt: skip
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
            _towards(field, v, world.library.cameras[[at]])
        optimiser.step()
    spent = {"seconds": time.process_time() - began, "rows": world.model.calls["network"] - before}
    found = measured(field, target, truth=target, judge=world.judge, visual=v)
    text = measured(field, parse(prompt), judge=world.judge)
    return {**found, "text": text["log_prob"], **spent, "target": target.prompt}


def _towards(field: VoxelField, v: torch.Tensor, camera: Any) -> None:
    """Add the gradient of the squared error to v at its own camera, at a share of the length of what is there."""
    error = (render(field, camera, v.shape[-1], samples=32).over(1.0)[0] - v).square().mean()
    (slope,) = torch.autograd.grad(error, [field.grid])
    assert field.grid.grad is not None
    field.grid.grad += slope * (PHOTOMETRIC * field.grid.grad.norm() / slope.norm().clamp_min(1e-12))


def kept(world: World, out: Path, arm: str, prompt: str, seed: int, name: str = "", **how: Any) -> dict[str, Any]:
    folder = out / (
        "runs" if world.name == EXACT else f"runs-{Path(world.name).name}-{Path(world.adapter or '').name}".rstrip("-")
    )
    file = folder / f"{name or arm}-{prompt.replace(' ', '_')}-{seed}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made(world, arm, prompt, seed, **how)))
        print(file.stem, flush=True)
    return json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------------- tables


def average(values: list[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def interval(apart: list[list[float]]) -> dict[str, Any]:
    """The mean of paired differences, listed by prompt, and 95 % bootstrap intervals: of pairs drawn anew, and of whole prompts."""
    every, rng = np.concatenate(apart), np.random.default_rng(0)
    pairs = every[rng.integers(len(every), size=(4000, len(every)))].mean(1)
    sums, counts = np.array([sum(a) for a in apart]), np.array([len(a) for a in apart])
    chosen = rng.integers(len(apart), size=(4000, len(apart)))
    found = {"gap": every.mean()}
    for name, drawn in (("", pairs), (" by prompt", sums[chosen].sum(1) / counts[chosen].sum(1))):
        found |= dict(zip((f"low{name}", f"high{name}"), np.percentile(drawn, [2.5, 97.5]), strict=True))
    return {name: f"{value:.4f}" for name, value in found.items()} | {"pairs": len(every)}


def tables(
    found: dict[tuple[str, str, int], dict[str, Any]], arms: list[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Means by arm over all prompts and over the open ones, and the paired gaps of full to every other arm."""
    rows: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for which, prompts in (("all", PROMPTS), ("open", OPEN), ("closed", PROMPTS[:6])):
        for arm in arms:
            own = {(p, s): r for (a, p, s), r in found.items() if a == arm and p in prompts}
            mean = {m: f"{average([r.get(m, np.nan) for r in own.values()]):.4f}" for m in MEASURES}
            rows.append({"prompts": which, "arm": arm, "runs": len(own), **mean})
            if arm in ("full", "stylised"):
                continue
            full = {key: found["full", *key] for key in own if ("full", *key) in found}
            for measure in MEASURES[:-2]:
                apart: dict[str, list[float]] = {}
                for key, r in full.items():
                    value = r.get(measure, np.nan) - own[key].get(measure, np.nan)
                    if np.isfinite(value):
                        apart.setdefault(key[0], []).append(value)
                if apart:
                    gaps.append(
                        {"prompts": which, "full minus": arm, "measure": measure, **interval(list(apart.values()))}
                    )
    yield "table", rows
    yield "gaps", gaps


def write(out: Path, name: str, rows: list[dict[str, Any]]) -> None:
    if not rows:  # gaps, without the arm that they are of
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sweep(world: World, out: Path, prefix: str) -> None:
    """Guidance and rate for plain SDS and for full, on four prompts of seed 100, which the tables do not have."""
    rows = []
    for arm in ("sds", "full"):
        for guidance in (3.0, 7.5, 20.0):
            for lr in (0.03, 0.06):
                name = f"sweep-{arm}-{guidance:g}-{lr:g}"
                runs = [kept(world, out, arm, p, 100, name, guidance=guidance, lr=lr) for p in PROMPTS[::4] + OPEN[:1]]
                mean = {
                    m: f"{np.nanmean([r[m] for r in runs]):.4f}"
                    for m in ("accuracy", "text", "psnr", "iou", "face", "janus")
                }
                rows.append({"arm": arm, "guidance": guidance, "lr": lr, **mean})
    write(out, f"{prefix}sweep", rows)


def selection(world: World, prompts: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What choosing v by the reward brings: the first of the eight pictures beside the best, by reward and by the judge."""
    rows = []
    for prompt in prompts:
        said = parse(prompt).solids[0].said
        for seed in seeds:
            drawn = world.drawn(prompt, seed)
            read = world.judge.log_probs(drawn.candidates)
            right = torch.stack([read[h].argmax(1) == HEADS[h].index(v) for h, v in said.items()]).all(0)
            best = int(drawn.rewards.argmax())
            row: dict[str, Any] = {"prompt": prompt, "seed": seed}
            for name, at in (("first", 0), ("best", best)):
                row |= {f"{name}/reward": f"{float(drawn.rewards[at]):.4f}", f"{name}/right": int(right[at])}
            rows.append(row | {"right of 8": int(right.sum())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vp3d"))
    parser.add_argument("--arms", nargs="+", default=list(WITH), choices=list(WITH))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--part", default="0/1", help="such as 0/2: the first of two shares of the runs")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--selection", action="store_true", help="only what choosing v brings: OUT/selection.csv")
    parser.add_argument("--model", default=EXACT)
    parser.add_argument("--adapter")
    run = parser.parse_args()
    torch.set_num_threads(1)
    world, seeds, prompts = World(run.model, run.adapter), [int(s) for s in run.seeds.split(",")], PROMPTS
    prefix = "" if run.model == EXACT else "trained-"
    if run.sweep:
        return sweep(world, run.out, prefix)
    if run.model != EXACT:
        seeds, prompts = seeds[:2], SOME
        run.arms = [arm for arm in TRAINED if arm in run.arms]
    if run.selection:
        return write(run.out, f"{prefix}selection", selection(world, PROMPTS, [int(s) for s in run.seeds.split(",")]))
    part, parts = map(int, run.part.split("/"))
    every = [(arm, prompt, seed) for seed in seeds for prompt in prompts for arm in run.arms]
    found = {key: kept(world, run.out, *key) for i, key in enumerate(every) if i % parts == part}
    if parts == 1:
        for name, rows in tables(found, run.arms):
            write(run.out, prefix + name, rows)
            print("\n".join(",".join(map(str, row.values())) for row in rows))
        number = lambda value: f"{value:.4f}" if isinstance(value, float) else value
        write(
            run.out,
            f"{prefix}runs",
            [
                {"arm": a, "prompt": p, "seed": s, "target": r["target"], **{m: number(r.get(m, "")) for m in MEASURES}}
                for (a, p, s), r in found.items()
            ],
        )


if __name__ == "__main__":
    main()
