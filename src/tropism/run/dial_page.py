"""What the dial leaves for a person: one page with a slider over pictures, curves, a setting to use, and plain files."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from tropism.run import pictures
from tropism.run.dial import (
    Stop,
    error_share,
    predict,
    quantities,
    recommend,
    standard_error,
)
from tropism.run.evaluate import Evaluation, finite_mean
from tropism.run.report import environment_of, number, small, uri

FINE = 0.05
"""Steps in which the recommended setting is looked for."""


@dataclass(frozen=True)
class Dialled:
    """All that the page tells. rewards: the columns that count. rows: which of the run's prompts are shown.

    probes: place -> (which prompts were drawn for the prediction, their pictures). before: the base model's pictures; ends: those at
    places 0 and 1, all of them; drawn: at each stop; fresh: the same, or None.
    """

    out: Path
    runs: list[str]
    base: str
    rewards: list[str]
    stops: list[Stop]
    rows: list[int]
    probes: dict[float, tuple[list[int], Evaluation]]
    before: Evaluation
    ends: tuple[Evaluation, Evaluation]
    drawn: list[Evaluation]
    fresh: list[Evaluation | None]
    keep: float
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def adapters(self) -> int:
        return len(self.runs)

    @property
    def names(self) -> list[str]:
        """What the runs are called: their folders."""
        return [Path(run).resolve().name for run in self.runs]

    @property
    def headline(self) -> list[str]:
        """The quantities of the curves."""
        return [*self.rewards, *(["diversity"] if "diversity" in self.known[0] else [])]

    @cached_property
    def known(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        first, last = (quantities(end) for end in self.ends)
        return first, last

    @cached_property
    def seen(self) -> list[dict[str, Tensor]]:
        return [quantities(found) for found in self.drawn]

    @cached_property
    def checked(self) -> list[dict[str, Tensor] | None]:
        return [quantities(found) if found else None for found in self.fresh]

    def predicted(self, name: str, at: Sequence[float]) -> list[float]:
        """The mean of a quantity at these places, from the probe pictures and the ends alone."""
        there = {p: (seen[name], rows) for p, (rows, seen) in self.probed.items() if name in seen}
        return predict((self.known[0][name], self.known[1][name]), there, at)

    @cached_property
    def probed(self) -> dict[float, tuple[list[int], dict[str, Tensor]]]:
        return {place: (rows, quantities(seen)) for place, (rows, seen) in self.probes.items()}

    def row(self, group: str) -> list[int]:
        """The stops of a group in order; a phase at strength 1 is the adapter as it was trained."""
        mine = [i for i, s in enumerate(self.stops) if s.group == group or (not s.group and s.place == 1)]
        return sorted(mine, key=lambda i: self.stops[i].place)

    @cached_property
    def fine(self) -> list[float]:
        """The places at which the prediction is drawn."""
        top = max(stop.place for stop in self.stops if not stop.group)
        return [round(i * FINE, 4) for i in range(round(top / FINE) + 1)]

    @cached_property
    def base_diversity(self) -> float | None:
        found = quantities(self.before).get("diversity")
        return None if found is None else finite_mean(found)

    @cached_property
    def recommended(self) -> tuple[Stop, dict[str, float], bool]:
        """(the setting, what is predicted there, whether it keeps enough diversity)."""
        last = max([1.0, *self.probes])  # beyond it the prediction is a continued curve, and no measurement
        places = [place for place in self.fine if place <= last]
        curves = {name: self.predicted(name, places) for name in self.headline}
        chosen, enough = recommend(
            [curves[name] for name in self.rewards], curves.get("diversity"), self.base_diversity, self.keep
        )
        place = places[chosen]
        weights = (place,) if self.adapters == 1 else (round(1 - place, 4), place)
        return Stop("", place, weights), {name: curve[chosen] for name, curve in curves.items()}, enough

    def errors(self) -> dict[str, float]:
        """The prediction's mean absolute error against fresh pictures, in shares of their range, of each headline quantity."""
        places = [s.place for s, c in zip(self.stops, self.checked, strict=True) if c]
        if len(places) < 2:
            return {}
        truths = [c for c in self.checked if c]
        return {
            name: error_share(self.predicted(name, places), [finite_mean(t[name]) for t in truths])
            for name in self.headline
        }


# ---------------------------------------------------------------------------------------------------- numbers


def rows_of(found: Dialled) -> list[dict[str, Any]]:
    """A row for each setting and quantity: setting, group, place, quantity, pictures, measured, s.e., predicted, fresh, fresh s.e."""
    rows = []
    for i, stop in enumerate(found.stops):
        for name, values in found.seen[i].items():
            row = {
                "setting": stop.name,
                "group": stop.group,
                "place": stop.place,
                "quantity": name,
                "pictures": len(values),
            }
            row |= {"measured": finite_mean(values), "s.e.": standard_error(values), "predicted": math.nan}
            if not stop.group and name in found.known[0]:
                row["predicted"] = found.predicted(name, [stop.place])[0]
            fresh = found.checked[i]
            row["fresh"] = finite_mean(fresh[name]) if fresh else math.nan
            row["fresh s.e."] = standard_error(fresh[name]) if fresh else math.nan
            rows.append(row)
    return rows


def _csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="replace") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})


# ---------------------------------------------------------------------------------------------------- pictures


def _save_grids(found: Dialled) -> None:
    """pictures/SETTING.png: the prompts at each setting, with their rewards."""
    folder = found.out / "pictures"
    folder.mkdir(exist_ok=True)
    for stop, drawn in zip(found.stops, found.drawn, strict=True):
        notes = [
            " · ".join(number(drawn.columns[r][i].item()) for r in found.rewards) for i in range(len(drawn.prompts))
        ]
        pictures.grid([[i] for i in drawn.images], drawn.prompts, notes).save(
            folder / f"{stop.name.replace(' ', '-')}.png"
        )


COLOURS = ("#2f6690", "#d1495b", "#8a6d1d", "#4a7c59")


def _curves(found: Dialled, file: Path) -> None:
    """dial.png: every headline quantity along the dial, and reward against diversity (or against the other reward)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = found.headline
    panels = len(names) + (1 if len(names) > 1 else 0)
    figure = Figure(figsize=(4.1 * panels, 3.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        _along(axis, found, name)
    if len(names) > 1:
        _against(axes[-1], found, names[1] if found.adapters == 2 else "diversity", names[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7.5, frameon=False)
    figure.savefig(file, format="png")


def _told(name: str) -> str:
    return pictures.plain(name).replace("$", r"\$")[:40]


def _along(axis: Any, found: Dialled, name: str) -> None:
    main = [i for i, stop in enumerate(found.stops) if not stop.group]
    axis.plot(found.fine, found.predicted(name, found.fine), color=COLOURS[0], lw=1.5, label="predicted")
    sets: list[tuple] = [(found.seen, f"these {len(found.rows)} pictures", "o", COLOURS[1])]
    if any(found.checked):
        sets.append((found.checked, f"{found.config['check']} fresh pictures", "s", "#5a6470"))
    for values, label, mark, colour in sets:
        there = [i for i in main if values[i]]
        means = [finite_mean(values[i][name]) for i in there]
        errors = [standard_error(values[i][name]) for i in there]
        places = [found.stops[i].place for i in there]
        bars = None if any(map(math.isnan, errors)) else errors
        axis.errorbar(places, means, bars, fmt=mark, color=colour, ms=3.5, lw=0.8, label=label)
    axis.axvline(found.recommended[0].place, color="#1b7a43", lw=1, ls=":", label="recommended")
    axis.set_title(_told(name), fontsize=9, loc="left")
    label = "strength" if found.adapters == 1 else f"weight of {_told(found.rewards[1])}"
    axis.set_xlabel(label, fontsize=8)


def _against(axis: Any, found: Dialled, across: str, up: str) -> None:
    axis.plot(found.predicted(across, found.fine), found.predicted(up, found.fine), color=COLOURS[0], lw=1.5)
    for k, group in enumerate(dict.fromkeys(stop.group for stop in found.stops)):
        mine = found.row(group)
        x, y = ([finite_mean(found.seen[i][name]) for i in mine] for name in (across, up))
        colour = COLOURS[(k + 1) % len(COLOURS)]
        axis.plot(
            x, y, "--o" if group else "o", color=colour, ms=3.5, lw=0.8, label=f"{group} third alone" if group else None
        )
        for i, a, b in zip(mine, x, y, strict=True):
            axis.annotate(f"{found.stops[i].place:g}", (a, b), xytext=(4, 3), textcoords="offset points", fontsize=7)
    _, best, _ = found.recommended
    axis.plot(best[across], best[up], "*", color="#1b7a43", ms=11)
    axis.set_xlabel(_told(across), fontsize=8)
    axis.set_title(f"{_told(up)} against {_told(across)}", fontsize=9, loc="left")
    if any(stop.group for stop in found.stops):
        axis.legend(fontsize=7, frameon=False)


# ---------------------------------------------------------------------------------------------------- page


def write(found: Dialled) -> Path:
    """dial.csv, dial.png, pictures/ and report.html; returns the page."""
    rows = rows_of(found)
    _csv(found.out / "dial.csv", rows)
    _save_grids(found)
    _curves(found, found.out / "dial.png")
    page = found.out / "report.html"
    page.write_text(_html(found, rows), encoding="utf-8", errors="replace")
    return page


def _html(found: Dialled, rows: Sequence[dict[str, Any]]) -> str:
    stop, told, enough = found.recommended
    main = [s.place for s in found.stops if not s.group]
    start = next(
        i for i, s in enumerate(found.stops) if not s.group and s.place == min(main, key=lambda p: abs(p - stop.place))
    )
    by_stop = [{r["quantity"]: r for r in rows if r["setting"] == s.name} for s in found.stops]
    return (
        environment_of()
        .get_template("dial.html.jinja")
        .render(
            run=found,
            stop=stop,
            told=told,
            enough=enough,
            start=start,
            by_stop=by_stop,
            cells=[_cells(found, i) for i in range(len(found.stops))],
            names=list(found.seen[0]),
            groups=list(dict.fromkeys(s.group for s in found.stops)),
            errors=found.errors(),
            probes={place: len(rows) for place, (rows, _) in found.probes.items()},
            kept=None
            if not found.base_diversity or "diversity" not in told
            else told["diversity"] / found.base_diversity,
            curve=uri(found.out / "dial.png"),
            crisp=found.before.images.shape[-1] <= 128,
            config=yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True),
            environment=yaml.safe_dump(found.environment, sort_keys=False, allow_unicode=True),
        )
    )


def _cells(found: Dialled, i: int) -> list[dict[str, Any]]:
    drawn = found.drawn[i]
    return [
        {
            "prompt": prompt,
            "picture": small(drawn.images[k]),
            "rewards": [drawn.columns[r][k].item() for r in found.rewards],
        }
        for k, prompt in enumerate(drawn.prompts)
    ]


def summary(found: Dialled) -> str:
    """What the command prints."""
    stop, told, enough = found.recommended
    lines = [f"{'':14s}" + "".join(f"{name[:20]:>22s}" for name in found.headline)]
    for i, s in enumerate(found.stops):
        lines.append(f"{s.name:14s}" + "".join(f"{finite_mean(found.seen[i][name]):22.4f}" for name in found.headline))
    what = "strength" if found.adapters == 1 else "weights"
    values = ", ".join(f"{name} {number(value)}" for name, value in told.items())
    lines.append(f"Recommended {what}: {stop.name} (predicted: {values})")
    if not enough:
        lines.append(f"No setting keeps {found.keep:.0%} of the base's diversity; this is the most diverse one.")
    lines += [
        f"Prediction of {name}: off by {e:.1%} of its range on fresh pictures" for name, e in found.errors().items()
    ]
    return "\n".join(lines)
