"""Guidance without training, on four domains: reward quantiles, hidden oracle, diversity, naturalness and cost of every method.

    python recipes/guidance.py utr --out runs/guidance            one domain: utr, dna, molecules or shapes; seeds 0, 1, 2
    python recipes/guidance.py --table --out runs/guidance        the tables of what is there

256 samples a method and seed, one core; what is finished is kept in OUT/<domain>.jsonl and not drawn again. The gold oracle never guides.
Equal network rows: about those of SVDD-PM (M children, 5 for pictures, else 10) for best-of-N, SMC and nested, which draw more particles
than are kept; a learned value and DPS need fewer. Equal rewards: best-of-N by order statistics of one pool of plain samples (in thirds, for
the spread). Naturalness: the masked bound in nats a token under the plain model (lower is more natural); for pictures the share that show
all their prompt says.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tropism.core import Batch
from tropism.guide.best_of_n import best_of_n
from tropism.guide.dps import dps
from tropism.guide.learned import LatentValue, TokenValue, fitted, learned, roll_outs, standardised
from tropism.guide.nested import nested
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
from tropism.models.load import load_model
from tropism.models.masked_lm import bounds
from tropism.prompts.batches import train_and_held_out
from tropism.rewards.load import load_reward
from tropism.run import evaluate, guided_molecules, guided_tokens
from tropism.run.guided_table import best_of, quantiles
from tropism.worlds import shapes, taste

DOMAINS = {
    "utr": {"reward": "utr-load", "steps": 32, "alpha": 0.03, "pool": 10_000, "m": 10, "n": 8},
    "dna": {
        "reward": "dna-liver",
        "steps": 24,
        "alpha": 0.05,
        "pool": 10_000,
        "gradient": "dna-liver",
        "scale": 20.0,
        "m": 10,
        "n": 10,
    },
    "molecules": {"reward": "qed", "steps": 24, "alpha": 0.02, "pool": 10_000, "m": 10, "n": 8},
    "shapes": {
        "reward": "jpeg-bytes",
        "steps": 8,
        "alpha": 0.05,
        "pool": 500,
        "gradient": "jpeg",
        "scale": 0.1,
        "m": 5,
        "n": 5,
    },
}
"""m: children of SVDD. n: of best-of-N, for equal rows. pool: plain samples of every prompt. scale: of DPS."""
SAMPLES, ROLL_OUTS = 256, 512


class Domain:
    """A bundled model with its reward, its prompts and what measures it."""

    def __init__(self, name):
        self.name, self.how, self.pictures = name, DOMAINS[name], name == "shapes"
        own = {"eta": 1.0} if self.pictures else {}
        self.model, self.reward = load_model(name, lora=None, **own), load_reward(self.how["reward"])
        prompts = [p.text for p in train_and_held_out(None, None, name)[1][:16]] if self.pictures else [""]
        self.groups = Batch(prompts if self.pictures else [""] * 4)
        self.alone, self.each = Batch(prompts), SAMPLES // len(self.groups)
        self.fixed = {"steps": self.how["steps"], "guidance": self.model.guidance, "max_batch": 256}

    def measures(self, samples, prompts):
        """(gold, diversity, naturalness, distinct)."""
        distinct = len(samples.flatten(1).unique(dim=0)) / len(samples)
        if self.pictures:
            seen = shapes.accuracy(samples, prompts)["all"].double().mean().item()
            return taste.gold(samples).double().mean().item(), evaluate.diversity(samples, self.each), seen, distinct
        gold = guided_tokens.MEASURES[self.name](samples)["gold"].nanmean().item()
        if self.name == "molecules":
            found = guided_molecules.together(samples)
            return gold, found["diversity (1 - Tanimoto)"], self.bound(samples), found["distinct molecules"]
        return gold, guided_tokens.diversity(samples), self.bound(samples), distinct

    def bound(self, samples, draws=16):
        """Masked bound, nats a token."""
        found = []
        for k in range(draws):
            generator = torch.Generator().manual_seed(k)
            t = (torch.arange(len(samples)) + torch.rand(1, generator=generator)) / len(samples)
            noise = torch.randn(samples.shape, generator=generator)
            with torch.no_grad():
                found.append(bounds(self.model.network, self.model.process, samples, t.clamp_min(0.01), noise).mean())
        return torch.stack(found).mean().item()

    def judge(self, seed):
        """(a learned value, rows and rewards its roll-outs took)."""
        before = self.model.calls["network"]
        each = ROLL_OUTS // len(self.alone)
        data = roll_outs(self.model, self.reward, self.alone, each, seed=seed, **self.fixed)
        data, mean, scale = standardised(data, len(self.alone))
        rows = self.model.calls["network"] - before
        torch.manual_seed(seed)
        shape, span = data.states.shape[2:], data.times[0]
        network = LatentValue(shape, span) if self.pictures else TokenValue(len(self.model.letters))
        fitted(network, data, alpha=self.how["alpha"] / scale, loss="mean", seed=seed)
        return learned(lambda x, t: mean + scale * network(x, t).double()), rows, ROLL_OUTS

    def methods(self, seed):
        """(name, function, options, particles drawn for each that is kept, gradient reward or None, what it cost before)."""
        alpha, m = self.how["alpha"], self.how["m"]
        yield f"best of {self.how['n']}", best_of_n, {"m": self.how["n"]}, 1, None, (0, 0)
        yield "SVDD-PM", svdd, {"m": m}, 1, None, (0, 0)
        value, *before = self.judge(seed)
        yield "SVDD-MC", svdd, {"m": m, "value": value}, 1, None, before
        yield "nested, M = 4", nested, {"m": 4, "alpha": alpha}, m // 4, None, (0, 0)
        yield "SMC", smc, {"alpha": alpha}, int(0.8 * m), None, (0, 0)
        if "gradient" in self.how:
            yield "DPS", dps, {"scale": self.how["scale"]}, 1, self.how["gradient"], (0, 0)

    def run(self, function, options, times, gradient, before, seed):
        """One row of the table."""
        guiding = load_reward(gradient) if gradient else self.reward
        began, every = time.perf_counter(), self.each * times
        found = function(self.model, guiding, self.groups, every, seed=seed, **self.fixed, **options)
        order = torch.Generator().manual_seed(seed)
        groups = torch.arange(len(found.samples)).reshape(-1, every)
        kept = torch.cat([g[torch.randperm(every, generator=order)[: self.each]] for g in groups])
        samples, rewards = found.samples[kept], found.rewards[kept]
        if gradient:
            rewards = self.reward(samples, found.batch[kept]).double()
        seconds, cost = time.perf_counter() - began, found.costs
        passes = cost.network + 2 * cost.backward + before[0]
        return {
            "quantiles": quantiles(rewards),
            "measures": self.measures(samples, [found.batch.prompts[i] for i in kept.tolist()]),
            "rows": passes / SAMPLES,
            "rewards": (cost.rewards_computed + before[1]) / SAMPLES,
            "seconds": seconds,
        }

    def pool(self, out):
        """Rewards (prompts, pool) of plain samples, rows a sample, and the measures of the first 256, kept in a file."""
        file = out / f"{self.name}-pool.safetensors"
        if not file.exists():
            began, size, rewards, samples, rows = time.perf_counter(), self.how["pool"], [], None, 0
            for at in range(0, size, 500):
                part = best_of_n(
                    self.model, self.reward, self.alone, min(500, size - at), m=1, seed=1000 + at, **self.fixed
                )
                rewards.append(part.rewards.reshape(len(self.alone), -1))
                rows += part.costs.network
                if samples is None:
                    first = torch.arange(len(self.alone))[:, None] * min(500, size) + torch.arange(
                        SAMPLES // len(self.alone)
                    )
                    samples = part.samples[first.flatten()]
            texts = [p for p in self.alone.prompts for _ in range(SAMPLES // len(self.alone))]
            pooled = torch.cat(rewards, 1)
            measured, seconds = self.measures(samples, texts), time.perf_counter() - began
            told = {"rows": rows / pooled.numel(), "measures": measured, "seconds": seconds}
            save_file({"rewards": pooled.float()}, file, metadata={"told": json.dumps(told)})


def draw(name, seeds, out):
    """All that is missing of a domain."""
    domain, file = Domain(name), out / f"{name}.jsonl"
    domain.pool(out)
    done = {(r["method"], r["seed"]) for r in read(file)}
    for seed in seeds:
        for method, *how in domain.methods(seed):
            if (method, seed) not in done:
                with file.open("a") as f:
                    f.write(json.dumps({"method": method, "seed": seed, **domain.run(*how, seed)}) + "\n")
                print(file.read_text().splitlines()[-1], flush=True)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spread(values, digits=4):
    """Mean, and the standard deviation over seeds."""
    return f"{statistics.mean(values):.{digits}g}" + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def line(name, quantile, measures, rows, rewards):
    """quantile: (seeds, 3); measures: (seeds, 4) or None."""
    cells = [spread(v) for v in zip(*quantile, strict=True)]
    cells += [spread(v) for v in zip(*measures, strict=True)] if measures else ["", "", "", ""]
    print(f"| {name} | " + " | ".join(cells) + f" | {rows:.3g} | {rewards:.3g} |")


def table(name, out):
    """One domain as Markdown."""
    rows, file = read(out / f"{name}.jsonl"), out / f"{name}-pool.safetensors"
    with safe_open(file, "pt") as f:
        pool, told = f.get_tensor("rewards").double(), json.loads(f.metadata()["told"])
    plain_rows, measured = told["rows"], told["measures"]
    size = pool.shape[1] // 3
    thirds = [pool[:, i * size : (i + 1) * size] for i in range(3)]
    natural = "shows its prompt" if name == "shapes" else "nats a token"
    print(f"\n{name}, {DOMAINS[name]['reward']}, {DOMAINS[name]['steps']} steps\n")
    print(
        f"| method | q10 | median | q90 | gold | diversity | {natural} | distinct | network rows | rewards |\n|---|{'---:|' * 9}"
    )
    line("plain", [quantiles(p.flatten()) for p in thirds], [measured], plain_rows, 1)
    main = [r for r in rows if r["method"] == "SVDD-PM"]
    if not main:
        return
    asked = statistics.mean(r["rewards"] for r in main)
    mark = "" if asked <= size else ", extrapolated: at least"
    best = [quantiles(*best_of(p, asked)) for p in thirds]
    line(f"best of {asked:.3g} (the rewards of SVDD-PM{mark})", best, None, asked * plain_rows, asked)
    for method in dict.fromkeys(r["method"] for r in rows):
        each = [r for r in rows if r["method"] == method]
        cost = (statistics.mean(r[k] for r in each) for k in ("rows", "rewards"))
        line(method, [r["quantiles"] for r in each], [r["measures"] for r in each], *cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", nargs="*", metavar="DOMAIN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.domain:
        draw(name, asked.seeds, asked.out)
    for name in DOMAINS:
        if asked.table and (asked.out / f"{name}.jsonl").exists():
            table(name, asked.out)


if __name__ == "__main__":
    main()
