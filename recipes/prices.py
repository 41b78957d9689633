"""What a row of the network and a reward cost on the shapes world, in seconds of one core: the prices in recipes/methods.yaml.

    python recipes/prices.py            5 minutes on one idle core

Updates of six kinds, interleaved, each REPEATS times; the fastest of a kind counts, since whatever else runs only adds. Least squares of
relative errors with non-negative prices over kinds and objectives; the table says how far off they are.
"""

import time

import numpy as np
import torch
from scipy.optimize import nnls

from tropism.commands import METHODS
from tropism.core import Batch
from tropism.models.load import load_model
from tropism.models.lora import EVERY_LAYER, LoraSettings
from tropism.rewards.load import load_rewards
from tropism.run.ledger import cost
from tropism.run.rows import merged
from tropism.worlds import shapes

REPEATS = 4
OBJECTIVES = ("jpeg", "shapes-count", "shapes-alignment", "shapes-aesthetic")
KINDS = {
    "DRaFT-1": ("draft", {"k": 1}),
    "DRaFT-LV": ("draft-lv", {"noised": 2}),
    "AlignProp, full": ("alignprop", {"truncation": "full"}),
    "AlignProp, 2, drift": ("alignprop", {"truncation": "2", "drift": 0.1}),
    "DRTune": ("drtune", {}),
    "DDPO": ("ddpo", {"minibatches": 2}),
}


def updates(reward: str):
    """{kind: (counts, fastest processor seconds)} of updates of 8 samples, 8 steps, guidance 2, an adapter of rank 16 on every layer."""
    prompts, loaded, models = [s.prompt for s in shapes.scenes(held_out=False)][:512:64], load_rewards([reward]), {}
    found: dict[str, tuple[dict, float]] = {}
    for repeat in range(REPEATS):
        for kind, (method, options) in KINDS.items():
            eta = 1.0 if method == "ddpo" else 0.0
            if eta not in models:
                models[eta] = load_model("shapes", lora=LoraSettings(16, 16, tuple(EVERY_LAYER), 0), eta=eta)
            own = {
                **options,
                "steps": 8,
                "guidance": 2.0,
                "state": {},
                "update": repeat,
                "seed": 0,
                "micro_batch": None,
            }
            began, infos = time.process_time(), []
            for loss, info in METHODS[method](models[eta], loaded, Batch(prompts), **own):
                loss.backward()
                infos.append(info)
            seconds = time.process_time() - began
            counts = cost(merged(infos).calls, 0, 0)
            found[kind] = (counts, min(seconds, found.get(kind, ({}, np.inf))[1]))
    return found


def main():
    torch.set_num_threads(1)
    rows, times, names = [], [], []
    for number, reward in enumerate(OBJECTIVES):
        for kind, (counts, seconds) in updates(reward).items():
            own = [0.0] * (2 * len(OBJECTIVES))
            own[2 * number : 2 * number + 2] = [counts["reward_queries"], counts["reward_gradients"]]
            rows.append([counts["forwards"], counts["backwards"], *own])
            times.append(seconds)
            names.append((reward, kind))
    rows, times = np.array(rows), np.array(times)
    prices, _ = nnls(rows / times[:, None], np.ones(len(times)))
    print(f"forwards {prices[0]:.5f}, backwards {prices[1]:.5f}")
    for number, reward in enumerate(OBJECTIVES):
        print(
            f"{reward}: reward_queries {prices[2 + 2 * number]:.5f}, reward_gradients {prices[3 + 2 * number]:.5f}   (decoding included)"
        )
    for (reward, kind), t, p in zip(names, times, rows @ prices, strict=True):
        print(f"  {reward:18s} {kind:20s} measured {t:6.3f} priced {p:6.3f}  {p / t - 1:+.1%}")


if __name__ == "__main__":
    main()
