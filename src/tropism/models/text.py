"""Prompts as a latent model's network reads them: each text embedded once, alone, and kept; encoders read late and freed early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.quiet import quiet

Text = dict[str, Tensor]
"""What a network reads of one prompt, (1, ...) by name, or of B prompts, (B, ...)."""
ROOM = 8 * 2**30
"""Bytes of embedded prompts that are kept; with more prompts than fit the text encoders stay."""


@dataclass(frozen=True)
class TextCond:
    """Embedded prompts, positive and negative, each {name: (B, ...)}, and one sample's latent shape (C, H/f, W/f)."""

    positive: Text
    negative: Text
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> TextCond:
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, dtype=torch.long, device=next(iter(self.positive.values())).device)
        return TextCond(
            {k: v[rows] for k, v in self.positive.items()}, {k: v[rows] for k, v in self.negative.items()}, self.shape
        )


class Texts:
    """The embeddings of all texts asked for so far. None stands for the absence of a negative prompt."""

    def __init__(self, embed: Callable[[Any, str | None], Text], read: Callable[[], Any] | None, pipe: Any = None):
        """embed: (pipeline with text encoders, text) -> Text. read: how to get that pipeline; pipe: the one that is there."""
        self._embed, self._read, self._pipe = embed, read, pipe
        self._kept: dict[str | None, Text] = {}

    @property
    def encoders(self) -> Any:
        """The plain pipeline with the text encoders, read when first needed."""
        if self._pipe is None:
            if self._read is None:
                raise UserError(
                    "The text encoders were freed, and nothing says where to read them again. Prepare all prompts at once."
                )
            self._pipe = self._read()
        return self._pipe

    @torch.no_grad()
    def of(self, text: str | None) -> Text:
        """One text's embedding, (1, ...) on the CPU, computed alone, so that its bits do not depend on its company."""
        if text in self._kept:
            return self._kept[text]
        encoders = self.encoders
        with quiet():  # of a text that is cut off the run has its own remark
            found = {k: v.cpu() for k, v in self._embed(encoders, text).items()}
        if _bytes(found) * (len(self._kept) + 1) < ROOM:
            self._kept[text] = found
        return found

    def stacked(self, texts: Sequence[str | None], device: torch.device) -> Text:
        """The embeddings of B texts, (B, ...) by name."""
        each = [self.of(text) for text in texts]
        return {k: torch.cat([e[k] for e in each]).to(device) for k in each[0]}

    def prepare(self, texts: Sequence[str | None]) -> bool:
        """Embed all texts and free the encoders; False, and they stay, if the embeddings would need more than ROOM."""
        distinct = dict.fromkeys([None, *texts])
        if _bytes(self.of(None)) * len(distinct) >= ROOM:
            return False
        for text in distinct:
            self.of(text)
        self._pipe = None
        return True

    def too_long(self, prompts: Sequence[str], limit: Callable[[Any], int]) -> list[str]:
        """The prompts that have more tokens than any of the encoders reads; limit: tokenizer -> its tokens at most."""
        parts = self.encoders.components.items()
        readers = [part for name, part in parts if name.startswith("tokenizer") and part is not None]
        too_long = lambda reader, text: len(reader(text, verbose=False).input_ids) > limit(reader)
        return [text for text in prompts if all(too_long(reader, text) for reader in readers)]


def _bytes(text: Text) -> int:
    return sum(v.numel() * v.element_size() for v in text.values())
