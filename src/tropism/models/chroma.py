"""Chroma: FLUX.1-schnell's network without its pooled text, trained for true guidance; one T5 text encoder with a mask.

Latents are (B, C, h, w) everywhere; they are packed as in `flux.py` inside the network call only.
Source: lodestone-rock, Chroma (2025), https://huggingface.co/lodestones/Chroma1-HD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tropism.models import schedule
from tropism.models.flux import SIZE, T5_TOKENS, pack, places, unpack
from tropism.models.latent import Latent, wide
from tropism.models.text import Text
from tropism.process.gaussian import Flow


class Chroma(Latent):
    """ChromaPipeline: the mask is 1 on a text's tokens and the first padding after them, as its pipeline makes it."""

    pipelines = ("ChromaPipeline",)
    patch = 2
    steps, guidance = 35, 5.0
    _mask: Tensor

    def process_of(self, config: Mapping[str, Any], eta: float) -> Flow:
        return replace(schedule.flow(config, eta, patch=self.patch), table="even")

    def _own_size(self) -> tuple[int, int]:
        """The pipeline's own default, whatever the VAE."""
        return SIZE, SIZE

    def tokens_of(self, tokenizer: Any) -> int:
        return T5_TOKENS

    def embed(self, pipe: Any, text: str | None) -> Text:
        embedded, _, mask, *_ = pipe.encode_prompt(
            text or "", do_classifier_free_guidance=False, device=self.device, max_sequence_length=T5_TOKENS
        )
        return {"text": embedded, "mask": mask}

    def denoise(self, x: Tensor, times: Tensor, text: Text) -> Tensor:
        tokens = pack(x)
        # the pipeline's own mask, which diffusers adds to the logits: padding is e times fainter there, not unseen
        self._mask = torch.cat([text["mask"], text["mask"].new_ones(tokens.shape[:2])], 1)
        out = self.network(
            hidden_states=tokens,
            timestep=(times / 1000).to(wide(x.dtype)),
            encoder_hidden_states=text["text"],
            txt_ids=x.new_zeros(text["text"].shape[1], 3),
            img_ids=places(x),
            attention_mask=self._mask,
        ).sample
        return unpack(out, x)

    def _checkpoint(self, module: nn.Module, *inputs: Any) -> Any:
        """Checkpoint one block; diffusers leaves the mask out of its checkpointed call of the single blocks."""
        if type(module).__name__ == "ChromaSingleTransformerBlock" and len(inputs) == 3:
            inputs = *inputs, self._mask
        return super()._checkpoint(module, *inputs)
