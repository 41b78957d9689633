"""Image-text alignment under a CLIP model, differentiable in the picture: cosine, or certainty among rival prompts.

Preprocessing is done in torch: a pass through PIL or 8-bit integers would cut the gradient.
Source: CLIPScore, arXiv 2104.08718 (without its factor 2.5 and its cut at 0); CLIP, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.worlds import shapes, weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Tensor, size: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """What CLIP sees: shorter side to `size` (bicubic, antialiased), centre crop, normalised.

    (B, 3, H, W) in [0, 1] -> (B, 3, size, size). Differentiable; within two grey levels of PIL, which rounds to 8 bits.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        # Two passes, clamped after each as in PIL: bicubic overshoots at edges, and CLIP has never seen that.
        for to in ((height, size * width // short), (size * height // short, size * width // short)):
            images = F.interpolate(images, to, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((n - size) // 2 for n in images.shape[-2:])
    images = images[..., top : top + size, left : left + size]
    return (images - images.new_tensor(mean).reshape(3, 1, 1)) / images.new_tensor(std).reshape(3, 1, 1)


class Clip:
    """A frozen CLIPModel with its tokenizer: unit embeddings of pictures and of prompts. `width` is their length."""

    def __init__(self, model: Any, tokenizer: Any, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD):
        self.frozen, self.tokenizer, self.mean, self.std = Frozen(model), tokenizer, mean, std
        self.size: int = model.config.vision_config.image_size
        self.width: int = model.config.projection_dim
        self.longest: int = model.config.text_config.max_position_embeddings
        self._texts: dict[tuple, Tensor] = {}

    def images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> unit embeddings (B, width), differentiable."""
        pixels = clip_pixels(images.to(at_least_float32(images)), self.size, self.mean, self.std)
        return F.normalize(pooled(self.frozen.like(images).get_image_features(pixel_values=pixels)), dim=-1)

    def texts(self, prompts: list[str], like: Tensor) -> Tensor:
        """Unit embeddings (B, width) of prompts, without gradient, on `like`'s device and in its precision; cached.

        Raises UserError for a prompt longer than the text encoder reads.
        """
        return torch.stack([self._text(p, like) for p in prompts])

    @torch.no_grad()
    def _text(self, prompt: str, like: Tensor) -> Tensor:
        # One prompt a call: its bits must not depend on its company, for a resumed run starts with an empty cache.
        key = (prompt, at_least_float32(like), like.device)
        if key not in self._texts:
            tokens = {name: t.to(like.device) for name, t in self.tokens(prompt).items()}
            features = pooled(self.frozen.like(like).get_text_features(**tokens))
            self._texts[key] = F.normalize(features, dim=-1)[0]
        return self._texts[key]

    def tokens(self, prompt: str) -> dict[str, Tensor]:
        """input_ids and attention_mask (1, length) of one prompt. Raises UserError above what this CLIP reads."""
        tokens = self.tokenizer([prompt], return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        if length > self.longest:
            raise UserError(
                f"The prompt {prompt[:60]!r}... has {length} tokens; this CLIP reads {self.longest} and "
                "would ignore the rest. Shorten the prompt."
            )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def pooled(features: Any) -> Tensor:
    """transformers 4 returns the embedding itself, transformers 5 an output that holds it."""
    return features if isinstance(features, Tensor) else features.pooler_output


Contrast = Callable[[str], list[list[str]]]


class ClipScore:
    """The reward cos(picture, prompt), (B,) in [-1, 1]; with `contrast`, a sum of log-probabilities, (B,) below 0.

    contrast: prompt -> groups of prompts it must not be taken for, one group for each thing that could be wrong. The reward
    is then the sum over groups of log softmax(scale * cosine) at the prompt, among itself and the group: it points only at
    what tells the prompt from its rivals and goes flat where that is certain, while a cosine can rise for ever.
    scale: CLIP's logit scale, or less for a softer reward. Differentiable.
    Source: zero-shot classification, arXiv 2103.00020, section 3.1.2.
    """

    differentiable = True

    def __init__(self, clip: Clip, name: str = "clip", contrast: Contrast | None = None, scale: float = 100.0):
        self.clip, self.name, self.contrast, self.scale = clip, name, contrast, scale

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that is too long or has no contrast, before anything is drawn."""
        for prompt in prompts:
            self.clip.tokens(prompt)
            if self.contrast is not None:
                self.contrast(prompt)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        seen = self.clip.images(samples)
        cosine = (seen * self.clip.texts(batch.prompts, samples)).sum(-1)
        if self.contrast is None:
            return cosine
        rows = zip(seen, cosine, map(self.contrast, batch.prompts), strict=True)
        return torch.stack([self._certainty(*row) for row in rows])

    def _certainty(self, one: Tensor, cosine: Tensor, groups: list[list[str]]) -> Tensor:
        rivals = [torch.logsumexp(self.scale * (self.clip.texts(group, one) @ one), 0) for group in groups]
        return -F.softplus(torch.stack(rivals) - self.scale * cosine).sum()


@lru_cache(maxsize=2)
def load_clip(source: str) -> Clip:
    """The CLIP of a transformers folder or hub id, in float32. Raises UserError where none can be read."""
    from transformers import AutoTokenizer, CLIPModel  # slow to import, and most rewards do without

    try:
        model = CLIPModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{source}' holds no CLIP model with a tokenizer: {str(error).splitlines()[0]} "
            "Give a folder saved by transformers' CLIPModel, or a hub id such as "
            "openai/clip-vit-base-patch32."
        ) from error
    return Clip(model, tokenizer, *_normalisation(source))


def _normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std from the folder's preprocessor file; OpenAI's where it has none."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(source)
    except OSError:
        settings = {}
    return tuple(settings.get("image_mean", MEAN)), tuple(settings.get("image_std", STD))


def clip_score(source: str) -> ClipScore:
    """The reward `clip:SOURCE` of a transformers folder or hub id."""
    return ClipScore(load_clip(source), f"clip:{source}")


def _neighbours(prompt: str) -> list[list[str]]:
    try:
        return shapes.neighbours(prompt)
    except ValueError as error:
        raise UserError(f"shapes-alignment cannot tell what else the prompt might have asked for: {error}") from error


def shapes_alignment() -> ClipScore:
    """The reward `shapes-alignment`: how sure the shapes world's bundled CLIP is of each of the prompt's attributes.

    Its measure is worlds.shapes.accuracy, "all". Raises UserError for a prompt of another world.
    """
    return ClipScore(load_clip(str(weights.path("shapes/clip"))), "shapes-alignment", _neighbours, 20.0)
