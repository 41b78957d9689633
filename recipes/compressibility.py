"""(a) Fewer JPEG bytes without forgetting the prompt, and the unguarded collapse beside it.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: bytes above flat down by 40 % or more, all-attribute accuracy down by less
than 5 points, entropies above 80 % of the base's; unguarded, the pictures are erased.
Run: python recipes/compressibility.py
"""

import time

from study import HELD_OUT, measures, options, table

from tropism.commands import align

GUARDED = dict(
    reward=["jpeg", "shapes-alignment=2"],
    options={"steps": 10, "guidance": 3.0, "truncation": "2"},
    updates=60,
    lr=2e-3,
)
UNGUARDED = dict(reward=["jpeg"], options={"steps": 10, "guidance": 3.0, "truncation": "2"}, updates=100, lr=5e-3)


def main():
    run = options()
    for name, settings in (("guarded", GUARDED), ("unguarded", UNGUARDED)):
        before, after, seconds = [], [], []
        for seed in run.seeds if name == "guarded" else run.seeds[:1]:
            began = time.time()
            done = align(
                "alignprop",
                model="shapes",
                held_out=HELD_OUT,
                seed=seed,
                out=run.out / f"compressibility-{name}-{seed}",
                batch=16,
                rank=8,
                evaluate_every=0,
                evaluate_prompts=len(HELD_OUT),
                overwrite=True,
                threads=run.threads,
                **settings,
            )
            seconds.append(time.time() - began)
            before.append(measures(done.before))
            after.append(measures(done.after))
        table(f"compressibility-{name}", run.out, before, after, seconds)


if __name__ == "__main__":
    main()
