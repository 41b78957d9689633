"""How well does the dial predict? Reward and diversity over strengths 0..1.5, and of mixtures of two adapters, against 200 fresh pictures.

    python recipes/dial.py --out docs/results/dial --runs runs/dial        about an hour and a half on one core; resumable

Three short AlignProp runs a seed on the shapes model: jpeg, shapes-count, shapes-aesthetic. The prediction sees 16 probe pictures at
three settings, and the run's own held-out pictures before and after training: all 195 prompts, as the recipes of this folder evaluate
their runs, or the 32 of a run with the default settings; and, for comparison, 16 probe pictures at each of the three. Measured on 200
fresh pictures of the held-out prompts with other noise, the same at every setting. Errors are mean absolute errors over the settings in
per cent of the measured range.
"""

import argparse
import csv
from datetime import date
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from study import CHAIN, HELD_OUT, SAMPLING, WIDE

from tropism.commands import align
from tropism.models import lora, mixing
from tropism.models.load import load_model
from tropism.rewards.load import load_rewards
from tropism.run import dial
from tropism.run.evaluate import evaluate
from tropism.run.report import spread

matplotlib.use("Agg")
REWARDS = {"jpeg": "jpeg", "count": "shapes-count", "aesthetic": "shapes-aesthetic"}
UPDATES, RATES, N = {"jpeg": 12, "count": 36, "aesthetic": 12}, {"count": 1e-3}, 200
"""Count moves late: 12 updates at 3e-3 change it by a seventh of what one picture differs from the next."""
AT = (0.0, 0.25, 0.75, 1.0, 1.5)
PAIR = ("jpeg", "count")
PROBED = ((len(HELD_OUT), 16), (32, 16), (len(HELD_OUT), 48))
"""How many of its own pictures before and after training a run has kept, and probe pictures in all: 48 are 16 at each of three."""
FRESH = (HELD_OUT + HELD_OUT[:: len(HELD_OUT) // (N - len(HELD_OUT))])[:N]
JUDGES = load_rewards(list(REWARDS.values()))


def train(folder: Path, name: str, seed: int) -> Path:
    """One run, or the one that is there."""
    if not (folder / "report.html").exists():
        how = {
            "batch": 16,
            "updates": UPDATES[name],
            "evaluate_every": 0,
            "evaluate_prompts": 32,
            "checkpoint_every": 100,
        }
        own = {**WIDE, "ema": 0.0, **({"lr": RATES[name]} if name in RATES else {})}
        align(
            "alignprop",
            model="shapes",
            reward=REWARDS[name],
            seed=seed,
            out=folder,
            options=CHAIN,
            overwrite=True,
            **how,
            **own,
        )
    return folder


def drawn(file: Path, make, prompts: list[str], seed: int, index=None) -> dict[str, torch.Tensor]:
    """Columns (n,) and pairs (n, n) of the pictures of `prompts` by the model that `make` gives, kept in `file`."""
    if not file.exists():
        found = evaluate(make(), JUDGES, prompts, **SAMPLING, seed=seed, batch_size=50, index=index)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: v.contiguous() for n, v in dial.quantities(found).items()}, file)
    return load_file(file)


def adapted(folder: Path, strength: float):
    """The shapes model with a run's adapter at a strength."""
    model = load_model("shapes", lora=lora.read(folder / "lora")[1])
    lora.load(model, folder / "lora")
    lora.scale(model, strength)
    return merged(model)


def mixed(first: Path, second: Path, weight: float):
    model = load_model("shapes")
    mixing.mix(model, {first / "lora": 1 - weight, second / "lora": weight})
    return merged(model)


def merged(model):
    """The adapter in the weights: the same pictures up to rounding, in three quarters of the time."""
    for layer in model.network.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    return model


def settings(run: argparse.Namespace, seed: int, name: str):
    """(place -> model) of a dial, its places of probes, and its places of fresh pictures."""
    folder = lambda reward: run.runs / f"dial-{reward}-{seed}"
    if name in REWARDS:
        return lambda s: adapted(folder(name), s) if s else load_model("shapes"), dial.PROBES[1], AT
    return lambda w: mixed(*(folder(n) for n in PAIR), w), dial.PROBES[2], dial.WEIGHTS


def kept(
    run: argparse.Namespace, seed: int, name: str, place: float, rows: list[int] | None = None
) -> dict[str, torch.Tensor]:
    """The pictures of a setting: fresh ones, or some of the run's own; the base and the ends of a mixture are drawn once."""
    make = settings(run, seed, name)[0]
    called = f"{name}-{place:g}"
    if name not in REWARDS and place in (0.0, 1.0):
        called = f"{PAIR[int(place)]}-1"
    called = "base" if called.endswith("-0") else called
    what = "fresh" if rows is None else "own" if len(rows) == len(HELD_OUT) else "probe-" + "-".join(map(str, rows))
    file = run.runs / "measured" / f"{called}-{seed}-{what}.safetensors"
    if rows is None:
        return drawn(file, lambda: make(place), FRESH, 1000 + seed)
    return drawn(file, lambda: make(place), [HELD_OUT[i] for i in rows], seed, rows)


def judged(run: argparse.Namespace, seed: int, name: str, known: int, few: int) -> list[dict]:
    """One row a quantity and place: predicted, from `known` pictures at the ends and `few` probes, and measured."""
    _, probed, places = settings(run, seed, name)
    ends = tuple(kept(run, seed, name, p, list(range(len(HELD_OUT)))) for p in (0.0, 1.0))
    rewards = [REWARDS[n] for n in ((name,) if name in REWARDS else PAIR)]
    mine = spread(len(HELD_OUT), known)
    ends = tuple({q: dial.of_rows(v, mine) for q, v in end.items()} for end in ends)
    counts = probed if few == 16 else dict.fromkeys(probed, 16)
    probing = dial.plan(ends, [*rewards, "diversity"], counts, range(known))
    probes = {p: kept(run, seed, name, p, [mine[i] for i in rows]) for p, rows in probing.items()}
    found = []
    for quantity in [*rewards, "diversity"]:
        seen = {p: (v[quantity], probing[p]) for p, v in probes.items()}
        predicted = dial.predict(tuple(e[quantity] for e in ends), seen, places)
        for place, value in zip(places, predicted, strict=True):
            values = kept(run, seed, name, place)[quantity]
            row = {
                "dial": name,
                "seed": seed,
                "known": known,
                "few": few,
                "quantity": quantity,
                "place": place,
                "predicted": value,
            }
            found.append({**row, "measured": values.nanmean().item(), "s.e.": dial.standard_error(values)})
    return found


def told(rows: list[dict]) -> None:
    """The errors, a line a dial and quantity, a column a seed."""
    seeds = list(dict.fromkeys(r["seed"] for r in rows))
    print(f"{date.today()}, seeds {seeds}: mean absolute error in % of the measured range")
    key = lambda r: (r["known"], r["few"], r["dial"], r["quantity"])
    for known, few, name, quantity in sorted(dict.fromkeys(map(key, rows))):
        shares = []
        for seed in seeds:
            mine = [r for r in rows if (*key(r), r["seed"]) == (known, few, name, quantity, seed)]
            shares.append(100 * dial.error_share([r["predicted"] for r in mine], [r["measured"] for r in mine]))
        print(
            f"  {known:4d} kept, {few:2d} probes  {name:12s} {quantity:18s} " + "  ".join(f"{s:6.1f}" for s in shares),
            flush=True,
        )


def drawing(rows: list[dict], file: Path) -> None:
    """Predicted lines and measured points of the first seed, a panel a dial and quantity."""
    first = [r for r in rows if (r["known"], r["few"], r["seed"]) == (*PROBED[0], rows[0]["seed"])]
    panels = list(dict.fromkeys((r["dial"], r["quantity"]) for r in first))
    figure, axes = pyplot.subplots(3, 3, figsize=(10, 7.5))
    for axis, (name, quantity) in zip(axes.flat, panels, strict=True):
        mine = [r for r in first if (r["dial"], r["quantity"]) == (name, quantity)]
        column = lambda key, mine=mine: [r[key] for r in mine]
        axis.plot(column("place"), column("predicted"), "o-", color="#2f6690", label="predicted", ms=3.5)
        axis.errorbar(
            column("place"), column("measured"), column("s.e."), fmt="s", color="#d1495b", label="200 fresh", ms=3.5
        )
        axis.set_title(f"{name}: {quantity}", fontsize=9, loc="left")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/dial"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/dial"))
    run = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    run.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, run.seeds.split(",")):
        for name in REWARDS:
            train(run.runs / f"dial-{name}-{seed}", name, seed)
        for name in (*REWARDS, "+".join(PAIR)):
            for known, few in PROBED:
                rows += judged(run, seed, name, known, few)
        with (run.out / "dial.csv").open("w", newline="") as f:
            columns = csv.DictWriter(f, list(rows[0]))
            columns.writeheader()
            columns.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        told(rows)
        drawing(rows, run.out / "dial.png")


if __name__ == "__main__":
    main()
