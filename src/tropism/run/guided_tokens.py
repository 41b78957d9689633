"""What a guided run shows of token sequences: letters, coloured strips, a logo, and measures that did not guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tropism.run import guided_molecules
from tropism.run.pictures import font
from tropism.worlds import dna, molecules, utr

COLOURS = ("#3a7d44", "#2f6690", "#e0a030", "#c0392b", "#7d5ba6", "#4d908e", "#8d6b5a", "#6c757d")
_PAPER, _FAINT = "#ffffff", "#68707a"


def letters_of(tokens: Tensor, letters: Sequence[str]) -> list[str]:
    """Each row of tokens (B, L) as text."""
    return ["".join([str(letters[i]) for i in row]) for row in tokens.tolist()]


def diversity(tokens: Tensor) -> float:
    """Mean share of places at which two sequences differ."""
    shares = torch.stack([(tokens == v).double().mean(0) for v in tokens.unique()])
    n = len(tokens)
    return ((1 - shares.pow(2).sum(0)).mean() * n / max(n - 1, 1)).item()


def _dna(tokens: Tensor) -> dict[str, Tensor]:
    found = {"gold": dna.gold(tokens), "gc": dna.gc(tokens), "longest run": dna.longest_run(tokens)}
    return found | {f"sites/{f}": n.double() for f, n in dna.sites(tokens).items()}


def _utr(tokens: Tensor) -> dict[str, Tensor]:
    texts = utr.text(tokens)
    return {
        "gold": utr.load(tokens, utr.GOLD),
        "start share": torch.tensor([utr.scanned(s) for s in texts]),
        "folding energy": torch.tensor([utr.energy(s) for s in texts]),
        "upstream AUGs": torch.tensor([float(s.count("AUG")) for s in texts]),
        "gc": dna.gc(tokens),
    }


MEASURES: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "dna": _dna,
    "utr": _utr,
    "molecules": guided_molecules.measures,
}
"""By bundled model: columns (B,) of tokens."""
READABLE: dict[str, tuple[str, Callable[[Tensor], list[str]]]] = {"molecules": ("smiles", molecules.text)}
"""By bundled model: what its tokens stand for, and its name."""


def of_sets(base: str, tokens: Tensor, plain: Tensor) -> list[tuple[str, float, float]]:
    """(name, plain, guided) of measures that whole sets have."""
    if base == "molecules":
        before, after = guided_molecules.together(plain), guided_molecules.together(tokens)
        return [(name, before.get(name, math.nan), value) for name, value in after.items()]
    half, share = len(plain) // 2, lambda x: len(x.unique(dim=0)) / len(x)
    found = [("diversity", diversity(plain), diversity(tokens)), ("distinct", share(plain), share(tokens))]
    if half:  # sets of equal size, and of other noise: more samples, or twins, are more alike
        found.insert(
            0,
            ("words like plain ones (r)", likeness(plain[:half], plain[half:]), likeness(tokens[:half], plain[half:])),
        )
    return found


def likeness(tokens: Tensor, other: Tensor) -> float:
    """Pearson's correlation of the shares of three-letter words of two sets."""
    size = int(max(tokens.max(), other.max())) + 1
    place = size ** torch.arange(2, -1, -1)
    count = lambda x: torch.bincount((x.unfold(1, 3, 1) * place).sum(-1).flatten(), minlength=size**3).double()
    return torch.corrcoef(torch.stack([count(tokens), count(other)]))[0, 1].item()


# ---------------------------------------------------------------------------------------------------- pictures


def strips(sets: Sequence[tuple[str, Tensor]], most: int = 24, letters: Sequence[str] = "ACGT") -> Image.Image:
    """Sequences as rows of coloured cells, one block a set, under its name."""
    length = sets[0][1].shape[1]
    cell, high, gap = max(5, min(16, 1000 // length)), 9, 26
    rows = [min(len(tokens), most) for _, tokens in sets]
    sheet = Image.new("RGB", (length * cell + 20, sum(rows) * high + gap * (len(sets) + 1)), _PAPER)
    canvas, y = ImageDraw.Draw(sheet), 6
    for (name, tokens), count in zip(sets, rows, strict=True):
        canvas.text((10, y), name, _FAINT, font(12, bold=True))
        y += 18
        for row in tokens[:count].tolist():
            for i, token in enumerate(row):
                canvas.rectangle((10 + i * cell, y, 9 + (i + 1) * cell, y + high - 2), COLOURS[token % len(COLOURS)])
            y += high
        y += gap - 18
    for i, letter in enumerate(letters[: len(COLOURS)]):
        canvas.rectangle((10 + 40 * i, y, 20 + 40 * i, y + 10), COLOURS[i])
        canvas.text((24 + 40 * i, y - 2), str(letter), _FAINT, font(11))
    return sheet


def logo(tokens: Tensor, letters: Sequence[str], title: str = "") -> Image.Image:
    """A sequence logo: at every place letters as high as their share times the place's information, in bits.

    Source: Sequence logos, Schneider and Stephens, Nucleic Acids Research 18 (1990) 6097.
    """
    size, length = len(letters), tokens.shape[1]
    shares = np.stack([(tokens == v).double().mean(0).numpy() for v in range(size)], 1)
    bits = np.log2(size) + np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-12)), 0).sum(1)
    wide, tall = max(6, min(18, 1000 // length)), 90
    top = min(
        np.log2(size), max(0.1, float(bits.max()))
    )  # full height: the most informative place, at least a tenth of a bit
    sheet = Image.new("RGB", (length * wide + 20, tall + 40), _PAPER)
    ImageDraw.Draw(sheet).text((10, 4), f"{title}  (0 to {top:.2g} bits)", _FAINT, font(12, bold=True))
    canvas = ImageDraw.Draw(sheet)
    for i in range(9, length, 10):
        canvas.text((10 + i * wide, tall + 27), str(i + 1), _FAINT, font(10))
    for i in range(length):
        y = tall + 26
        for v in shares[i].argsort():
            height = int(tall * shares[i, v] * max(bits[i], 0) / top)
            if height >= 2:
                sheet.paste(
                    _glyph(str(letters[v])[0], COLOURS[v % len(COLOURS)], wide, height), (10 + i * wide, y - height)
                )
                y -= height
    return sheet


def _glyph(letter: str, colour: str, width: int, height: int) -> Image.Image:
    """A letter stretched to fill a box."""
    drawn = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(drawn).text((4, 0), letter, 255, font(56, bold=True))
    box = drawn.getbbox() or (0, 0, 64, 64)
    mask = drawn.crop(box).resize((width, height), Image.Resampling.LANCZOS)
    filled = Image.new("RGB", (width, height), _PAPER)
    filled.paste(Image.new("RGB", (width, height), colour), mask=mask)
    return filled
