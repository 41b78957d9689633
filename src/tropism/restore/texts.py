"""How far the text in a restored picture is from that in its reference, as any reader reads it. For evaluation: no gradient.

Source: Binary codes capable of correcting deletions, insertions and reversals, Levenshtein 1966.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tropism.core import UserError


def edit_distance(a: str, b: str) -> int:
    """The fewest letters to insert, drop or replace that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def text_distance(read: Callable[[Tensor], str], pictures: Tensor, references: Tensor) -> Tensor:
    """(B,) float64, 0 or more: edits from the reference's text, a letter of the longer of the two texts; 0 where both have none.

    At most 1. read: a picture (3, H, W) in [0, 1] -> its text. pictures, references: (B, 3, H, W) in [0, 1]. White space counts as one
    space, letters by their case. Raises UserError where the reader returns anything but a text.
    """
    both = zip(pictures.detach(), references.detach(), strict=True)
    return torch.tensor([_share(_read(read, a), _read(read, b)) for a, b in both], dtype=torch.float64)


def _share(a: str, b: str) -> float:
    return edit_distance(a, b) / max(len(a), len(b), 1)


def _read(read: Callable[[Tensor], str], picture: Tensor) -> str:
    text = read(picture)
    if not isinstance(text, str):
        raise UserError(
            f"The reader of text returned {type(text).__name__}; it must return a str, '' for a picture without text."
        )
    return " ".join(text.split())
