"""(d) The aesthetic proxy goes up with the hidden rule, until the rule turns down while the proxy still rises.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: both up at the best update; later the gold falls (figure aesthetics.png).
Run: python recipes/aesthetics.py
"""

import json
import time

import matplotlib
import torch
from study import HELD_OUT, options

from tropism.commands import align

matplotlib.use("Agg")
SETTINGS = dict(
    reward=["shapes-aesthetic"], options={"steps": 10, "guidance": 3.0, "truncation": "2"}, updates=100, lr=2e-3
)


def main():
    from matplotlib import pyplot

    run, curves = options(), []
    for seed in run.seeds:
        began, out = time.time(), run.out / f"aesthetics-{seed}"
        align(
            "alignprop",
            model="shapes",
            held_out=HELD_OUT,
            seed=seed,
            out=out,
            batch=16,
            rank=8,
            evaluate_every=5,
            evaluate_prompts=48,
            overwrite=True,
            threads=run.threads,
            **SETTINGS,
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves.append(
            [(r["update"], r["held_out/reward"], r["held_out/gold_taste"]) for r in lines if "held_out/reward" in r]
        )
        print(f"seed {seed}: {time.time() - began:.0f} s")
    update, proxy, gold = torch.tensor(curves, dtype=torch.float64).unbind(-1)
    for k in (0, gold.mean(0).argmax().item(), -1):
        print(
            f"update {update[0, k]:3.0f}: proxy {proxy[:, k].mean():6.3f} (sd {proxy[:, k].std():.3f})  "
            f"gold {gold[:, k].mean():6.3f} (sd {gold[:, k].std():.3f})"
        )
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for axis, values, name in ((axes[0], proxy, "aesthetic proxy (trained on)"), (axes[1], gold, "hidden rule (gold)")):
        axis.plot(update.T, values.T, color="0.7")
        axis.plot(update[0], values.mean(0), color="tab:blue")
        axis.set(xlabel="update", title=name)
    axes[1].axvline(update[0, gold.mean(0).argmax()], color="tab:red", linestyle=":")
    figure.tight_layout()
    figure.savefig(run.out / "aesthetics.png", dpi=120)
    (run.out / "aesthetics.json").write_text(json.dumps({"curves": curves}) + "\n")


if __name__ == "__main__":
    main()
