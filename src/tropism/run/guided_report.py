"""What a finished guided run leaves for a person: pictures, quantiles against the plain model and best-of-N, a table, one page."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from tropism.core import Batch
from tropism.models.load import world_of
from tropism.run import guided_molecules, guided_tokens, pictures
from tropism.run.card import fenced, safe
from tropism.run.evaluate import diversity
from tropism.run.guided import Piece, shown
from tropism.run.guided_table import QUANTILES, Line, line_of, plain_cost, pooled, pools, rows_of, told_share
from tropism.run.measures import measures_for
from tropism.run.report import environment_of, number, small, spread, uri

DRAWINGS = (
    ("Sequences", "sequences.png"),
    ("Where they agree", "logo.png"),
    ("Molecules, best first, with their rewards", "molecules.png"),
    ("Molecules of the plain model", "plain_molecules.png"),
)
"""Pictures of token sequences: title and file."""


@dataclass(frozen=True)
class Finished:
    """All that the page tells of a guided run. texts: the prompt of each sample. letters: of token sequences.

    before: what was spent on a learned value. teacher: the guide's line, where this model was distilled from its samples.
    """

    method: str
    base: str
    rewards: dict[str, float]
    texts: list[str]
    seed: int
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    pieces: list[Piece]
    letters: tuple[str, ...] = ()
    before: dict[str, int] = field(default_factory=dict)
    teacher: Line | None = None

    @property
    def world(self) -> str:
        """The bundled world that the model draws from, where there is one."""
        return world_of(self.base)

    @property
    def how(self) -> str:
        return "from weights distilled from samples guided" if self.teacher else "guided"

    @property
    def kept(self) -> str:
        """What became of the weights, or of the guide's gain."""
        if self.teacher is None:
            return " No weight was changed."
        rows = table(self)
        return " " + told_share(rows[0].mean, self.teacher.mean, rows[-1].mean)

    def joined(self, name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in self.pieces])


# ---------------------------------------------------------------------------------------------------- numbers


def table(run: Finished) -> list[Line]:
    """The rows of a run's table."""
    return rows_of(run.method, run.pieces, run.before, run.teacher)


def measured(run: Finished) -> list[tuple[str, float, float, float]]:
    """(name, plain, guided, standard error of the change) of measures that did not guide; pictures are paired with their twins."""
    guided, twins = shown(run.joined("samples")), shown(run.joined("twins"))
    if not len(twins):
        return []
    if run.letters:
        return _of_tokens(run, guided, twins)
    if guided.ndim != 4:
        return []
    rows, asked = [], Batch(run.texts)
    for name, measure in measures_for(asked).items():
        before, after = measure(twins, asked), measure(guided, asked)
        for key in after:
            a, b = before[key].double(), after[key].double()
            error = (b - a).std().item() / math.sqrt(len(a)) if len(a) > 1 else math.nan
            rows.append((name if key == name else f"{name}/{key}", a.mean().item(), b.mean().item(), error))
    varied = [diversity(x) for x in (twins, guided)]
    return rows + ([("diversity", *varied, math.nan)] if None not in varied else [])  # type: ignore[list-item]


def _of_tokens(run: Finished, guided: Tensor, twins: Tensor) -> list[tuple[str, float, float, float]]:
    rows = []
    if run.world in guided_tokens.MEASURES:
        before, after = (guided_tokens.MEASURES[run.world](x) for x in (twins, guided))
        for name, b in after.items():
            a, b = before[name].double(), b.double()
            a, b = a[~a.isnan()], b[~b.isnan()]
            error = (a.var() / len(a) + b.var() / len(b)).sqrt().item()
            rows.append((name, a.mean().item(), b.mean().item(), error))
    return rows + [(*row, math.nan) for row in guided_tokens.of_sets(run.world, guided, twins)]


# ---------------------------------------------------------------------------------------------------- files


def write(out: Path, run: Finished) -> Path:
    """samples.csv, the pictures, quantiles.png, report.html and README.md; returns the page."""
    found, others = table(run), measured(run)
    _csv(out / "samples.csv", run)
    _save_pictures(out, run)
    _curve(out / "quantiles.png", run)
    page = out / "report.html"
    page.write_text(_html(out, run, found, others), encoding="utf-8", errors="replace")
    (out / "README.md").write_text(_card(run, found, others), encoding="utf-8", errors="replace")
    return page


def _csv(file: Path, run: Finished) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="replace") as f:
        writer = csv.writer(f)
        told: dict[str, list[str]] = {}
        if run.letters:
            told["sequence"] = guided_tokens.letters_of(run.joined("samples"), run.letters)
        if run.world in guided_tokens.READABLE:
            name, read = guided_tokens.READABLE[run.world]
            told[name] = read(run.joined("samples"))
        writer.writerow(["sample", "prompt", "reward", "ancestor", *told])
        ancestors = run.joined("ancestors").tolist()
        for i, (text, reward) in enumerate(zip(run.texts, run.joined("rewards").tolist(), strict=True)):
            more = [column[i] for column in told.values()]
            writer.writerow([i, pictures.plain(text), f"{reward:.8g}", ancestors[i], *more])


def _save_pictures(out: Path, run: Finished, most: int = 24) -> None:
    guided, twins, rewards = shown(run.joined("samples")), shown(run.joined("twins")), run.joined("rewards")
    if run.world == "molecules":
        order = rewards.argsort(descending=True)
        guided_molecules.drawn(guided[order], rewards[order].tolist()).save(out / "molecules.png")
        if len(twins):
            guided_molecules.drawn(twins).save(out / "plain_molecules.png")
    elif run.letters:
        sets = [
            ("guided, best first", guided[rewards.argsort(descending=True)]),
            *([("plain", twins)] if len(twins) else []),
        ]
        guided_tokens.strips(sets, letters=run.letters).save(out / "sequences.png")
        guided_tokens.logo(guided, run.letters, "guided").save(out / "logo.png")
    if guided.ndim != 4:
        return
    (out / "pictures").mkdir(exist_ok=True)
    for i, image in enumerate(run.joined("samples")):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / "pictures" / f"{i:05d}.png")
    at = spread(len(guided), most)
    notes = [f"reward {number(rewards[i].item())}" for i in at]
    texts = [run.texts[i] for i in at]
    pictures.grid([[guided[i]] for i in at], texts, notes).save(out / "guided.png")
    if len(twins):
        cells = [[twins[i], guided[i]] for i in at]
        pictures.grid(cells, texts, notes, heads=("plain", "guided")).save(out / "plain_guided.png")


def _curve(file: Path, run: Finished) -> None:
    """The share of samples below each reward: plain, best-of-N and guided."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), dpi=110)
    FigureCanvasAgg(figure)
    pictures.spaced(figure, 1, 1)
    axes = figure.add_subplot()
    plain, rewards = pools(run.pieces), run.joined("rewards")
    drawn = [(run.method, rewards, torch.full((len(rewards),), 1 / len(rewards), dtype=torch.float64), "#d1495b")]
    if plain:
        plain_rows = plain_cost(run.pieces)
        n = line_of(run.method, run.pieces, run.before).network / plain_rows
        others = [(f"best of {n:.3g}, equal network rows", n, "#2f6690")] if n > 1.5 else []
        for name, size, colour in (("plain model", 1.0, "#9aa3ad"), *others):
            drawn.append((name, *pooled(plain, max(size, 1.0)), colour))
    for name, values, weights, colour in drawn:
        order = values.argsort()
        axes.step(values[order], weights[order].cumsum(0), where="post", label=name, color=colour, lw=1.5)
    axes.set(xlabel="reward", ylabel="share of samples below", ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, format="png")


def _html(out: Path, run: Finished, found: list[Line], others: list) -> str:
    guided, twins = shown(run.joined("samples")), shown(run.joined("twins"))
    cells = []
    if guided.ndim == 4:
        for i in spread(len(guided), 24):
            plain = small(twins[i]) if len(twins) else None
            reward = run.joined("rewards")[i].item()
            cells.append({"prompt": run.texts[i], "plain": plain, "guided": small(guided[i]), "reward": reward})
    return (
        environment_of()
        .get_template("guided.html.jinja")
        .render(
            run=run,
            samples=len(run.texts),
            lines=found,
            others=others,
            cells=cells,
            ess=_least_ess(run),
            survivors=_survivors(run),
            curve=uri(out / "quantiles.png"),
            drawings=[(title, uri(out / name)) for title, name in DRAWINGS if (out / name).exists()],
            crisp=guided.ndim == 4 and guided.shape[-1] <= 128,
            config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
            environment=yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True),
        )
    )


def _least_ess(run: Finished) -> float | None:
    found = [piece.ess.amin().item() for piece in run.pieces if piece.ess.numel()]
    return min(found) if found else None


def _survivors(run: Finished) -> float:
    """The share of starting lineages that have a sample at the end."""
    return sum(len(piece.ancestors.unique()) for piece in run.pieces) / len(run.texts)


def _card(run: Finished, found: list[Line], others: list) -> str:
    rewards = ", ".join(f"{safe(n)}" + (f" x {w:g}" if w != 1 else "") for n, w in run.rewards.items())
    head = "| reward | q10 | q50 | q90 | mean | network rows a sample | rewards a sample | |\n|---|---:|---:|---:|---:|---:|---:|---|"
    rows = [
        f"| {safe(r.name)} | {' | '.join(number(v) for v in (*r.values, r.mean))} | {r.network:.4g} | {r.rewards:.4g} | {r.note} |"
        for r in found
    ]
    second = [
        f"| other measures | plain | {'distilled' if run.teacher else 'guided'} | s.e. of the change |\n|---|---:|---:|---:|"
    ]
    second += [f"| {safe(n)} | {number(a)} | {number(b)} | {number(None if e != e else e)} |" for n, a, b, e in others]
    return (
        "\n\n".join(
            [
                f"# {safe(run.method)} on {safe(run.base)}",
                f"{len(run.texts)} samples, seed {run.seed}, {run.how} by {rewards}.{run.kept}",
                "\n".join([head, *rows]),
                *(["\n".join(second)] if others else []),
                "Best of N by order statistics of each prompt's plain samples. `samples.csv` has every reward, `report.html` the pictures.",
                fenced(run.command or "(run from Python)", "sh"),
            ]
        )
        + "\n"
    )


def summary(run: Finished, found: list[Line]) -> str:
    """What the command prints."""
    lines = [f"  {r.name:32s} " + "  ".join(f"{v:10.4f}" for v in r.values) + f"  {r.note}" for r in found]
    return "\n".join([f"{'Reward, quantiles':34s} " + "  ".join(f"{f'q{q:.0%}'[:-1]:>10s}" for q in QUANTILES), *lines])
