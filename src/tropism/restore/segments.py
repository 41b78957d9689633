"""How far a segmenter sees the same things at the same places in a restored picture and in its reference. For evaluation: no gradient.

Source: Fully Convolutional Networks for Semantic Segmentation, arXiv 1411.4038, section 5 (pixel accuracy and mean IU).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.pixels import Preparation, published
from tropism.rewards.sources import configuration, pretrained

SOURCE = "nvidia/segformer-b0-finetuned-ade-512-512"
USUAL = Preparation((512, 512), mode="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def pixel_agreement(found: Tensor, wanted: Tensor) -> Tensor:
    """(B,) float64 in [0, 1]: the share of pixels with the same class, of class numbers (B, H, W). Raises UserError for another shape."""
    _same(found, wanted)
    return (found == wanted).double().flatten(1).mean(1)


def mean_iou(found: Tensor, wanted: Tensor) -> Tensor:
    """(B,) float64 in [0, 1]: intersection over union, averaged over the classes that a picture or its reference has.

    found, wanted: class numbers (B, H, W), 0 or more. Classes that are in neither do not count. Raises UserError for another shape.
    """
    _same(found, wanted)
    return torch.stack([_iou(a.flatten(), b.flatten()) for a, b in zip(found, wanted, strict=True)])


def _iou(a: Tensor, b: Tensor) -> Tensor:
    names, at = torch.cat([a, b]).unique(return_inverse=True)
    a, b = at.split(len(a))
    count = lambda x: torch.bincount(x, minlength=len(names)).double()
    both = count(a[a == b])
    return (both / (count(a) + count(b) - both)).mean()


def _same(found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape or found.ndim != 3 or not found.numel():
        raise UserError(
            f"Segmentations {tuple(found.shape)} and {tuple(wanted.shape)} cannot be compared; both must be (B, H, W) of one size."
        )


class Segmenter:
    """A frozen semantic segmenter of transformers. `agreement` is what is reported."""

    def __init__(self, model: Any, prepare: Preparation = USUAL):
        self.frozen, self.prepare = Frozen(model), prepare

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> class numbers (B, H, W): logits are enlarged to the picture, then the largest is taken."""
        pixels = self.prepare(images.to(at_least_float32(images)))
        logits = self.frozen.like(images)(pixel_values=pixels).logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False).argmax(1)

    def agreement(self, pictures: Tensor, references: Tensor) -> dict[str, Tensor]:
        """{"pixels": (B,), "mean_iou": (B,)} in [0, 1] of pictures and references (B, 3, H, W) in [0, 1]. Raises UserError."""
        found, wanted = self.classes(pictures), self.classes(references)
        return {"pixels": pixel_agreement(found, wanted), "mean_iou": mean_iou(found, wanted)}


def segmenter(source: str = SOURCE) -> Segmenter:
    """The segmenter of a folder or hub id, a SegFormer. Raises UserError where none can be read."""
    from transformers import AutoModelForSemanticSegmentation

    what = "semantic segmenter"
    configuration(source, ("segformer",), what, SOURCE)
    return Segmenter(pretrained(AutoModelForSemanticSegmentation, source, what, SOURCE), published(source, USUAL))
