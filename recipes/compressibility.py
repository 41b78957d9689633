"""(a) Fewer JPEG bytes without forgetting the prompt, and the unguarded collapse beside it.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: bytes above flat down by more than a third, all-attribute accuracy within 5
points in the mean, entropies above 80 % of the base's; unguarded, the pictures are erased (figure compressibility.png).
Run: python recipes/compressibility.py
"""

import matplotlib
import torch
from study import CHAIN, HELD_OUT, LAST, WIDE, measures, options, runs, table

matplotlib.use("Agg")
GUARDED = ["jpeg=2", "shapes-alignment=0.7", "shapes-count=1.3"]


def figure(file, columns: dict[str, torch.Tensor], rows: list[int]) -> None:
    """The same prompts and noise, one row of pictures for each model."""
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(len(columns), len(rows), figsize=(1.2 * len(rows), 1.35 * len(columns)))
    for line, (name, images) in zip(axes, columns.items(), strict=True):
        for axis, i in zip(line, rows, strict=True):
            axis.imshow(images[i].permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    for axis, i in zip(axes[0], rows, strict=True):
        axis.set_title(HELD_OUT[i].replace(" on ", "\non "), fontsize=6)
    drawn.tight_layout()
    drawn.savefig(file, dpi=120)


def main():
    run = options()
    guarded, slow = runs(run, "guarded", GUARDED, LAST, **WIDE, updates=120)
    erased, fast = runs(run, "unguarded", ["jpeg=1.5"], CHAIN, **WIDE, updates=40)
    for name, done, seconds in (("guarded", guarded, slow), ("unguarded", erased, fast)):
        found = [[measures(e) for e in side] for side in zip(*((d.before, d.after) for d in done), strict=True)]
        rows = table(f"compressibility-{name}", run.out, *found, seconds)
        for kind in ("bytes above flat", "entropy background", "entropy colour"):
            share = [b / a for a, b in zip(rows[kind]["base"], rows[kind]["each"], strict=True)]
            print(f"  {kind}, share of the base's: " + ", ".join(f"{s:.2f}" for s in share))
    pictures = {"base": guarded[0].before, "guarded": guarded[0].after, "jpeg alone": erased[0].after}
    figure(
        run.out / "compressibility.png", {n: e.images for n, e in pictures.items()}, list(range(5, len(HELD_OUT), 25))
    )


if __name__ == "__main__":
    main()
