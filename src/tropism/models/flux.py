"""FLUX.1: flow matching on a transformer whose guidance is distilled, an input of one forward pass.

Latents are (B, C, h, w) everywhere; they are packed into tokens of 2x2 pixels inside the network call only.
Source: Black Forest Labs, FLUX.1 (2024), https://github.com/black-forest-labs/flux; guidance distillation: On Distillation of Guided
Diffusion Models, arXiv 2210.03142.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.models import schedule
from tropism.models.latent import Latent, wide
from tropism.models.text import Text, TextCond
from tropism.process.gaussian import Flow

T5_TOKENS = 512
SIZE = 128


class Flux(Latent):
    """FluxPipeline: a CLIP text encoder for the pooled text, a T5 for the tokens; no negative prompt."""

    pipelines = ("FluxPipeline",)
    patch = 2
    steps, guidance = 28, 3.5

    def process_of(self, config: Mapping[str, Any], eta: float) -> Flow:
        if not self.network.config.guidance_embeds:  # distilled into few steps as well: FLUX.1-schnell
            self.steps, self.guidance = 4, 1.0
        return replace(schedule.flow(config, eta, patch=self.patch), table="even")

    def _own_size(self) -> tuple[int, int]:
        """The pipeline's own default, whatever the VAE."""
        return SIZE, SIZE

    def rows(self, guidance: float) -> int:
        return 1

    def check_request(self, guidance: float | None, negatives: Sequence[str] = ()) -> None:
        if any(negatives):
            raise UserError(
                "Flux has its guidance distilled into one forward pass, and no place for a negative prompt. Take "
                "the negative prompts out of the prompt file."
            )
        if guidance not in (None, 1) and not self.network.config.guidance_embeds:
            raise UserError(
                f"guidance is {guidance:g}, but {self.source or 'this model'} is distilled and takes none. Use --guidance 1."
            )

    def tokens_of(self, tokenizer: Any) -> int:
        return T5_TOKENS if "T5" in type(tokenizer).__name__ else tokenizer.model_max_length

    def embed(self, pipe: Any, text: str | None) -> Text:
        embedded, pooled, _ = pipe.encode_prompt(text or "", None, device=self.device, max_sequence_length=T5_TOKENS)
        return {"text": embedded, "pooled": pooled}

    def predict(self, x_t: Tensor, t: float | Tensor, cond: TextCond, guidance: float) -> Tensor:
        """The velocity (B, C, h, w) in one forward pass; `guidance` is the distilled model's own input, 3.5 by default."""
        weight = torch.full((len(x_t),), float(guidance), device=x_t.device)
        return self.counted(x_t, t, {**cond.positive, "guidance": weight})

    def denoise(self, x: Tensor, times: Tensor, text: Text) -> Tensor:
        out = self.network(
            hidden_states=pack(x),
            timestep=(times / 1000).to(wide(x.dtype)),
            guidance=text["guidance"] if self.network.config.guidance_embeds else None,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["text"],
            txt_ids=x.new_zeros(text["text"].shape[1], 3),
            img_ids=places(x),
        ).sample
        return unpack(out, x)


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h w / 4, 4 C) of 2x2 pixels."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, h w / 4, 4 C) as latents of the shape of `like`, (B, C, h, w)."""
    b, c, h, w = like.shape
    return tokens.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def places(x: Tensor) -> Tensor:
    """(h w / 4, 3): 0, row and column of every token of latents (B, C, h, w)."""
    down, across = torch.meshgrid(torch.arange(x.shape[2] // 2), torch.arange(x.shape[3] // 2), indexing="ij")
    return torch.stack([torch.zeros_like(down), down, across], -1).reshape(-1, 3).to(x)
