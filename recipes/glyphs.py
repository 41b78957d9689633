"""The `glyphs` world: its floors, the reader's certificate, and how well PSNR sees hallucination with and without nuisance.

    python recipes/glyphs.py --out docs/results/glyphs        a minute on one core; nothing is trained

floors.csv: 4,000 scenes of seed 0 at each scale and noise; what each method invents and loses, as shares of all slots, and the expected
values of the two floors; last with low-resolution pictures clamped to [0, 1], which the posterior does not know.
certificate.csv: the smallest mean squared error between two classes at each stroke weight.
psnr.csv: Spearman of -PSNR with the number of invented digits within one method (`sampled`), 2,000 scenes, seeds 0, 1, 2, without
nuisance, with each kind and with all; beside it the AUROC of one or more, and the largest Spearman that a score without ties can have.
"""

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from tropism.worlds import glyphs, glyphs_posterior, glyphs_reading

SETTINGS = [(4, 0.02), (4, 0.03), (4, 0.04), (4, 0.05), (4, 0.08), (4, 0.12), (2, 0.20), (8, 0.03), (4, 0.05, True)]
NUISANCE = {
    "none": {"tone": 0, "shift": 0, "weight": 0},
    "tone": {"shift": 0, "weight": 0},
    "shift": {"tone": 0, "weight": 0},
    "weight": {"tone": 0, "shift": 0},
    "all": {},
}


def floors(scale: int, sigma: float, clamped: bool = False, scenes: int = 4000):
    batch = glyphs_posterior.batch(range(scenes), 0, scale, sigma)
    batch = replace(batch, low_res=batch.low_res.clamp(0, 1)) if clamped else batch
    expected = glyphs_posterior.floors(glyphs_posterior.posterior(batch.low_res, sigma))
    methods = {
        "map": lambda: glyphs_posterior.most_probable(batch, 0, sigma),
        "sampled": lambda: glyphs_posterior.sampled(batch, 0, sigma),
        "bicubic": lambda: glyphs_posterior.bicubic(batch),
        "random": lambda: glyphs_posterior.random_digits(batch),
        "shuffled": lambda: glyphs_posterior.shuffled(batch),
    }
    for name, pictures in methods.items():
        found = glyphs_reading.rates(glyphs_reading.counts(pictures(), batch))
        exact = f"{expected[name].mean() / 4:.4f}" if name in expected and not clamped else ""
        setting = {"scale": scale, "sigma": sigma, "clamped": clamped, "method": name, "expected": exact}
        yield setting | {k: f"{v:.4f}" for k, v in found.items()}


def psnr(images: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """(B,) in dB; infinite for equal pictures."""
    return (-10 * ((images - others) ** 2).flatten(1).mean(1).log10()).numpy()


def seen(kind: str, seed: int, scenes: int = 2000):
    batch = glyphs_posterior.batch(range(scenes), seed)
    pictures = glyphs_posterior.sampled(batch, seed)
    nuisance = glyphs_reading.drawn(range(scenes), seed, **NUISANCE[kind])
    spoilt = pictures if kind == "none" else glyphs_reading.spoil(pictures, nuisance)
    count = glyphs_reading.counts(spoilt, batch, nuisance)["hallucination"].numpy()
    assert (count == glyphs_reading.counts(pictures, batch)["hallucination"].numpy()).all(), (
        "nuisance changed a reading"
    )
    score = -psnr(spoilt, batch.reference)
    ranks = stats.rankdata(score)
    some = count > 0
    auroc = (ranks[some].sum() - some.sum() * (some.sum() + 1) / 2) / (some.sum() * (~some).sum())
    ceiling = stats.spearmanr(count + np.linspace(0, 0.5, scenes), count).statistic
    found = {"spearman": stats.spearmanr(score, count).statistic, "ceiling": ceiling, "auroc": auroc}
    yield {"nuisance": kind, "seed": seed} | {k: f"{v:.3f}" for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/glyphs"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    at = torch.linspace(-1, 1, 9)
    tables = {
        "floors": [row for setting in SETTINGS for row in floors(*setting)],
        "certificate": [
            {"weight": f"{w:g}", "apart": f"{d:.5f}"} for w, d in zip(at, glyphs.separation(at), strict=True)
        ],
        "psnr": [row for kind in NUISANCE for seed in (0, 1, 2) for row in seen(kind, seed)],
    }
    for name, rows in tables.items():
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        print(name, *(" ".join(map(str, row.values())) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
