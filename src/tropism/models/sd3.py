"""Stable Diffusion 3 and 3.5, and their turbo kin: flow matching on a multimodal transformer, true guidance.

Source: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tropism.models.latent import Latent, wide
from tropism.models.text import Text

T5_TOKENS = 256


class StableDiffusion3(Latent):
    """StableDiffusion3Pipeline: two CLIP text encoders and a T5, which may be left out."""

    pipelines = ("StableDiffusion3Pipeline",)
    patch = 2
    optional = "_3"
    steps, guidance = 28, 7.0

    def _table(self) -> int:
        return self.network.config.pos_embed_max_size * self.patch

    def tokens_of(self, tokenizer: Any) -> int:
        return T5_TOKENS if "T5" in type(tokenizer).__name__ else tokenizer.model_max_length

    def embed(self, pipe: Any, text: str | None) -> Text:
        embedded, _, pooled, _ = pipe.encode_prompt(
            *[text or ""] * 3, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"text": embedded, "pooled": pooled}

    def denoise(self, x: Tensor, times: Tensor, text: Text) -> Tensor:
        return self.network(
            hidden_states=x,
            timestep=times.to(wide(x.dtype)),
            encoder_hidden_states=text["text"],
            pooled_projections=text["pooled"],
        ).sample
