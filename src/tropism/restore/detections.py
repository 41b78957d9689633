"""What a detector finds in a restored picture and not in its reference, the other way round, and as something else. No gradient.

Boxes are matched greedily, the largest overlap first, from .5 on. A matched pair of two classes is a swap, a box that only the restored
picture has an insertion, one that only the reference has an omission; swaps and insertions are invented.
Source: The PASCAL Visual Object Classes Challenge, Everingham et al. 2010, section 4.2 (overlap above .5); the rest is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.objects import overlaps
from tropism.rewards.pixels import Preparation, published
from tropism.rewards.sources import configuration, pretrained, unreadable

SOURCE = "hustvl/yolos-small"
USUAL = Preparation((512,), mode="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OVERLAP, SURE = 0.5, 0.5


@dataclass(frozen=True)
class Detections:
    """Of one picture: boxes (N, 4) as x0, y0, x1, y1 in one unit, and their class numbers (N,)."""

    boxes: Tensor
    labels: Tensor

    def __post_init__(self):
        count = len(self.labels)
        if self.labels.ndim != 1 or tuple(self.boxes.shape) != (count, 4):
            raise UserError(
                f"Boxes {tuple(self.boxes.shape)} and labels {tuple(self.labels.shape)}; they must be (N, 4) and (N,). Without any: (0, 4)."
            )


@dataclass(frozen=True)
class Agreement:
    """How many boxes are the same in both pictures, and how many were swapped, inserted and left out."""

    same: int
    swaps: int
    insertions: int
    omissions: int

    @property
    def invented(self) -> int:
        return self.swaps + self.insertions


def agreement(found: Detections, wanted: Detections, overlap: float = OVERLAP) -> Agreement:
    """The boxes of a restored picture against those of its reference. overlap: intersection over union of a match, above 0 and at most 1.

    Of equal overlaps those of one class go first, then in the order of the boxes. Raises UserError for another overlap.
    """
    if not 0 < overlap <= 1:
        raise UserError(f"overlap is {overlap:g}; it must be above 0 and at most 1. Try {OVERLAP}.")
    n, m = len(found.labels), len(wanted.labels)
    shared = overlaps(torch.cat([found.boxes, wanted.boxes.to(found.boxes)]))[:n, n:].tolist()
    alike = (found.labels[:, None] == wanted.labels[None].to(found.labels)).tolist()
    pairs = [(-shared[i][j], not alike[i][j], i, j) for i in range(n) for j in range(m) if shared[i][j] >= overlap]
    mine, theirs, same = set[int](), set[int](), 0
    for _, other, i, j in sorted(pairs):
        if i not in mine and j not in theirs:
            mine.add(i)
            theirs.add(j)
            same += not other
    return Agreement(same, len(mine) - same, n - len(mine), m - len(theirs))


class Detector:
    """A frozen detector of transformers that finds one class a query and needs no suppression (DETR and YOLOS)."""

    def __init__(self, model: Any, prepare: Preparation = USUAL, sure: float = SURE):
        self.frozen, self.prepare, self.sure = Frozen(model), prepare, sure

    @torch.no_grad()
    def detections(self, images: Tensor) -> list[Detections]:
        """Pictures (B, 3, H, W) in [0, 1] -> of each the boxes in pixels that are more probable than `sure`."""
        pixels = self.prepare(images.to(at_least_float32(images)))
        out = self.frozen.like(images)(pixel_values=pixels)
        surest, labels = out.logits.softmax(-1)[..., :-1].max(-1)  # the last class is "nothing"
        centre, extent = out.pred_boxes.split(2, -1)
        height, width = images.shape[-2:]
        corners = torch.cat([centre - extent / 2, centre + extent / 2], -1) * centre.new_tensor([width, height] * 2)
        return [Detections(c[p > self.sure], n[p > self.sure]) for c, n, p in zip(corners, labels, surest, strict=True)]

    def agreement(self, pictures: Tensor, references: Tensor) -> list[Agreement]:
        """One a picture, of pictures and references (B, 3, H, W) in [0, 1]."""
        both = zip(self.detections(pictures), self.detections(references), strict=True)
        return [agreement(found, wanted) for found, wanted in both]


def detector(source: str = SOURCE) -> Detector:
    """The detector of a folder or hub id: YOLOS or DETR. Raises UserError where none can be read."""
    from transformers import AutoModelForObjectDetection

    what = "object detector"
    configuration(source, ("yolos", "detr"), what, SOURCE)
    try:
        model = pretrained(AutoModelForObjectDetection, source, what, SOURCE)
    except ImportError as error:  # some DETRs have a backbone of timm
        raise unreadable(source, what, error, SOURCE) from error
    return Detector(model, published(source, USUAL))
