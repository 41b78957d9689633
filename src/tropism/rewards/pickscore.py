"""PickScore: a CLIP tuned on half a million choices between two pictures of one prompt.

Source: Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation, arXiv 2305.01569, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.core import Batch
from tropism.rewards.clip import Clip, load_clip
from tropism.rewards.sources import NOT_CONFIRMED, About

SOURCE = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the processor that its authors name


class PickScore:
    """The reward exp(logit scale) * cos(picture, prompt), (B,), about 18 to 24 for drawings of a prompt. Differentiable.

    The scale is the model's own; a difference d between two pictures is a choice of the first with odds exp(d).
    """

    differentiable = True

    def __init__(self, clip: Clip, name: str = "pickscore", source: str = SOURCE):
        self.clip, self.name = clip, name
        scale = float(clip.frozen.like(torch.zeros(())).logit_scale.exp())
        self.about = About((-scale, scale), clip.size, NOT_CONFIRMED, source)

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that is too long, before anything is drawn."""
        for prompt in prompts:
            self.clip.tokens(prompt)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        scale = self.clip.frozen.like(samples).logit_scale.exp()
        return scale * (self.clip.images(samples) * self.clip.texts(batch.prompts, samples)).sum(-1)


def pick_score(source: str = SOURCE) -> PickScore:
    """The reward `pickscore`, or `pickscore:SOURCE` of a folder or hub id with its own tokenizer. Raises UserError."""
    published = source == SOURCE
    clip = load_clip(source, TOKENIZER if published else "")
    return PickScore(clip, "pickscore" if published else f"pickscore:{source}", source)
