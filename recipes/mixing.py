"""(e) Compressibility and alignment together: trained jointly, and mixed from two adapters by weight (B A products).

Hardware: 2 CPU cores, at most 5 minutes a run. Expected: the joint run and some mixture improve both measures; the trade-off is drawn.
Run: python recipes/mixing.py
"""

import matplotlib
import torch
from study import CHAIN, HELD_OUT, SAMPLING, WIDE, measures, options, runs, table

from tropism.models import mixing
from tropism.models.load import load_model
from tropism.rewards.jpeg import compressibility
from tropism.run.evaluate import evaluate

matplotlib.use("Agg")
GUARDED = {**CHAIN, "drift": 0.3}
RUNS = {
    "compress": (["jpeg=1.5"], 30),
    "align": (["shapes-alignment"], 40),
    "joint": (["jpeg=1", "shapes-alignment=1"], 50),
}


def draw(model, seed):
    return measures(evaluate(model, compressibility(), HELD_OUT, **SAMPLING, seed=seed, batch_size=32))


def main():
    from matplotlib import pyplot

    run, mixtures = options(), [(c, a) for c in (0.0, 0.5, 1.0) for a in (0.0, 0.5, 1.0)]
    found = {n: runs(run, f"mixing-{n}", reward, GUARDED, **WIDE, updates=u) for n, (reward, u) in RUNS.items()}
    done, seconds = found["joint"]
    before, joint = [measures(d.before) for d in done], [measures(d.after) for d in done]
    curve = {m: [] for m in mixtures}
    for i, seed in enumerate(run.seeds):
        for c, a in mixtures:
            model = load_model("shapes")
            mixing.mix(model, {found["compress"][0][i].out / "lora": c, found["align"][0][i].out / "lora": a})
            curve[c, a].append(draw(model, seed))
    table("mixing-joint", run.out, before, joint, seconds)
    column = lambda rows, key: torch.tensor([r[key] for r in rows], dtype=torch.float64)
    mean = lambda rows, key: column(rows, key).mean().item()
    figure, axis = pyplot.subplots(figsize=(5, 3.6))
    for a in (0.0, 0.5, 1.0):
        points = [curve[c, a] for c in (0.0, 0.5, 1.0)]
        axis.plot(
            [mean(p, "bytes above flat") for p in points],
            [mean(p, "accuracy all") for p in points],
            "o-",
            label=f"align x {a:g}",
        )
    axis.plot(mean(joint, "bytes above flat"), mean(joint, "accuracy all"), "r*", markersize=12, label="joint")
    axis.plot(mean(before, "bytes above flat"), mean(before, "accuracy all"), "ks", label="base")
    axis.set(xlabel="JPEG bytes above flat", ylabel="all-attribute accuracy")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(run.out / "mixing.png", dpi=120)
    for (c, a), rows in curve.items():
        found = (column(rows, key) for key in ("bytes above flat", "accuracy all"))
        bytes_, right = (f"{v.mean():.3f} (sd {v.std():.3f})" for v in found)
        print(f"compress x {c:4.2f} + align x {a:3.1f}: bytes {bytes_}  all {right}")


if __name__ == "__main__":
    main()
