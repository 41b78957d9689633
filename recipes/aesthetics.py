"""(d) The aesthetic proxy goes up with the hidden rule, until the rule turns down while the proxy still rises.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: both up at the best update; later the gold falls (figure aesthetics.png).
Run: python recipes/aesthetics.py
"""

from study import CHAIN, curve, options, panels, runs


def main():
    run = options()
    settings = {"updates": 100, "evaluate_every": 10, "evaluate_prompts": 48, "lr": 2e-3}
    done, seconds = runs(run, "aesthetics", ["shapes-aesthetic"], CHAIN, **settings)
    folders = [d.out for d in done]
    update, proxy, gold = (curve(folders, c) for c in ("update", "held_out/reward", "held_out/gold_taste"))
    print(f"{len(done)} seeds, {max(seconds):.0f} s at most")
    best = gold.mean(0).argmax().item()
    for k in (0, best, -1):
        print(
            f"update {update[0, k]:3.0f}: proxy {proxy[:, k].mean():6.3f} (sd {proxy[:, k].std():.3f})  "
            f"gold {gold[:, k].mean():6.3f} (sd {gold[:, k].std():.3f})"
        )
    columns = {"aesthetic proxy (trained on)": proxy, "hidden rule (gold)": gold}
    panels(run.out / "aesthetics.png", update[0], columns, mark=update[0, best].item())


if __name__ == "__main__":
    main()
