"""Bias and variance of every gradient estimator against the exact gradient, on a mixture of two Gaussians in one dimension.

    python recipes/estimators.py --out docs/results/estimators      3 minutes on one core; writes estimators.csv and estimators.png

The network is the exact noise prediction plus one number a step, so a gradient says how well an estimator sees each of the 10 steps.
Exact: quadrature over x_T for the deterministic chain, a value recursion over a grid for the stochastic one (DDPO's). The mean of 400
updates of 64 samples, in two halves that share what an update draws once, seed 0; standard errors are in the table. Bias: 1 - cosine to
the exact gradient (a factor is no bias under Adam). Noise, as variance over squared signal, in its two parts: of a sample, which a batch
divides, and of an update (a truncation, an early stop), which no batch lessens, only more updates: s and u make a batch of B as noisy as
s / B + u. Rows: the network's, a sample, forward and recomputed, a backward counted as two.
Expected: full BPTT unbiased (within 3 standard errors), cosine of the last step alone below .2, no noise of an update where nothing is
drawn once an update (full chain, last K steps, DRaFT, DDPO).
"""

import argparse
import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tropism.align.alignprop import alignprop
from tropism.align.ddpo import ddpo
from tropism.align.draft import draft_lv
from tropism.align.drtune import drtune
from tropism.align.refl import refl
from tropism.core import Batch, count_rows
from tropism.core import kernel as default_kernel
from tropism.process.gaussian import VP
from tropism.worlds.mixture import Law, MixtureModel, Quadratic

LAW, REWARD, STEPS = Law.of([0.7, 0.3], [-1.5, 1.5], [0.25, 0.16]), Quadratic(torch.tensor([1.0])), 10
B, UPDATES = 64, 400
ESTIMATORS = {
    "full chain": (alignprop, {"truncation": "full"}),
    "AlignProp, suffix-uniform": (alignprop, {"truncation": "suffix-uniform"}),
    "AlignProp, released code": (alignprop, {"truncation": "bernoulli-released"}),
    "AlignProp, suffix-gaussian": (alignprop, {"truncation": "suffix-gaussian"}),
    "last 5 steps": (alignprop, {"truncation": 5}),
    "last 2 steps": (alignprop, {"truncation": 2}),
    "DRaFT-1": (alignprop, {"truncation": 1}),
    "DRaFT-LV, 2 copies": (draft_lv, {"noised": 2}),
    "DRaFT-LV, 8 copies": (draft_lv, {"noised": 8}),
    "ReFL": (refl, {"earliest": 0.75}),
    "DRTune, to the end": (drtune, {"train_steps": 3, "stop_share": 0.0}),
    "DRTune": (drtune, {"train_steps": 3, "stop_share": 0.4}),
    "DDPO": (ddpo, {"minibatches": 1, "advantage": "batch", "clip_range": 1.0}),
}


COLUMNS = [
    *(
        "estimator",
        "cosine to exact",
        "size",
        "largest |mean - exact| in s.e., of steps it sees",
        "noise of a sample",
        "noise of an update",
    ),
    *("rows a sample, a backward as two", "rewards a sample"),
]


class Shifted(MixtureModel):
    """The exact noise prediction plus theta_i at step i."""

    prediction = "epsilon"

    def __init__(self, eta: float):
        super().__init__(LAW, exact=False)
        self.process = VP(self.process.alpha_bars, "trailing", 0, eta, 1.0)
        self.theta = nn.Parameter(torch.zeros(STEPS, dtype=torch.float64))

    def predict(self, x_t, t, cond, guidance):
        weights, means, _ = self.law.posterior(x_t, self.process.alpha(t) ** 2)
        clean = (weights[..., None] * means).sum(1)
        out = (x_t - self.process.alpha(t) * clean) / self.process.sigma(t) + self.theta[STEPS - 1 - int(t)]
        count_rows(self.calls, out, len(x_t))
        return out

    def x0(self, x_t, out, t):
        return self.process.x0(x_t, out, t, "epsilon")

    kernel = default_kernel

    def trainable(self):
        return {"theta": self.theta}


def exact(eta: float) -> Tensor:
    """d E[r] / d theta, (STEPS,)."""
    model, nodes = Shifted(eta), torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    weights = (-0.5 * nodes**2).softmax(
        0
    )  # the chain's map is steep where the two Gaussians part: a dense grid, no polynomials
    times, grid = model.process.times(STEPS).tolist(), torch.linspace(-9, 9, 6001, dtype=torch.float64)
    if eta == 0:
        x = nodes[:, None]
        for t, s in pairwise(times):
            x = model.kernel(x, t, s, None, 1.0)[0].mean
        value = weights @ REWARD(x)
    else:
        v, few = REWARD(grid[:, None]), torch.from_numpy(np.stack(np.polynomial.hermite_e.hermegauss(40)))
        for t, s in reversed(list(pairwise(times))):
            kernel = model.kernel(grid[:, None], t, s, None, 1.0)[0]
            v = between(grid, v, kernel.mean + kernel.std * few[0]) @ (few[1] / few[1].sum())
        value = weights @ between(grid, v, nodes)
    return torch.autograd.grad(value, model.theta)[0]


def between(grid: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """v at x, linearly between the points of an even grid."""
    at = ((x - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1.001)
    low = at.floor().long().detach()
    return v[low] + (at - low) * (v[low + 1] - v[low])


def estimates(method, options: dict) -> tuple[Tensor, float, float]:
    """(gradients of E[r] of both halves of every update (UPDATES, 2, STEPS), network rows a sample, rewards a sample)."""
    model, found, rows, rewards = Shifted(1.0 if method is ddpo else 0.0), [], 0, 0
    for update in range(UPDATES):
        for half in (range(B // 2), range(B // 2, B)):
            batch, how = Batch([""] * len(half), index=tuple(half)), {"update": update, "seed": 0, "state": {}}
            loss, info = next(method(model, REWARD, batch, steps=STEPS, guidance=1.0, **how, **options))
            found.append(-torch.autograd.grad(loss, model.theta)[0] / len(half))
            rows += sum(info.calls.get(k, 0) for k in ("forward", "recompute")) + 2 * info.calls.get("backward", 0)
            rewards += info.calls["reward"]
    return torch.stack(found).reshape(UPDATES, 2, STEPS), rows / UPDATES / B, rewards / UPDATES / B


def noises(halves: Tensor) -> tuple[float, float]:
    """(of a sample, of an update): variances over the squared mean of gradients (updates, 2 halves, STEPS) of B samples an update.

    The halves of an update differ by their samples alone; what they share beyond the mean is the update's. An estimate of none may lie
    a little below 0.
    """
    signal = halves.mean((0, 1)).square().sum()
    sample = B / 2 * (halves[:, 0] - halves[:, 1]).square().sum(1).mean() / 2
    update = halves.mean(1).var(0).sum() - sample / B
    return (sample / signal).item(), (update / signal).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    right = {eta: exact(eta) for eta in (0.0, 1.0)}
    table, seen = [], {}
    for name, (method, options) in ESTIMATORS.items():
        g, (halves, rows, rewards) = right[1.0 if method is ddpo else 0.0], estimates(method, options)
        gradients, (of_sample, of_update) = halves.mean(1), noises(halves)
        mean, error = gradients.mean(0), gradients.std(0) / UPDATES**0.5
        cosine = torch.cosine_similarity(mean, g, 0).item()
        size = ((mean @ g) / (g @ g)).item()
        worst = ((mean - g).abs() / error)[error > 0].max().item()
        table.append([name, cosine, size, worst, of_sample, of_update, rows, rewards])
        seen[name] = mean / mean.norm()
        print(
            f"{name:28s} cosine {cosine:6.3f}  size {size:8.3g}  off by {worst:6.1f} s.e.  "
            f"noise of a sample {of_sample:8.2f}, of an update {of_update:8.3f}",
            flush=True,
        )
    with (out / "estimators.csv").open("w", newline="") as f:
        csv.writer(f).writerows([COLUMNS, *table])
    draw(out / "estimators.png", right, seen, table)


def draw(file: Path, right: dict[float, Tensor], seen: dict[str, Tensor], table: list) -> None:
    """Left: what each sees of every step, beside the exact gradient. Right: bias against noise."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, scatter = figure.subplots(1, 2, width_ratios=[1, 1])
    colours = [f"C{i}" if i < 10 else f"C{i - 10}" for i in range(len(seen))]
    for i, (name, mean) in enumerate(seen.items()):
        style = "-" if i < 10 else "--"
        left.plot(range(1, STEPS + 1), -mean, style, color=colours[i], marker=".", lw=1, label=name)
    left.plot(
        range(1, STEPS + 1), -right[0.0] / right[0.0].norm(), "k", lw=3, alpha=0.4, label="exact, deterministic chain"
    )
    left.plot(
        range(1, STEPS + 1), -right[1.0] / right[1.0].norm(), "k:", lw=3, alpha=0.4, label="exact, stochastic chain"
    )
    left.set(
        xlabel="denoising step",
        ylabel="minus the mean gradient, unit length",
        title="what an estimator sees of each step",
    )
    left.legend(fontsize=7, ncols=2)
    low = 0
    for i, (name, cosine, _, _, of_sample, of_update, *_) in enumerate(table):
        noise = of_sample / B + max(0.0, of_update)
        at, crowded = (max(1 - cosine, 1e-5), noise), noise < 1 / B and cosine < 0.1
        scatter.plot(*at, "o", color=colours[i])
        low += crowded  # five lie on one another: their names stand in a column
        how = {"xytext": (-6, 10 * low) if crowded else (-6, 5), "textcoords": "offset points", "ha": "right"}
        scatter.annotate(name, at, fontsize=7, color=colours[i], **({**how, "ha": "left"} if cosine > 0.999 else how))
    noise = f"noise of an update of {B}: variance over squared signal"
    scatter.set(xscale="log", yscale="log", xlabel="bias, 1 - cosine", ylabel=noise, title="bias and noise")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
