"""Guidance and training on one page: rewards, costs before and a sample, where training pays, and the samples side by side."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch
from tropism.models.load import world_of
from tropism.run import guided_molecules, guided_tokens, pictures
from tropism.run.evaluate import diversity
from tropism.run.guided import Kept, Piece, shown
from tropism.run.guided_table import Line, line_of, plain_line
from tropism.run.measures import measures_for
from tropism.run.report import environment_of, number, spread, uri


@dataclass(frozen=True)
class Entry:
    """One run on the page. line: rewards, and rows and rewards a sample. network, rewards: spent before the first sample.

    samples: (n, ...) on the first run's prompts, in its order. is_trained: whether weights were changed.
    """

    line: Line
    network: float
    rewards: float
    samples: Tensor
    is_trained: bool = False
    is_plain: bool = False


def plain(run: Kept, name: str = "") -> Entry:
    """The base model's own samples, drawn as this run draws them; name: of a run that draws them in another way than the first."""
    line = plain_line(f"plain model ({Path(name).name})" if name else "plain model", run.pieces)
    return Entry(line, 0, 0, run.joined("twins"), is_plain=True)


def guided(name: str, run: Kept) -> Entry:
    """A guided run; its learned value's roll-outs were spent before."""
    line = line_of(f"{run.config['method']} ({Path(name).name})", run.pieces)
    return Entry(line, run.before.get("network", 0), run.before.get("rewards", 0), run.joined("samples"))


def trained(name: str, method: str, pieces: Sequence[Piece], network: float, rewards: float) -> Entry:
    """A trained model's samples and what training took."""
    line = replace(line_of(f"{method} ({Path(name).name})", pieces), rewards=0.0)
    return Entry(line, network, rewards, torch.cat([p.samples for p in pieces]), is_trained=True)


def pays_from(entry: Entry, other: Entry) -> float:
    """The number of samples from which on `entry` takes fewer network rows than `other`; infinite if it never does for good."""
    less, more = other.line.network - entry.line.network, entry.network - other.network
    if less > 0:
        return max(more / less, 0.0)
    return 0.0 if less == 0 and more < 0 else math.inf


def cheaper(one: Entry, other: Entry) -> str:
    """Which of the two takes fewer network rows, in words."""
    n, back = pays_from(one, other), pays_from(other, one)
    if one.network == other.network and one.line.network == other.line.network:
        return "and takes as many network rows"
    if n == 0:
        return "and takes fewer network rows from the first sample on"
    if n < math.inf:
        return f"and takes fewer network rows only from {math.ceil(n):,} samples on"
    return (
        f"and takes fewer network rows only up to {math.floor(back):,} samples"
        if back > 0
        else "and never takes fewer network rows"
    )


def verdicts(entries: Sequence[Entry]) -> list[str]:
    """A sentence for every pair of a guided and a trained run: which has the higher median, and who is cheaper until when."""
    said = []
    for one in [e for e in entries if e.is_trained]:
        for other in [e for e in entries if not e.is_trained and not e.is_plain]:
            a, b = one.line.values[1], other.line.values[1]
            reach = (
                "the same median"
                if a == b
                else f"a {'higher' if a > b else 'lower'} median ({number(a)} against {number(b)})"
            )
            cost = cheaper(one, other)
            rest = ": for fewer, no training is needed" if a >= b and "only from" in cost else ""
            rest = (
                ": it is cheaper there, but no substitute"
                if a < b and "fewer" in cost and "never" not in cost
                else rest
            )
            text = f"{one.line.name} has {reach} than {other.line.name}, {cost}{rest}."
            said.append(text.replace("same median than", "same median as"))
    return said


def measured(first: Kept, entries: Sequence[Entry]) -> list[tuple[str, list[float]]]:
    """(measure, its mean of every entry) of measures that did not guide."""
    texts, base = [first.prompts[i].text for i in first.joined("prompts").tolist()], world_of(first.config["model"])
    columns, asked = list[dict[str, float]](), Batch(texts)
    for samples in (shown(e.samples) for e in entries):
        if base in guided_tokens.MEASURES:
            found = {n: v.double().nanmean().item() for n, v in guided_tokens.MEASURES[base](samples).items()}
            sets = guided_tokens.of_sets(base, samples, shown(entries[0].samples))
            found |= {n: b if columns else a for n, a, b in sets}  # the plain samples come first
        elif samples.ndim == 4:
            found = {
                name if key == name else f"{name}/{key}": v.double().mean().item()
                for name, measure in measures_for(asked).items()
                for key, v in measure(samples, asked).items()
            }
            varied = diversity(samples)
            found |= {} if varied is None else {"diversity": varied}
        else:
            found = {}
        columns.append(found)
    return [(name, [c.get(name, math.nan) for c in columns]) for name in columns[-1]]


def write(out: Path, first: Kept, entries: Sequence[Entry], command: str, environment: dict[str, Any]) -> Path:
    """compare.csv, side_by_side.png and report.html; returns the page."""
    _csv(out / "compare.csv", entries)
    texts = [first.prompts[i].text for i in first.joined("prompts").tolist()]
    drawing = _drawing(out, first, entries, texts)
    page = out / "report.html"
    page.write_text(
        environment_of()
        .get_template("compared.html.jinja")
        .render(
            base=first.config["model"],
            reward=first.config["reward"],
            samples=len(texts),
            entries=entries,
            verdicts=verdicts(entries),
            others=measured(first, entries),
            drawing=drawing and uri(drawing),
            command=command,
            environment=environment,
        ),
        encoding="utf-8",
        errors="replace",
    )
    return page


def _csv(file: Path, entries: Sequence[Entry]) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="replace") as f:
        writer = csv.writer(f)
        costs = ("network_before", "rewards_before", "network_a_sample", "rewards_a_sample")
        writer.writerow(["run", "q10", "q50", "q90", "mean", *costs])
        for e in entries:
            numbers = (*e.line.values, e.line.mean, e.network, e.rewards, e.line.network, e.line.rewards)
            writer.writerow([e.line.name, *(f"{v:.8g}" for v in numbers)])


def _drawing(out: Path, first: Kept, entries: Sequence[Entry], texts: list[str], most: int = 12) -> Path | None:
    """Samples side by side, one column a run."""
    samples, file = [shown(e.samples) for e in entries], out / "side_by_side.png"
    if samples[0].ndim == 4:
        at = spread(len(texts), most)
        heads = tuple(e.line.name for e in entries)
        cells = [[s[i] for s in samples] for i in at]
        pictures.grid(cells, [texts[i] for i in at], [""] * len(at), heads=heads).save(file)
    elif world_of(first.config["model"]) == "molecules":
        named = [e.line.name for e in entries for _ in range(min(6, len(e.samples)))]
        guided_molecules.drawn(torch.cat([s[:6] for s in samples]), most=6 * len(samples), names=named).save(file)
    elif world_of(first.config["model"]) in guided_tokens.MEASURES:
        guided_tokens.strips([(e.line.name, s) for e, s in zip(entries, samples, strict=True)], most=10).save(file)
    else:
        return None
    return file


def summary(entries: Sequence[Entry]) -> str:
    """What the command prints."""
    head = f"{'':34s}{'median':>10s}{'q90':>10s}{'rows before':>14s}{'rows a sample':>15s}"
    lines = [
        f"{e.line.name[:33]:34s}{e.line.values[1]:10.4f}{e.line.values[2]:10.4f}{e.network:14,.0f}{e.line.network:15.4g}"
        for e in entries
    ]
    return "\n".join([head, *lines, *verdicts(entries)])
