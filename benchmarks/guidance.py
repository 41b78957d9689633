"""SVDD beside its plain twin: the released code's loop over candidates, the same noise and samples, side by side in one run.

    python benchmarks/guidance.py [--batch 64] [--rounds 5]     three minutes on one core

RNA of 50 bases, 128 steps, 10 children, a convolutional network of the bundled size with random weights, a cheap reward, so
that the network is what costs. Printed: rows through the network, their ratio, and the ratio of samples a second over the rounds (range).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "guide"))
from twin import svdd_plain  # the readable twin of the tests

from tropism.core import Batch
from tropism.guide.svdd import svdd
from tropism.guide.values import posterior_mean
from tropism.models.masked_lm import Convolutions, MaskedModel, Shape

STEPS, M = 128, 10


def reward(tokens, batch):
    """U's, and a C first."""
    return (tokens == 3).double().sum(1) + (tokens[:, 0] == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MaskedModel(Convolutions(Shape(tuple("ACGU"), 50)), device=asked.device)
    ratios, rows = [], []
    for seed in range(asked.rounds):
        before, began = model.calls["network"], time.perf_counter()
        slow = svdd_plain(model, reward, asked.batch, steps=STEPS, m=M, seed=seed)
        middle, half = model.calls["network"], time.perf_counter()
        how = {"steps": STEPS, "m": M, "seed": seed, "value": posterior_mean("argmax"), "select_start": False}
        fast = svdd(model, reward, Batch([""]), asked.batch, max_batch=asked.batch * M, **how)
        end = time.perf_counter()
        rows.append((middle - before) / fast.costs.network)
        ratios.append((half - began) / (end - half))
        same = (fast.samples == slow).all(1).double().mean().item()
        print(
            f"round {seed}: rows {middle - before} and {fast.costs.network}, {rows[-1]:.2f} times fewer; "
            f"{ratios[-1]:.2f} times faster; {same:.0%} equal samples"
        )
    share = [a / b for a, b in zip(ratios, rows, strict=True)]
    print(
        f"rows {min(rows):.2f} to {max(rows):.2f} times fewer, samples a second {min(ratios):.2f} to {max(ratios):.2f} times as many"
    )
    print(f"share of the row ratio that arrives: {min(share):.0%} to {max(share):.0%}")


if __name__ == "__main__":
    main()
