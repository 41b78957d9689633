"""(d) The aesthetic proxy goes up with the hidden rule, until the rule turns down while the proxy still rises.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: both up at the best update; later the gold falls (figure aesthetics.png).
Run: python recipes/aesthetics.py
"""

import json

import matplotlib
import torch
from study import CHAIN, options, runs

matplotlib.use("Agg")


def main():
    from matplotlib import pyplot

    run, curves = options(), []
    done, seconds = runs(
        run, "aesthetics", ["shapes-aesthetic"], CHAIN, updates=100, lr=2e-3, evaluate_every=10, evaluate_prompts=48
    )
    print(f"{len(done)} seeds, {max(seconds):.0f} s at most")
    for finished in done:
        lines = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
        curves.append(
            [(r["update"], r["held_out/reward"], r["held_out/gold_taste"]) for r in lines if "held_out/reward" in r]
        )
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
