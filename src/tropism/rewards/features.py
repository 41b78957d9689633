"""Likeness to a reference picture: the cosine between two pictures' features under DINOv2.

Source: DINOv2: Learning Robust Visual Features without Supervision, arXiv 2304.07193; the cosine of its class tokens as
in DreamBooth, arXiv 2208.12242, section 4.2, which does it with the first DINO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.pixels import Preparation, published
from tropism.rewards.references import check_references, read_picture
from tropism.rewards.sources import NOT_CONFIRMED, About, configuration, pretrained

SOURCE = "facebook/dinov2-base"
KINDS = ("dinov2", "dinov2_with_registers")
USUAL = Preparation((256,), (224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class FeatureSimilarity:
    """The reward cos(features of the picture, features of its reference picture), (B,) in [-1, 1]; prompts are not read.

    References are batch.reference (B, 3, H, W) in [0, 1], of any size, or else the picture files that batch.meta[i]["reference"]
    names; they get no gradient. Raises UserError where they are missing or cannot be read. Differentiable.
    """

    differentiable = True

    def __init__(self, model: Any, prepare: Preparation = USUAL, name: str = "features", source: str = SOURCE):
        self.frozen, self.prepare, self.name = Frozen(model), prepare, name
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.about = About((-1.0, 1.0), (prepare.crop or prepare.resize)[0], NOT_CONFIRMED, source)

    def features(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> unit class tokens (B, width)."""
        pixels = self.prepare(images.to(at_least_float32(images)))
        return F.normalize(self.frozen.like(images)(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            if batch.reference is not None:
                wanted = self.features(batch.reference.to(samples))
            else:
                self.check_meta(batch.prompts, batch.meta or [{}] * len(batch))
                wanted = torch.stack([self._of_file(str(m["reference"]), samples) for m in batch.meta or []])
        return (self.features(samples) * wanted).sum(-1)

    def check_meta(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError if a prompt has no reference picture."""
        check_references(self.name, prompts, meta)

    def _of_file(self, file: str, like: Tensor) -> Tensor:
        """The features (width,) of a picture's file, kept."""
        key = (file, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = self.features(read_picture(file).to(like)[None])[0]
        return self._kept[key]


def feature_similarity(source: str = SOURCE) -> FeatureSimilarity:
    """The reward `features`, or `features:SOURCE` of a folder or hub id of a DINOv2. Raises UserError."""
    from transformers import AutoModel

    what = "DINOv2 model"
    configuration(source, KINDS, what, SOURCE)
    model = pretrained(AutoModel, source, what, SOURCE)
    name = "features" if source == SOURCE else f"features:{source}"
    return FeatureSimilarity(model, published(source, USUAL), name, source)
