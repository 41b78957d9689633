"""Pictures of a run: grids with the prompt and the reward under each cell, and the curves of metrics.jsonl."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, GAP, LINE = 128, 10, 15
_INK, _FAINT, _PAPER = (28, 32, 36), (104, 112, 120), (255, 255, 255)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all pictures, which ships with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def picture(image: Tensor, cell: int = CELL) -> Image.Image:
    """(3, H, W) in [0, 1] -> a PIL picture: whole-number nearest enlargement up to about `cell` px, or a fine
    reduction.
    """
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    drawn = Image.fromarray(pixels)
    longest = max(drawn.size)
    if longest > cell:
        width, height = (max(1, round(n * cell / longest)) for n in drawn.size)
        return drawn.resize((width, height), Image.Resampling.LANCZOS)
    factor = max(1, round(cell / longest))
    return drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)


def plain(text: str) -> str:
    """One line of printable characters."""
    return " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in text).split())


def wrapped(text: str, width: float, font: ImageFont.FreeTypeFont, lines: int = 2) -> list[str]:
    """Text broken into at most `lines` lines of `width` px; what does not fit ends in an ellipsis."""
    words, rows = plain(text).split(" "), [""]
    while words:
        word = words.pop(0)
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
        elif len(rows) < lines and rows[-1]:
            rows.append("")
            words.insert(0, word)
        else:
            rows[-1] = _shortened(longer, width, font)
            break
    return rows


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    text = text[:400]
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def grid(
    cells: Sequence[Sequence[Tensor]],
    prompts: Sequence[str],
    notes: Sequence[str],
    *,
    columns: int | None = None,
    heads: Sequence[str] = (),
) -> Image.Image:
    """Draw cells of one or more pictures side by side, the prompt (two lines) and a note under each.

    cells: B lists of equally many (3, H, W) tensors in [0, 1]. notes: B short texts. heads: a title over each picture
    of a cell. columns: cells in a row; by default about as wide as high.
    """
    drawn = [[picture(i) for i in cell] for cell in cells]
    each, high = drawn[0][0].size
    wide = each * len(cells[0]) + 2 * (len(cells[0]) - 1)
    columns = columns or max(1, min(len(cells), round(math.sqrt(len(cells) * 1.5 / len(cells[0])))))
    top = LINE + 4 if heads else 0
    row = top + high + 3 * LINE + 6 + GAP
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, math.ceil(len(cells) / columns) * row + GAP), _PAPER)
    for i, pictures in enumerate(drawn):
        x, y = GAP + (i % columns) * (wide + GAP), GAP + (i // columns) * row
        for k, p in enumerate(pictures):
            at = x + k * (each + 2)
            if heads:
                ImageDraw.Draw(sheet).text((at, y), heads[k], _FAINT, font(11, bold=True))
            sheet.paste(p, (at, y + top))
        _caption(sheet, x, y + top + high + 4, wide, prompts[i], notes[i])
    return sheet


def _caption(sheet: Image.Image, x: int, y: int, width: int, prompt: str, note: str) -> None:
    canvas = ImageDraw.Draw(sheet)
    lines = wrapped(prompt, width, font(11))
    for k, line in enumerate(lines):
        canvas.text((x, y + k * LINE), line, _INK, font(11))
    canvas.text((x, y + len(lines) * LINE), wrapped(note, width, font(11), 1)[0], _FAINT, font(11))


# ---------------------------------------------------------------------------------------------------- curves


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list, list]:
    known = [(r["update"], r[name]) for r in lines if isinstance(r.get(name), int | float)]
    return [u for u, _ in known], [v for _, v in known]


def panels(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What reward.png shows: training and held-out reward, then one panel for each measured column, then diversity and
    drift.
    """
    names = {k for r in lines for k, v in r.items() if isinstance(v, int | float)}
    held = sorted(n for n in names if n.startswith("held_out/") and n != "held_out/reward")
    found = [("reward", [n for n in ("reward", "held_out/reward") if n in names])]
    found += [(n.removeprefix("held_out/"), [n]) for n in held]
    found += [(n, [n]) for n in ("diversity", "drift", "gradient_norm") if n in names]
    return [(title, series) for title, series in found if series]


def curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw reward.png from the rows of metrics.jsonl; nothing is drawn if there are no numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(lines)
    if not shown:
        return
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), dpi=110)
    FigureCanvasAgg(figure)
    spaced(figure, rows, columns)
    for k, (title, series) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, k + 1)
        for name in series:
            held = name not in ("reward", "gradient_norm")
            x, y = _series(lines, name)
            axes.plot(
                x,
                y,
                "o-" if held or len(x) < 20 else "-",
                ms=3.5,
                lw=1.4 if held else 1.0,
                color="#d1495b" if held else "#2f6690",
                label="held-out" if held else "training",
            )
        axes.set_title(plain(title).replace("$", r"\$")[:48], fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        axes.set_xlabel("update", fontsize=8)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def spaced(figure: Figure, rows: int, columns: int) -> None:
    """Leave the same room for ticks and titles at every panel, in inches; a constrained layout finds such room by drawing all twice."""
    (wide, high), left, right, top, bottom = figure.get_size_inches(), 0.75, 0.15, 0.45, 0.5
    figure.subplots_adjust(left=left / wide, right=1 - right / wide, top=1 - top / high, bottom=bottom / high)
    across, down = wide / columns - left - right, high / rows - top - bottom
    figure.subplots_adjust(wspace=(left + right) / across, hspace=(top + bottom) / down)
