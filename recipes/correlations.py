"""Which measures see invented digits: PSNR, SSIM, LPIPS-like, feature distances and a judge against the exact count, on the glyphs world.

    python recipes/correlations.py --out docs/results/correlations        about 20 minutes on one core; --scenes 200 for a look

Seeds 0, 1, 2, each 1,000 scenes through the bundled upscaler ("within"), and 250 scenes each of it, the most probable picture, bicubic and
random digits ("mixture"); without nuisance and with it (gain and offset, shifts up to 2 px, stroke weight), which a reader who is told
of it sees through. OUT/table.csv has Spearman with the count of invented digits, its 95 % interval over scenes, the most that
a score without ties could have, and the AUROC of one or more; OUT/gaps.csv how far the default proxy is above each measure, paired.

The bundled encoders have seen the digits' names and this kind of nuisance. "encoder without labels" has seen no name: it was trained
here to find each slot again under another nuisance, among the slots of other scenes.

The judge is a loopback server asked through the real client: it looks at the pictures it is sent, slot by slot, and forgives tone, shift
and blur. A vision-language model may see less.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from tropism.models.load import load_model
from tropism.prompts.batches import as_batch
from tropism.prompts.files import Prompt
from tropism.restore.agreement import ceiling
from tropism.restore.fidelity import psnr, ssim
from tropism.restore.judge import HallucinationJudge
from tropism.restore.judge_client import Endpoint
from tropism.rewards.feature_distance import LPIPS_LIKE, FeatureDistance
from tropism.rewards.glyphs import nearness
from tropism.run.evaluate import evaluate
from tropism.worlds import glyphs, glyphs_posterior, glyphs_reading
from tropism.worlds.glyphs_features import encoder, new

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from judge_stub import running, seen

DEFAULT = "feature distance"
ALIKE, FAINT = 0.9, 0.06
"""The correlation below which the judge calls a slot another one, and the deviation below which it sees nothing there."""
DRAWS = 1000
MAKERS = {"within": 1, "mixture": 4}
"""Pictures of one scene."""


class AlexLike(nn.Module):
    """Five convolutions in AlexNet's manner with random weights: what LPIPS looks through, without its training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        widths = (3, 32, 64, 96, 96, 64)
        strides = (2, 2, 1, 1, 1)
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, 3, s, 1) for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )

    def forward(self, x):
        found = []
        for stage in self.stages:
            x = stage(x).relu()
            found.append(x)
        return found


def without_labels(updates: int = 1500, scenes: int = 48) -> FeatureDistance:
    """The distance of an encoder of the reward's build, trained by telling slots apart: InfoNCE, Oord et al., arXiv 1807.03748."""
    torch.manual_seed(4)
    network = new("features")
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for update in range(updates):
        x = glyphs_posterior.batch(range(update * scenes, (update + 1) * scenes), 77).reference
        one, other = (glyphs_reading.spoil(x, glyphs_reading.drawn(range(scenes), 2 * update + k)) for k in range(2))
        mine, same = (F.normalize(network(y)[-1].flatten(2).transpose(1, 2).flatten(0, 1), dim=1) for y in (one, other))
        loss = F.cross_entropy(10 * mine @ same.T, torch.arange(len(mine)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return FeatureDistance(network.eval().requires_grad_(False), tokens="patch", name="without-labels", source="here")


def looked_at(body: dict) -> str:
    """The judge's reply: a slot of C is another one where it does not follow B's, at its best shift, blurred or not, whatever its tone.

    One level for each such slot.
    """
    shown = {label: p.astype(float).mean(2) / 255 for label, p in seen(body)}
    wanted = np.stack([blurred(shown["B"], n) for n in (1, 3, 5)])
    moved = [np.roll(shown["C"], (d, a), (0, 1)) for d in range(-2, 3) for a in range(-2, 3)]
    alike = np.stack([follows(x, wanted).max(0) for x in moved])
    best = alike[alike.mean((1, 2)).argmax()]
    return json.dumps({"items": [], "score": 1 + int((best < ALIKE).sum()), "confidence": 1})


def blurred(x: np.ndarray, side: int) -> np.ndarray:
    wide = np.pad(x, side // 2)
    return np.lib.stride_tricks.sliding_window_view(wide, (side, side)).mean((2, 3))


def follows(x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(K, 2, 2) correlations of a picture's slots with those of pictures (K, 32, 32); 1 where both are even, 0 where one is."""
    mine, theirs = (y.reshape(-1, 2, 16, 2, 16).swapaxes(2, 3).reshape(-1, 2, 2, 256) for y in (x[None], wanted))
    mine, theirs = (y - y.mean(3, keepdims=True) for y in (mine, theirs))
    even, blank = (np.sqrt((y**2).mean(3)) < FAINT for y in (mine, theirs))
    found = (mine * theirs).sum(3) / np.sqrt((mine**2).sum(3) * (theirs**2).sum(3) + 1e-12)
    return np.where(even & blank, 1.0, np.where(even | blank, 0.0, found))


def judged(pictures, references, url: str) -> torch.Tensor:
    judge = HallucinationJudge(Endpoint(url, "tiny"), repeats=1)
    return torch.tensor([judge.score(p, r).score for p, r in zip(pictures, references, strict=True)])


def measures(url: str) -> dict:
    """Name -> (pictures, references) -> (B,), more being worse."""
    return {
        "PSNR": lambda x, y: -psnr(x, y),
        "SSIM": lambda x, y: -ssim(x, y),
        "LPIPS-like, random network": FeatureDistance(AlexLike(), **LPIPS_LIKE).distance,
        "LPIPS-like, reward's encoder": FeatureDistance(encoder("features"), **LPIPS_LIKE).distance,
        "feature distance, random network": nearness("random").distance,
        "feature distance, encoder without labels": without_labels().distance,
        DEFAULT: nearness("features").distance,
        "feature distance, l1": nearness("features", "?metric=l1").distance,
        "feature distance, held-out encoder": nearness("judge").distance,
        "judge": lambda x, y: judged(x, y, url),
    }


def restored(model, seed: int, scenes: int):
    """The bundled upscaler's pictures of scenes 0 to `scenes` of a seed, and what was asked."""
    asked = [
        Prompt(glyphs.PROMPT, meta=(("number", n), ("seed", seed)), fill=glyphs_posterior.filled) for n in range(scenes)
    ]
    batch = as_batch(asked)
    zero = lambda images, batch: images.new_zeros(len(images))
    drawn = evaluate(model, zero, batch, steps=model.steps, guidance=1.0, seed=seed, batch_size=50)
    return drawn.images, glyphs_posterior.batch(range(scenes), seed)


def sets(model, seed: int, scenes: int):
    """(name, pictures, batch): within the upscaler, and over a mixture of methods."""
    own, batch = restored(model, seed, scenes)
    yield "within", own, batch
    few = range(scenes // 4)
    part = batch[few]
    makers = (glyphs_posterior.most_probable, glyphs_posterior.bicubic, glyphs_posterior.random_digits)
    others = [make(part) for make in makers]
    whole = [i for _ in range(4) for i in few]
    yield "mixture", torch.cat([own[: len(few)], *others]), batch[whole]


def correlation(x, y) -> float:
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def auroc(score, count) -> float:
    some, ranks = count > 0, stats.rankdata(score)
    return float((ranks[some].sum() - some.sum() * (some.sum() + 1) / 2) / (some.sum() * (~some).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/correlations"))
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--model", default="glyphs")
    run = parser.parse_args()
    torch.set_num_threads(1)
    model, found = load_model(run.model), {}
    with running() as server:
        server.respond = looked_at
        every = measures(server.url)
        for seed in (0, 1, 2):
            for kind, pictures, batch in sets(model, seed, run.scenes):
                drawn = glyphs_reading.drawn(range(len(pictures)), seed)
                for nuisance in ("none", "all"):
                    told = drawn if nuisance == "all" else None
                    shown = glyphs_reading.spoil(pictures, told) if told else pictures
                    count = glyphs_reading.counts(shown, batch, told)["hallucination"].numpy()
                    with torch.no_grad():
                        scores = {name: m(shown, batch.reference).double().numpy() for name, m in every.items()}
                    found.setdefault((kind, nuisance), []).append((count, scores))
                    print(
                        seed,
                        kind,
                        nuisance,
                        {n: round(correlation(s, count), 3) for n, s in scores.items()},
                        flush=True,
                    )
    run.out.mkdir(parents=True, exist_ok=True)
    tables = {"table": list(table(found)), "gaps": list(gaps(found))}
    for name, rows in tables.items():
        with (run.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(name, *(" ".join(map(str, r.values())) for r in rows), sep="\n")


def pooled(parts):
    """All seeds' counts and scores as one."""
    return np.concatenate([c for c, _ in parts]), {n: np.concatenate([s[n] for _, s in parts]) for n in parts[0][1]}


def draws(n: int, makers: int):
    """Resampled rows: scenes are drawn, each with what every one of `makers` methods made of it. Rows: maker by maker within a seed."""
    rng, scenes = np.random.default_rng(0), n // 3 // makers
    for _ in range(DRAWS):
        seed, scene = np.divmod(rng.integers(3 * scenes, size=3 * scenes), scenes)
        yield np.concatenate([seed * makers * scenes + maker * scenes + scene for maker in range(makers)])


def table(found):
    for (kind, nuisance), parts in found.items():
        count, scores = pooled(parts)
        chosen = list(draws(len(count), MAKERS[kind]))
        for name, score in scores.items():
            low, high = np.percentile([correlation(score[i], count[i]) for i in chosen], [2.5, 97.5])
            each = " ".join(f"{correlation(s[name], c):.3f}" for c, s in parts)
            yield {"pictures": kind, "nuisance": nuisance, "measure": name, "spearman": f"{correlation(score, count):.3f}",
                   "low": f"{low:.3f}", "high": f"{high:.3f}", "seeds": each, "ceiling": f"{ceiling(count):.3f}",
                   "auroc": f"{auroc(score, count):.3f}"}  # fmt: skip


def gaps(found):
    """How far the default proxy's correlation is above each other measure's."""
    for (kind, nuisance), parts in found.items():
        count, scores = pooled(parts)
        chosen = list(draws(len(count), MAKERS[kind]))
        own = [correlation(scores[DEFAULT][i], count[i]) for i in (slice(None), *chosen)]
        for name in (n for n in scores if n != DEFAULT):
            other = [correlation(scores[name][i], count[i]) for i in (slice(None), *chosen)]
            gap, *resampled = np.subtract(own, other)
            low, high = np.percentile(resampled, [2.5, 97.5])
            yield {"pictures": kind, "nuisance": nuisance, "measure": name, "gap": f"{gap:.3f}",
                   "low": f"{low:.3f}", "high": f"{high:.3f}"}  # fmt: skip


if __name__ == "__main__":
    main()
