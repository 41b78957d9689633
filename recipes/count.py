"""(c) Half of the missing count accuracy closed by the count reward.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: the share of the missing accuracy that is closed is 0.5 or more.
Run: python recipes/count.py
"""

import time

from study import HELD_OUT, measures, options, table

from tropism.commands import align

SETTINGS = dict(reward=["shapes-count"], options={"steps": 10, "guidance": 3.0, "truncation": "3"}, updates=80, lr=2e-3)


def main():
    run = options()
    before, after, seconds = [], [], []
    for seed in run.seeds:
        began = time.time()
        done = align(
            "alignprop",
            model="shapes",
            held_out=HELD_OUT,
            seed=seed,
            out=run.out / f"count-{seed}",
            batch=16,
            rank=8,
            evaluate_every=0,
            evaluate_prompts=len(HELD_OUT),
            overwrite=True,
            threads=run.threads,
            **SETTINGS,
        )
        seconds.append(time.time() - began)
        before.append(measures(done.before))
        after.append(measures(done.after))
    row = table("count", run.out, before, after, seconds)["accuracy count"]
    closed = [(b - row["before"]) / (1 - row["before"]) for b in row["each"]]
    print(f"  share of the missing accuracy closed: {', '.join(f'{c:.2f}' for c in closed)}")


if __name__ == "__main__":
    main()
