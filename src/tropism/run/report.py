"""What a finished run leaves for a person: before and after pictures, curves, and one self-contained page without
scripts.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image
from torch import Tensor

from tropism.run import pictures
from tropism.run.evaluate import Evaluation


@dataclass(frozen=True)
class Finished:
    """All that the report and the model card tell of a run.

    base: what the model is called; load: the Python expression that gives a diffusers pipeline its weights
    ("'folder'").
    rewards: weight by reward name. prompts: those trained on. before, after: the same prompts and seeds. lines:
    metrics.jsonl. adapter: whether lora/ holds the result, else weights/trained.safetensors does. strengths: for each
    multiple of the adapter's effect what was measured with it, by name. part: what the pipeline calls its denoiser. given: pictures of
    the held-out prompts, (B, 3, H, W) as large as those drawn, by what they are called: "low resolution" and "original" of an upscaler.
    """

    method: str
    base: str
    load: str
    rewards: dict[str, float]
    prompts: list[str]
    seed: int
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    before: Evaluation
    after: Evaluation
    lines: list[dict[str, Any]]
    limits: list[str] = field(default_factory=list)
    adapter: bool = True
    strengths: dict[float, dict[str, float]] = field(default_factory=dict)
    part: str = "unet"
    upscales: bool = False
    given: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One measured quantity before and after, and its paired change with a standard error (None: a single number)."""

    name: str
    before: float
    after: float
    change: float
    error: float | None


def rows(before: Evaluation, after: Evaluation) -> list[Row]:
    """The table of numbers: every column of both evaluations, paired picture by picture, then diversity and drift."""
    found = []
    for name in [n for n in after.columns if n in before.columns and n != "drift"]:
        a, b = before.columns[name].double(), after.columns[name].double()
        scored = a.isfinite() & b.isfinite()
        if not scored.all():  # pairs of which one has no finite score
            a, b, name = a[scored], b[scored], f"{name} ({int(scored.sum())} of {len(scored)} samples)"
        error = (b - a).std().item() / math.sqrt(len(a)) if len(a) > 1 else None
        found.append(Row(name, a.mean().item(), b.mean().item(), (b - a).mean().item(), error))
    if before.diversity is not None and after.diversity is not None:
        change = after.diversity - before.diversity
        found.append(Row("diversity", before.diversity, after.diversity, change, None))
    if "drift" in after.columns:
        drift = after.columns["drift"].double().mean().item()
        found.append(Row("drift from the base", 0.0, drift, drift, None))
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# ---------------------------------------------------------------------------------------------------- pictures


def _notes(evaluation: Evaluation) -> list[str]:
    return [f"reward {number(r)}" for r in evaluation.columns["reward"].tolist()]


def save_pictures(out: Path, run: Finished, most: int = 24) -> None:
    """before.png, after.png, before_after.png (at most `most` prompts, evenly chosen) and reward.png."""
    chosen = spread(len(run.before.prompts), most)
    prompts = [run.before.prompts[i] for i in chosen]
    before, after = [[e.images[i] for i in chosen] for e in (run.before, run.after)]
    first, second = [[_notes(e)[i] for i in chosen] for e in (run.before, run.after)]
    pictures.grid([[i] for i in before], prompts, first).save(out / "before.png")
    pictures.grid([[i] for i in after], prompts, second).save(out / "after.png")
    both = [f"{a} → {b.removeprefix('reward ')}" for a, b in zip(first, second, strict=True)]
    given = [[images[i] for i in chosen] for images in run.given.values()]
    cells = list(zip(before, after, *given, strict=True))
    pictures.grid(cells, prompts, both, heads=("before", "after", *run.given)).save(out / "before_after.png")
    pictures.curves(run.lines, out / "reward.png")


def spread(n: int, most: int) -> list[int]:
    """At most `most` of 0..n-1, evenly spaced."""
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


def uri(image: Image.Image | Path) -> str:
    """A picture as a data address."""
    if isinstance(image, Path):
        raw = image.read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        raw = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def small(image: Tensor) -> str:
    """A picture for the page: small ones as they are (the page enlarges them crisply), large ones reduced."""
    return uri(pictures.picture(image, max(1, min(256, max(image.shape[1:])))))


# ---------------------------------------------------------------------------------------------------- page


def write(out: Path | str, run: Finished) -> Path:
    """Write the pictures and report.html into a run folder; returns the page's path. All text in it is escaped."""
    out = Path(out)
    save_pictures(out, run)
    page = out / "report.html"
    page.write_text(html(out, run), encoding="utf-8", errors="replace")
    return page


@cache
def environment_of() -> jinja2.Environment:
    """Templates of this folder, `race` and `judged`, everything escaped, every name required."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader([Path(__file__).parents[1] / room for room in ("run", "race", "judged")]),
    )
    environment.filters["number"] = number
    environment.filters["short"] = lambda value: f"{value:.3g}"
    return environment


def html(out: Path, run: Finished) -> str:
    """The page as text. It holds no script, loads nothing, and its policy forbids both."""
    curve = out / "reward.png"
    return (
        environment_of()
        .get_template("report.html.jinja")
        .render(
            run=run,
            rows=rows(run.before, run.after),
            pairs=_pairs(run),
            curve=uri(curve) if curve.exists() else None,
            crisp=run.before.images.shape[-1] <= 128,
            config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
            environment=yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True),
            updates=_updates(run.lines),
            agreement=agreement(run.lines),
            watched=watched(run.lines),
        )
    )


def agreement(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Norms and cosines of the parts' gradients as first and last measured; None for a reward of one part."""
    measured = [line for line in lines if any(name.startswith("cosine/") for name in line)]
    if not measured:
        return None
    first, last = measured[0], measured[-1]
    names = [name for name in first if name.startswith(("part_norm/", "cosine/"))]
    told = lambda name: name.replace("part_norm/", "norm of ").replace("cosine/", "cosine of ").replace("|", " and ")
    table = [(told(name), first[name], last.get(name)) for name in names]
    return {"first": first["update"], "last": last["update"], "rows": table}


def watched(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Statistics of the training samples, first and last, the update of the best evaluation, and the alarm if there was one."""
    told = [line for line in lines if any(name.startswith("samples/") for name in line)]
    if not told:
        return None
    statistics = {}
    for line in told:
        for name in (n for n in line if n.startswith("samples/")):
            statistics.setdefault(name, []).append((line["update"], line[name]))
    alarms = [(line["update"], line["alarm"]) for line in lines if line.get("alarm")]
    return {
        "rows": [
            (SAMPLES.get(name.removeprefix("samples/"), name), values[0][1], values[-1][1])
            for name, values in statistics.items()
        ],
        "first": told[0]["update"],
        "last": told[-1]["update"],
        "best": next((line["best"] for line in reversed(lines) if "best" in line), None),
        "alarm": alarms[0][1] if alarms else "",
        "since": alarms[0][0] if alarms else None,
    }


SAMPLES = {
    "dark_share": "share of dark pixels",
    "edge_density": "edges: difference of neighbouring pixels' luma",
    "colour_entropy": "entropy of the colours, bits",
    "variety": "variety: feature distance of two samples",
    "vendi": "Vendi score: effective number of samples in a batch",
    "frechet": "Fréchet distance of features to the first samples",
    "output_distance": "distance of the network's output to the base's, relative",
}
"""Statistic of the training samples -> what the page calls it."""


def _updates(lines: Sequence[dict]) -> int:
    return max((r["update"] for r in lines), default=0)


def _pairs(run: Finished, most: int = 24) -> list[dict[str, Any]]:
    a, b = run.before.columns["reward"].tolist(), run.after.columns["reward"].tolist()
    return [
        {
            "prompt": run.before.prompts[i],
            "before": small(run.before.images[i]),
            "after": small(run.after.images[i]),
            "from": a[i],
            "to": b[i],
            "given": [(name, small(images[i])) for name, images in run.given.items()],
        }
        for i in spread(len(a), most)
    ]
