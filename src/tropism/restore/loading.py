"""Pictures for a judge: loaded when their turn comes, one at a time, and never larger than they will be shown."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tropism.restore.pairs import Pair
from tropism.restore.pictures import Picture, read
from tropism.restore.scoring import Triple
from tropism.rewards.pixels import resized

BAND = 4_000_000
"""Pixels of a large picture that become numbers at once."""


class Sources:
    """Loads pairs' pictures. most: pixels of the longest side, beyond which a picture is reduced while it is read.

    notes: what reading changed, by file, for those where it changed something; filled while pictures are loaded.
    """

    def __init__(self, most: int):
        self.most, self.notes, self._lock = most, dict[Path, tuple[str, ...]](), threading.Lock()

    def triples(self, pairs: Iterable[Pair]) -> Iterator[Triple]:
        """(name, result, reference, low resolution) of each pair, the pictures as calls that load them."""
        for pair in pairs:
            low = None if pair.lr is None else partial(self.load, pair.lr)
            yield pair.name, partial(self.load, pair.sr), pair.gt and partial(self.load, pair.gt), low

    def load(self, path: Path) -> Tensor:
        """(1, 3, h, w) float32 in [0, 1]. Raises UserError as `pictures.read` does."""
        with self._lock:  # one decoded picture of 20,000 x 20,000 pixels is enough
            picture = read(path)
            notes, longest = picture.notes, max(picture.height, picture.width)
            if longest > self.most:
                notes = (*notes, f"{longest:,} pixels on the longest side shown as {self.most:,}")
            if notes:
                self.notes[path] = notes
            return reduced(picture, self.most)


def reduced(picture: Picture, most: int) -> Tensor:
    """A picture (1, 3, h, w) with no side above `most` pixels, in the memory of that and a band: as `resized` makes it of the whole."""
    height, width, longest = picture.height, picture.width, max(picture.height, picture.width)
    if longest <= most:
        return picture.whole()
    h, w = (max(1, round(n * most / longest)) for n in (height, width))
    rows = max(1, BAND // width)
    narrow = [
        resized(picture.window(y, 0, min(rows, height - y), width), min(rows, height - y), w)
        for y in range(0, height, rows)
    ]
    return resized(torch.cat(narrow, 2), h, w)
