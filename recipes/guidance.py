"""Guidance without training, by domain: reward quantiles, the hidden oracle, diversity and cost of every method.

    python recipes/guidance.py --domain utr --seeds 0 1 2        25 minutes on one core
    python recipes/guidance.py --domain dna --seeds 0 1 2

Expected on the median: plain < best-of-N < SVDD at about equal network rows. 256 samples a method and seed, in groups of 64.
The hidden oracle (gold) never guides. Hardware of the committed table: one core of a cloud CPU.
"""

import argparse
import statistics
import time

import torch

from tropism.core import Batch
from tropism.guide.best_of_n import best_of_n
from tropism.guide.dps import dps
from tropism.guide.nested import nested
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
from tropism.models.load import load_model
from tropism.rewards.load import load_reward
from tropism.run.guided_tokens import MEASURES, diversity

DOMAINS = {
    "utr": {"reward": "utr-load", "steps": 32, "n": 6, "alpha": 0.03, "scale": None},
    "dna": {"reward": "dna-liver", "steps": 32, "n": 10, "alpha": 0.05, "scale": 20.0},
}
"""n: of best-of-N, so that its network rows are about those of SVDD with 10 children."""
GROUPS, EACH = 4, 64


def methods(how):
    """Each with its own hyperparameters."""
    yield "plain", best_of_n, {"m": 1}
    yield f"best of {how['n']}", best_of_n, {"m": how["n"]}
    if how["scale"]:
        yield "DPS", dps, {"scale": how["scale"]}
    yield "SMC (FK diff)", smc, {"alpha": how["alpha"]}
    yield "nested, M = 4", nested, {"m": 4, "alpha": how["alpha"]}
    yield "SVDD-PM, M = 10", svdd, {"m": 10}


def measured(domain, how, function, options, seed):
    """(q10, q50, q90, gold, diversity, distinct, rows a sample, rewards computed a sample, seconds) of 256 samples."""
    model, reward = load_model(domain, lora=None), load_reward(how["reward"])
    began = time.perf_counter()
    found = function(model, reward, Batch([""] * GROUPS), EACH, steps=how["steps"], seed=seed, **options)
    seconds, total = time.perf_counter() - began, GROUPS * EACH
    quantiles = found.rewards.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    gold = MEASURES[domain](found.samples)["gold"].double().mean().item()
    distinct = len(found.samples.unique(dim=0)) / total
    rows, rewards = found.costs.network / total, found.costs.rewards_computed / total
    return (*quantiles, gold, diversity(found.samples), distinct, rows, rewards, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--domain", choices=DOMAINS, default="utr")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | q10 | median | q90 | gold | diversity | distinct | rows | rewards computed | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, function, options in methods(DOMAINS[asked.domain]):
        each = [measured(asked.domain, DOMAINS[asked.domain], function, options, seed) for seed in asked.seeds]
        cells = [
            f"{statistics.mean(v):.4g} ± {statistics.stdev(v):.2g}" if len(v) > 1 else f"{v[0]:.4g}"
            for v in zip(*each, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
