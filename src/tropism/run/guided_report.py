"""What a finished guided run leaves for a person: pictures, quantiles against the plain model and best-of-N, a table, one page."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from tropism.models.load import world_of
from tropism.run import guided_molecules, guided_tokens, pictures
from tropism.run.card import fenced, safe
from tropism.run.evaluate import diversity
from tropism.run.guided import Piece, shown
from tropism.run.products import measures_for
from tropism.run.report import environment_of, number, small, spread, uri

QUANTILES = (0.1, 0.5, 0.9)
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

    def cost(self, name: str, of: str = "costs") -> int:
        return sum(getattr(piece, of).get(name, 0) for piece in self.pieces)


@dataclass(frozen=True)
class Line:
    """One row of the table: quantiles and mean of the reward; rows of the network and rewards a sample; note."""

    name: str
    values: tuple[float, ...]
    mean: float
    network: float
    rewards: float
    note: str = ""


# ---------------------------------------------------------------------------------------------------- numbers


def best_of(pool: Tensor, n: float) -> tuple[Tensor, Tensor]:
    """(values, weights): the law of the best of n draws from pooled rewards (rows, pool), by order statistics, all rows alike.

    The i-th smallest of P values is the best of n with probability (i / P)^n - ((i - 1) / P)^n; n need not be whole.
    """
    values, size = pool.sort(1).values, pool.shape[1]
    edges = (torch.arange(size + 1, dtype=torch.float64) / size) ** n
    return values.flatten(), (edges.diff() / len(pool)).expand(len(pool), -1).flatten()


def quantiles(values: Tensor, weights: Tensor | None = None) -> tuple[float, ...]:
    """Weighted quantiles: the least value whose cumulative weight reaches the share."""
    order = values.argsort()
    weights = torch.full((len(values),), 1 / len(values), dtype=torch.float64) if weights is None else weights
    reached = weights[order].cumsum(0)
    at = [int(torch.searchsorted(reached, q - 1e-9)) for q in QUANTILES]
    return tuple(values[order][min(i, len(values) - 1)].item() for i in at)


def table(run: Finished) -> list[Line]:
    """The plain model, best-of-N at equal network rows and at equal rewards, and the guided run."""
    pool = _pools(run)
    own = line_of(run.method, run.pieces, run.before)
    found = []
    if pool:
        plain_rows = run.cost("network", "plain_costs") / run.cost("rewards", "plain_costs")
        found.append(_line("plain model", pool, 1.0, plain_rows))
        if own.network > 1.5 * plain_rows:
            found.append(_line("best of N, equal network rows", pool, own.network / plain_rows, plain_rows))
        if own.rewards > 1:
            found.append(_line("best of N, equal rewards", pool, own.rewards, plain_rows))
    return [*found, *([run.teacher] if run.teacher else []), own]


def told_share(plain: float, guided: float, distilled: float) -> str:
    """How much of a guide's gain is kept, in a sentence."""
    share = share_kept(plain, guided, distilled)
    return (
        "The guide gained nothing that could be kept."
        if share != share
        else f"{share:.0%} of the guide's gain is kept without it."
    )


def share_kept(plain: float, guided: float, distilled: float) -> float:
    """(distilled - plain) / (guided - plain) of mean rewards; NaN where the guide gained nothing."""
    gain = guided - plain
    return (distilled - plain) / gain if gain > 0 and math.isfinite(gain) else math.nan


def line_of(name: str, pieces: Sequence[Piece], before: Mapping[str, int] = MappingProxyType({})) -> Line:
    """The row of guided samples; a row backward counts as two. before: what was spent on them all."""
    rewards = torch.cat([piece.rewards for piece in pieces])
    cost = lambda what: (sum(p.costs.get(what, 0) for p in pieces) + before.get(what, 0)) / len(rewards)
    note = "its roll-outs counted" if before else ""
    rows = cost("network") + 2 * cost("backward")
    return Line(name, quantiles(rewards), rewards.mean().item(), rows, cost("rewards"), note)


def _pools(run: Finished) -> list[Tensor]:
    """Each prompt's pool once, a row for each of its samples (n, P), where the run has pools."""
    return [
        piece.pool[piece.prompts == p] for piece in run.pieces if piece.pool.numel() for p in piece.prompts.unique()
    ]


def pooled(pools: Sequence[Tensor], n: float) -> tuple[Tensor, Tensor]:
    """`best_of` over all pools, each as heavy as it has samples; values that cannot be drawn are left out."""
    pairs, total = [(*best_of(pool[:1], n), len(pool)) for pool in pools], sum(len(pool) for pool in pools)
    values, weights = torch.cat([v for v, _, _ in pairs]), torch.cat([w * k / total for _, w, k in pairs])
    return values[weights > 0], weights[weights > 0]


def _line(name: str, pools: Sequence[Tensor], n: float, plain_rows: float) -> Line:
    n = max(n, 1.0)
    values, weights = pooled(pools, n)
    smallest = min(pool.shape[1] for pool in pools)
    note = (
        f"N = {n:.3g}" + (f", a lower bound: {smallest} plain samples a prompt" if n > smallest else "")
        if n > 1
        else ""
    )
    return Line(name, quantiles(values, weights), (values * weights).sum().item(), n * plain_rows, n, note)


def measured(run: Finished) -> list[tuple[str, float, float, float]]:
    """(name, plain, guided, standard error of the change) of measures that did not guide; pictures are paired with their twins."""
    guided, twins = shown(run.joined("samples")), shown(run.joined("twins"))
    if not len(twins):
        return []
    if run.letters:
        return _of_tokens(run, guided, twins)
    if guided.ndim != 4:
        return []
    rows = []
    for name, measure in measures_for(run.texts).items():
        before, after = measure(twins, run.texts), measure(guided, run.texts)
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

    figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    pools, rewards = _pools(run), run.joined("rewards")
    drawn = [(run.method, rewards, torch.full((len(rewards),), 1 / len(rewards), dtype=torch.float64), "#d1495b")]
    if pools:
        plain_rows = run.cost("network", "plain_costs") / run.cost("rewards", "plain_costs")
        n = line_of(run.method, run.pieces, run.before).network / plain_rows
        others = [(f"best of {n:.3g}, equal network rows", n, "#2f6690")] if n > 1.5 else []
        for name, size, colour in (("plain model", 1.0, "#9aa3ad"), *others):
            drawn.append((name, *pooled(pools, max(size, 1.0)), colour))
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
