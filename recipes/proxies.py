"""How well each differentiable reward follows its honest measure, on 500 pictures of the base model and inside them.

Hardware: 2 CPU cores, about 2 minutes. Expected: jpeg above 0.9 (Spearman) against Pillow's bytes; the others as printed.
Run: python recipes/proxies.py
"""

import torch
from scipy.stats import spearmanr
from study import options

from tropism.core import Batch
from tropism.models.load import load_model
from tropism.rewards.aesthetic import shapes_aesthetic
from tropism.rewards.clip import shapes_alignment
from tropism.rewards.count import shapes_count
from tropism.rewards.jpeg import compressibility, true_bytes
from tropism.run.evaluate import evaluate
from tropism.worlds import shapes, taste


def within(proxy: torch.Tensor, measure: torch.Tensor, groups: list) -> float:
    """Spearman after the mean of each group is taken off both: what is left when the prompt's own part is gone."""

    def centred(x):
        x = x.double().clone()
        for g in set(groups):
            rows = [i for i, h in enumerate(groups) if h == g]
            x[rows] -= x[rows].mean()
        return x

    return spearmanr(centred(proxy), centred(measure)).statistic


def main():
    run = options("0")
    torch.set_num_threads(run.threads)
    prompts = [s.prompt for s in shapes.scenes(True)][::4][:50]
    found = evaluate(
        load_model("shapes", lora=None),
        compressibility(),
        prompts,
        steps=8,
        guidance=2.0,
        seed=run.seeds[0],
        per_prompt=10,
        batch_size=32,
    )
    images, batch = found.images, Batch(found.prompts)
    right = shapes.accuracy(images, found.prompts)
    pairs = {
        "jpeg ~ -true bytes": (compressibility(), -true_bytes(images)),
        "shapes-alignment ~ all attributes": (shapes_alignment(), right["all"]),
        "shapes-count ~ count right": (shapes_count(), right["count"]),
        "shapes-aesthetic ~ hidden rule": (shapes_aesthetic(), taste.gold(images)),
    }
    print(
        f"{len(images)} base-model pictures, {len(prompts)} held-out prompts, seed {run.seeds[0]}\n\n"
        "| proxy ~ measure | Spearman | within a prompt |\n|---|---:|---:|"
    )
    for name, (reward, measure) in pairs.items():
        with torch.no_grad():
            score = torch.cat([reward(images[i : i + 50], batch[i : i + 50]) for i in range(0, len(images), 50)])
        print(f"| {name} | {spearmanr(score, measure).statistic:.3f} | {within(score, measure, found.prompts):.3f} |")


if __name__ == "__main__":
    main()
