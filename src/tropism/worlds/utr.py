"""A world of 5' untranslated regions: 50 bases before a start codon, whose ribosome load follows from leaky scanning and from folding.

Tokens are 0..3 for A, C, G, U. Sequences are independent bases with a mild GC bias, so the denoiser is known exactly: what is masked has
the prior's probabilities whatever stands beside it.
Mechanism, after Kozak's scanning model: ribosomes scan from the 5' end; at each AUG a share starts, by how good its context is; who
starts in a frame that stops before the main start may start again, who is still translating when the main start goes by is lost.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError

ALPHABET = "ACGU"
LENGTH = 50
PRIOR = (0.22, 0.27, 0.27, 0.24)
"""Chances of A, C, G, U at every place."""
_STOPS = ("UAA", "UAG", "UGA")
_CODING = "GCCACCAUGGGCUUC"
"""What follows the 50 bases: the end of a Kozak sequence, the main start, the first codons."""


@dataclass(frozen=True)
class Ribosome:
    """Shares that start at an AUG with a strong, middling or weak context, and the most that start again after a short frame.

    midpoint: folding energy, kcal/mol, at which half of the ribosomes get through; width: of that transition.
    """

    strong: float = 0.9
    middling: float = 0.5
    weak: float = 0.15
    again: float = 0.4
    midpoint: float = -8.0
    width: float = 3.0


GUIDE, GOLD = Ribosome(), Ribosome(0.8, 0.55, 0.25, 0.25, -7.0, 2.0)
"""The oracle that guides, and one with other constants that measures."""


def sequences(n: int, seed: int) -> Tensor:
    """(n, 50) tokens of the prior, a pure function of n and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(PRIOR), n * LENGTH, replacement=True, generator=generator).reshape(n, LENGTH)


def text(tokens: Tensor) -> list[str]:
    """Letters of tokens (B, L)."""
    return ["".join(ALPHABET[i] for i in row) for row in tokens.tolist()]


def _start_share(mrna: str, at: int, how: Ribosome) -> float:
    """The share of scanning ribosomes that start at the AUG at a place: R at -3 and G at +4 are strong, one of them middling."""
    purine = at >= 3 and mrna[at - 3] in "AG"
    g = at + 3 < len(mrna) and mrna[at + 3] == "G"
    return how.strong if purine and g else how.middling if purine or g else how.weak


def scanned(sequence: str, how: Ribosome = GUIDE) -> float:
    """The share of ribosomes that start at the main AUG, by one pass from the 5' end; a start in the main frame counts as the main one."""
    mrna = sequence + _CODING
    main = len(sequence) + _CODING.index("AUG")
    scanning, arrived, at = 1.0, 0.0, 0
    resumed = [0.0] * (len(mrna) + 1)  # ribosomes that scan again from a place on
    while at < main:
        scanning += resumed[at]
        if mrna[at : at + 3] == "AUG":
            begun = scanning * _start_share(mrna, at, how)
            scanning -= begun
            stop = next((i for i in range(at + 3, main, 3) if mrna[i : i + 3] in _STOPS), None)
            if stop is not None and stop + 3 <= main:
                resumed[stop + 3] += (
                    begun * how.again * (1 - 2.0 ** (-(main - stop) / 15))
                )  # it needs time to be ready again
            elif stop is None and (main - at) % 3 == 0:
                arrived += begun
        at += 1
    return arrived + (scanning + resumed[main]) * _start_share(mrna, main, how)


@cache
def _vienna() -> Any:
    if importlib.util.find_spec("RNA") is None:
        raise UserError('Folding RNA needs ViennaRNA, which is not installed: pip install "tropism[rna]".')
    return importlib.import_module("RNA")


@cache
def energy(sequence: str) -> float:
    """Minimum free energy of the 50 bases, kcal/mol, by ViennaRNA. Raises UserError where that is not installed."""
    return _vienna().fold(sequence)[1]


def load(tokens: Tensor, how: Ribosome = GUIDE) -> Tensor:
    """(B,) ribosome load in (0, 1): the share that starts at the main AUG times the share that gets through the fold."""
    return torch.tensor(
        [scanned(s, how) / (1 + 2.718281828459045 ** (-(energy(s) - how.midpoint) / how.width)) for s in text(tokens)],
        dtype=torch.float64,
    )
