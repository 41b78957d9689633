"""Is it there, and how many are there: rewards on OWLv2's open-vocabulary detections, differentiable in the picture.

A threshold and a non-maximum suppression have no gradient; here both are soft. In every detection i, p_i is the sigmoid of
its logit z_i, s_i = sigmoid((z_i - logit(THRESHOLD)) / SOFTNESS) says whether it counts, and

    count = sum_i s_i * prod over j ranked above i of (1 - s_j * g(IoU_ij)),   g(u) = sigmoid((u - OVERLAP) / SHARPNESS).

Ranks and boxes carry no gradient: a count should change by what is seen, not by boxes that slide apart. Among n copies
of one box the sum is 1 - (1 - s)^n: the chance that one of them counts. Suppressing by p_j instead would count a faint
thing 1 / p times. The threshold stands in logits and not in p, because the thousands of detections of background, each
at p = .01, would add up otherwise (tests/rewards/test_objects.py).
Source: Scaling Open-Vocabulary Object Detection, arXiv 2306.09683 (OWLv2); Soft-NMS, arXiv 1704.04503; the rest is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.asked import wanted_of
from tropism.rewards.clip import pooled
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.owl_pixels import owl_pixels
from tropism.rewards.sources import NOT_CONFIRMED, About, configuration, pretrained, tokenizer_of

SOURCE = "google/owlv2-base-patch16-ensemble"
THRESHOLD, SOFTNESS = 0.2, 0.25  # a probability; logits
OVERLAP, SHARPNESS = 0.5, 0.05  # of the intersection over the union
LIMIT = 300  # detections that are compared with each other; OWLv2 makes thousands


class Detector:
    """A frozen Owlv2ForObjectDetection with its tokenizer: logits and boxes of what a few words name."""

    def __init__(self, model: Any, tokenizer: Any):
        self.frozen, self.tokenizer = Frozen(model), tokenizer
        self.size: int = model.config.vision_config.image_size
        self.longest: int = model.config.text_config.max_position_embeddings
        self._queries: dict[tuple, Tensor] = {}

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] -> features (B, Q, width) and corners (B, Q, 4) as x0, y0, x1, y1 in [0, 1].

        Corners are shares of the longer side, and carry no gradient.
        """
        model = self.frozen.like(images)
        grid, _ = model.image_embedder(pixel_values=owl_pixels(images.to(at_least_float32(images)), self.size))
        seen = grid.flatten(1, 2)
        with torch.no_grad():
            centre, extent = model.box_predictor(seen, grid).split(2, -1)
        return seen, torch.cat([centre - extent / 2, centre + extent / 2], -1)

    def logits(self, seen: Tensor, thing: str) -> Tensor:
        """features (Q, width) -> logits (Q,) of how sure each detection is to be `thing`. Raises UserError if it is long."""
        query = self._query(thing, seen)
        return self.frozen.like(seen).class_predictor(seen[None], query[None, None])[0][0, :, 0]

    @torch.no_grad()
    def _query(self, thing: str, like: Tensor) -> Tensor:
        key = (thing, like.dtype, like.device)
        if key not in self._queries:
            tokens = {name: t.to(like.device) for name, t in self._tokens(thing).items()}
            features = pooled(self.frozen.like(like).owlv2.get_text_features(**tokens))[0]
            self._queries[key] = F.normalize(features, dim=-1)
        return self._queries[key]

    def _tokens(self, thing: str) -> dict[str, Tensor]:
        tokens = self.tokenizer([f"a photo of {'an' if thing[0] in 'aeiou' else 'a'} {thing}"], return_tensors="pt")
        if tokens["input_ids"].shape[1] > self.longest:
            raise UserError(
                f"The object {thing!r} is too long: OWLv2 reads {self.longest} tokens. Name it in fewer words."
            )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def soft_count(logits: Tensor, corners: Tensor) -> Tensor:
    """How many things the detections show: logits (Q,), corners (Q, 4) as x0, y0, x1, y1 -> a scalar, 0 or more.

    Differentiable in the logits; corners and ranks are constants. Only the LIMIT surest are looked at.
    """
    kept = logits.detach().argsort(descending=True, stable=True)[:LIMIT]
    counts = torch.sigmoid((logits[kept] - math.log(THRESHOLD / (1 - THRESHOLD))) / SOFTNESS)
    same = torch.sigmoid((overlaps(corners[kept].detach()) - OVERLAP) / SHARPNESS)
    above = torch.ones_like(same).tril(-1)  # row i: the detections ranked above i
    return (counts * torch.log1p(-counts * same * above * (1 - 1e-6)).sum(1).exp()).sum()


def overlaps(corners: Tensor) -> Tensor:
    """Intersection over union of each box with each: (Q, 4) -> (Q, Q) in [0, 1]."""
    low = torch.maximum(corners[:, None, :2], corners[None, :, :2])
    high = torch.minimum(corners[:, None, 2:], corners[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (corners[:, 2:] - corners[:, :2]).prod(-1)
    return shared / (area[:, None] + area[None] - shared).clamp(min=1e-12)


class Objects:
    """A reward on detections, (B,) <= 0, of what the metadata or the prompt asks for (rewards.asked). Differentiable.

    Count: minus the Huber loss between the soft count and the number wanted. Presence: log probability that the surest
    detection shows the thing, or, where none is wanted, that it does not; a logarithm, because the probability itself is
    flat where nothing is found. Several things add up. Raises UserError for a prompt that names no number of things.
    """

    differentiable = True

    def __init__(self, detector: Detector, name: str, source: str = SOURCE):
        self.detector, self.frozen, self.name = detector, detector.frozen, name
        self.about = About((-math.inf, 0.0), detector.size, NOT_CONFIRMED, source)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        seen, corners = self.detector.look(samples)
        rows = zip(seen, corners, wanted_of(batch), strict=True)
        return torch.stack(
            [
                torch.stack([self.judge(self.detector.logits(s, thing), c, count) for thing, count in wanted]).sum()
                for s, c, wanted in rows
            ]
        )

    def judge(self, logits: Tensor, corners: Tensor, wanted: int) -> Tensor:
        raise NotImplementedError


class ObjectCount(Objects):
    """The reward `count`: -Huber(soft count - wanted), 0 at the number wanted."""

    def counts(self, samples: Tensor, thing: str) -> Tensor:
        """The soft count (B,) of `thing`, 0 or more."""
        seen, corners = self.detector.look(samples)
        return torch.stack([soft_count(self.detector.logits(s, thing), c) for s, c in zip(seen, corners, strict=True)])

    def judge(self, logits: Tensor, corners: Tensor, wanted: int) -> Tensor:
        count = soft_count(logits, corners)
        return -F.huber_loss(count, count.new_tensor(float(wanted)))


class ObjectPresence(Objects):
    """The reward `objects`: the log probability that the surest detection is one, or is none where none is wanted."""

    def judge(self, logits: Tensor, corners: Tensor, wanted: int) -> Tensor:
        surest = logits.max()
        return F.logsigmoid(surest if wanted else -surest)


def load_detector(source: str) -> Detector:
    """The OWLv2 of a folder or hub id, in float32. Raises UserError where none can be read."""
    from transformers import Owlv2ForObjectDetection

    what = "OWLv2 detector"
    configuration(source, ("owlv2",), what, SOURCE)
    model = pretrained(Owlv2ForObjectDetection, source, what, SOURCE)
    return Detector(model, tokenizer_of(source, what, SOURCE))


def object_count(source: str = SOURCE) -> ObjectCount:
    """The reward `count`, or `count:SOURCE` of a folder or hub id."""
    return ObjectCount(load_detector(source), "count" if source == SOURCE else f"count:{source}", source)


def object_presence(source: str = SOURCE) -> ObjectPresence:
    """The reward `objects`, or `objects:SOURCE` of a folder or hub id."""
    return ObjectPresence(load_detector(source), "objects" if source == SOURCE else f"objects:{source}", source)
