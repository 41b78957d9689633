"""Image-text alignment under a CLIP or SigLIP model, differentiable in the picture: cosine, or certainty among rivals.

Source: CLIPScore, arXiv 2104.08718 (without its factor 2.5 and its cut at 0); CLIP, arXiv 2103.00020; SigLIP, arXiv
2303.15343; SigLIP 2, arXiv 2502.14786 (its models of fixed size).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.pixels import MEAN, STD, Preparation, published
from tropism.rewards.sources import OWN, About, configuration, pretrained, tokenizer_of
from tropism.worlds import shapes, weights


def clip_pixels(images: Tensor, size: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """What CLIP sees: shorter side to `size` (bicubic, antialiased), centre crop, normalised.

    (B, 3, H, W) in [0, 1] -> (B, 3, size, size). Differentiable; within two grey levels of PIL, which rounds to 8 bits.
    """
    return Preparation((size,), (size, size), mean=mean, std=std)(images)


def usual_preparation(config: Any) -> Preparation:
    """What a model of this configuration sees if no file says otherwise: SigLIP squashes to a square, CLIP crops."""
    size = config.vision_config.image_size
    if config.model_type == "siglip":
        return Preparation((size, size), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Preparation((size,), (size, size))


class Clip:
    """A frozen CLIPModel or SiglipModel with its tokenizer: unit embeddings of pictures and of prompts.

    `width` is their length, `size` the side in pixels that the model sees, `longest` the tokens that it reads.
    prepare: pictures (B, 3, H, W) in [0, 1] -> (B, 3, size, size); by default what the model's family does.
    """

    def __init__(self, model: Any, tokenizer: Any, prepare: Callable[[Tensor], Tensor] | None = None):
        self.frozen, self.tokenizer = Frozen(model), tokenizer
        self.prepare = prepare or usual_preparation(model.config)
        self.sigmoid = model.config.model_type == "siglip"
        text = model.config.text_config
        self.size: int = model.config.vision_config.image_size
        self.width: int = text.projection_size if self.sigmoid else model.config.projection_dim
        self.longest: int = text.max_position_embeddings
        self._texts: dict[tuple, Tensor] = {}

    def images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> unit embeddings (B, width), differentiable."""
        pixels = self.prepare(images.to(at_least_float32(images)))
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
        """input_ids (1, length) of one prompt, for CLIP with its mask. Raises UserError above what this model reads."""
        if self.sigmoid:  # trained on lower case, padded to full length, the padding seen: the last place is pooled
            tokens = self.tokenizer(
                [prompt.lower()], padding="max_length", max_length=self.longest, return_tensors="pt"
            )
        else:
            tokens = self.tokenizer([prompt], return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        if length > self.longest:
            raise UserError(
                f"The prompt {prompt[:60]!r}... has {length} tokens; this CLIP reads {self.longest} and "
                "would ignore the rest. Shorten the prompt."
            )
        return {name: tokens[name] for name in (("input_ids",) if self.sigmoid else ("input_ids", "attention_mask"))}


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

    def __init__(
        self,
        clip: Clip,
        name: str = "clip",
        contrast: Contrast | None = None,
        scale: float = 100.0,
        about: About | None = None,
    ):
        self.clip, self.name, self.contrast, self.scale, self.about = clip, name, contrast, scale, about

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


WHAT, EXAMPLE = "CLIP model", "openai/clip-vit-base-patch32"


@lru_cache(maxsize=2)
def load_clip(source: str, tokenizer: str = "") -> Clip:
    """The CLIP or SigLIP of a transformers folder or hub id, in float32, prepared for as its own files say.

    tokenizer: the folder or hub id of the tokenizer, if it is not `source`. Raises UserError where none can be read, and
    for SigLIP 2's NaFlex models, which see pictures as patches of any number.
    """
    from transformers import CLIPModel, SiglipModel  # slow to import, and most rewards do without

    config = configuration(source, ("clip", "siglip"), WHAT, EXAMPLE)
    model = pretrained(SiglipModel if config.model_type == "siglip" else CLIPModel, source, WHAT, EXAMPLE)
    words = tokenizer_of(tokenizer or source, WHAT, EXAMPLE)
    return Clip(model, words, published(source, usual_preparation(config)))


def clip_score(source: str) -> ClipScore:
    """The reward `clip:SOURCE` of a transformers folder or hub id of a CLIP or SigLIP model."""
    clip = load_clip(source)
    about = About((-1.0, 1.0), clip.size, "that of the model given", source)
    return ClipScore(clip, f"clip:{source}", about=about)


def _neighbours(prompt: str) -> list[list[str]]:
    try:
        return shapes.neighbours(prompt)
    except ValueError as error:
        raise UserError(f"shapes-alignment cannot tell what else the prompt might have asked for: {error}") from error


def shapes_alignment() -> ClipScore:
    """The reward `shapes-alignment`: how sure the shapes world's bundled CLIP is of each of the prompt's attributes.

    Its measure is worlds.shapes.accuracy, "all". Raises UserError for a prompt of another world.
    """
    clip = load_clip(str(weights.path("shapes/clip")))
    about = About((-math.inf, 0.0), clip.size, OWN, "bundled")
    return ClipScore(clip, "shapes-alignment", _neighbours, 20.0, about)
