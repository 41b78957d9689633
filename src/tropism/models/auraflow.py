"""AuraFlow, and what is built on it (Pony v7): flow matching on a transformer, one T5 text encoder, true guidance.

Source: Fal, AuraFlow (2024), https://huggingface.co/fal/AuraFlow-v0.3.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tropism.models.latent import Latent, wide
from tropism.models.text import Text

TOKENS = 256
SIZE = 128


class AuraFlow(Latent):
    """AuraFlowPipeline: times are told in [0, 1], padded tokens are zeros."""

    pipelines = ("AuraFlowPipeline",)
    patch = 2
    steps, guidance = 50, 3.5

    def _own_size(self) -> tuple[int, int]:
        """The pipeline's own default, whatever the network's."""
        side = min(SIZE, self._table())
        return side, side

    def _table(self) -> int:
        """Its table is a square of so many places in all."""
        return math.isqrt(self.network.config.pos_embed_max_size) * self.patch

    def tokens_of(self, tokenizer: Any) -> int:
        return TOKENS

    def embed(self, pipe: Any, text: str | None) -> Text:
        embedded, *_ = pipe.encode_prompt(
            text or "", do_classifier_free_guidance=False, device=self.device, max_sequence_length=TOKENS
        )
        return {"text": embedded}

    def denoise(self, x: Tensor, times: Tensor, text: Text) -> Tensor:
        return self.network(x, encoder_hidden_states=text["text"], timestep=(times / 1000).to(wide(x.dtype))).sample
