"""How far a picture is from its reference in the features of a frozen vision tower: the one distance behind all of that kind.

With unit tokens u of the picture and v of the reference at the same place, in one layer,

    cosine 1 - u.v = |u - v|^2 / 2     l2 |u - v|^2     l1 sum |u - v|

then the mean over places, the mean of the worst ones, or the maximum; terms and layers add up. The default is the mean over patches of
the cosine distance plus half that of the class tokens, of DINOv2's last layer.
Source: Hallucination Score, arXiv 2507.14367 (distances of deep features as rewards against invented detail; its own choices are not
published in what could be read, so all are arguments here); The Unreasonable Effectiveness of Deep Features as a Perceptual Metric,
arXiv 1801.03924, eq. 1, with all channel weights 1 (`LPIPS_LIKE`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tropism.core import Batch, UserError
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.pixels import normalised, resized
from tropism.rewards.references import Kept, Reference, check_references, of_tensor, references_of
from tropism.rewards.sources import NOT_CONFIRMED, About
from tropism.rewards.towers import SOURCE, Layer, layer_of, tower_of

MOST_KEPT = 2**29
"""Bytes of reference features that are kept, 512 MiB: some 170 pictures of DINOv2-base's last layer at 448 pixels."""
TOKENS, METRICS, REDUCTIONS = ("both", "patch", "cls", "mean"), ("cosine", "l2", "l1"), ("mean", "topk", "max")
LPIPS_LIKE: dict[str, Any] = {"layers": None, "tokens": "patch", "metric": "l2"}
"""Every layer, every patch, squared differences of unit features, as LPIPS without its learned weights."""


class FeatureDistance:
    """The distance of pictures to their references under a tower (rewards.towers); as a reward minus it, (B,) at most 0. Differentiable.

    layers: by number, 1 the first, -1 the last; None for all. Their distances are added.
    tokens: "patch", one vector a place; "mean", their mean; "cls", the summary; "both", patch plus cls_weight times cls.
    metric: "cosine" in [0, 2]; "l2", squared, in [0, 4]; "l1", a sum over channels. normalise False: l2 and l1 of tokens at full length.
    reduce: over places, "mean", "topk" (the mean of the share `worst` of them, those with the largest distance, at least one) or "max".

    References are batch.reference (B, 3, H, W) in [0, 1], or the files that batch.meta names as "reference"; they are resized to the
    picture's grid and get no gradient, and what the tower saw in them is kept (MOST_KEPT bytes). Raises UserError for choices that do
    not exist or that the tower does not have.
    """

    differentiable = True

    def __init__(
        self,
        tower: nn.Module,
        *,
        layers: Sequence[int] | None = (-1,),
        tokens: Literal["both", "patch", "cls", "mean"] = "both",
        metric: Literal["cosine", "l2", "l1"] = "cosine",
        reduce: Literal["mean", "topk", "max"] = "mean",
        worst: float = 0.1,
        cls_weight: float = 0.5,
        normalise: bool = True,
        name: str = "feature-distance",
        source: str = "a module",
    ):
        _check("tokens", tokens, TOKENS)
        _check("metric", metric, METRICS)
        _check("reduce", reduce, REDUCTIONS)
        if not 0 < worst <= 1:
            raise UserError(
                f"worst is {worst:g}; it is the share of the patches that count, above 0 and at most 1. Try 0.1."
            )
        if not (math.isfinite(cls_weight) and cls_weight >= 0):
            raise UserError(f"cls_weight is {cls_weight:g}; it must be a finite number, 0 or more. Try 0.5.")
        if layers is not None and (not layers or 0 in layers):
            raise UserError(
                f"layers is {list(layers)}; name at least one, from 1 for the first or from -1 for the last."
            )
        self.frozen, self.name = Frozen(tower), name
        self.size: int | None = getattr(tower, "size", None)
        self.patch: int = getattr(tower, "patch", 1)
        self.mean, self.std = getattr(tower, "mean", (0.0,) * 3), getattr(tower, "std", (1.0,) * 3)
        self.layers, self.tokens, self.metric, self.reduce, self.worst = layers, tokens, metric, reduce, worst
        self.unit = normalise or metric == "cosine"
        self.weights = (1.0, cls_weight) if tokens == "both" else (1.0,)
        self._kept = Kept(MOST_KEPT)
        most = {"cosine": 2.0, "l2": 4.0}.get(metric, math.inf) if self.unit else math.inf
        count = math.inf if layers is None else len(layers)
        self.about = About((-most * count * sum(self.weights), 0.0), self.size, NOT_CONFIRMED, source)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return -self._between(samples, references_of(batch, self.name))

    def distance(self, pictures: Tensor, references: Tensor) -> Tensor:
        """(B,), 0 or more, of pictures and references (B, 3, H, W) in [0, 1]; no gradient reaches the references. Raises UserError."""
        return self._between(pictures, [of_tensor(one) for one in references])

    def map(self, pictures: Tensor, references: Tensor) -> Tensor:
        """One distance a patch, (B, p, q), summed over layers, for maps of where the difference lies. Raises UserError without patches.

        With layers of several grids, coarse ones are enlarged to the finest. To lay it over a picture: F.interpolate(map[:, None], (H, W)).
        """
        if self.tokens not in ("both", "patch"):
            raise UserError(f"A map needs patches, and tokens is '{self.tokens}'. Take tokens='patch'.")
        found = self._places(pictures, [of_tensor(one) for one in references])[:: len(self.weights)]
        finest = max((m.shape[-2:] for m in found), key=math.prod)
        return torch.stack([F.interpolate(m[:, None], finest)[:, 0] for m in found]).sum(0)

    def check_meta(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError if a prompt has no reference picture."""
        check_references(self.name, prompts, meta)

    def _between(self, pictures: Tensor, references: list[Reference]) -> Tensor:
        found = self._places(pictures, references)
        each = [self.weights[i % len(self.weights)] * self._reduced(m) for i, m in enumerate(found)]
        return torch.stack(each).sum(0)

    def _places(self, pictures: Tensor, references: list[Reference]) -> list[Tensor]:
        """The distances at every place, one (B, p, q) a layer and term."""
        if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) != len(references):
            raise UserError(
                f"{tuple(pictures.shape)} is compared with {len(references)} references; pictures are (B, 3, H, W), one reference each."
            )
        grid = self._target(*pictures.shape[-2:])
        theirs = [self._of_reference(one, grid, pictures) for one in references]
        return [
            self._compared(mine, torch.cat(rows))
            for mine, rows in zip(self._features(pictures, grid), zip(*theirs, strict=True), strict=True)
        ]

    def _of_reference(self, reference: Reference, grid: tuple[int, int], like: Tensor) -> list[Tensor]:
        # One picture a call: its bits must not depend on its company, for a resumed run starts with an empty store.
        key, picture = reference

        @torch.no_grad()
        def seen() -> list[Tensor]:
            return self._features(picture().to(like)[None], grid)

        return self._kept.get((key, grid, at_least_float32(like), like.device), seen)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """What a picture's sides become: the shorter one `size`, the other in proportion, both multiples of `patch`."""
        scale = self.size / min(height, width) if self.size else 1.0
        h, w = (max(1, round(n * scale / self.patch)) * self.patch for n in (height, width))
        return h, w

    def _features(self, images: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> vectors (B, C, p, q) to compare, one a layer and term; p = q = 1 for cls and mean."""
        pixels = normalised(resized(images.to(at_least_float32(images)), *size), self.mean, self.std)
        found = list(self.frozen.like(images)(pixels))
        return [F.normalize(x, dim=1) if self.unit else x for layer in self._chosen(found) for x in self._terms(layer)]

    def _chosen(self, found: list[Any]) -> list[Layer]:
        numbers = range(1, len(found) + 1) if self.layers is None else self.layers
        for n in numbers:
            if abs(n) > len(found):
                raise UserError(
                    f"There is no layer {n}: the vision tower has {len(found)}. Name one of 1 to {len(found)}."
                )
        return [layer_of(found[n - 1 if n > 0 else n]) for n in numbers]

    def _terms(self, layer: Layer) -> list[Tensor]:
        if self.tokens == "mean":
            return [layer.map.mean((2, 3), keepdim=True)]
        if self.tokens == "patch":
            return [layer.map]
        if layer.summary is None:
            raise UserError(
                f"tokens is '{self.tokens}', and a chosen layer has no class token (SigLIP has a summary in its last layer only, a module "
                "of your own where it returns one). Take tokens='patch'."
            )
        summary = layer.summary[:, :, None, None]
        return [summary] if self.tokens == "cls" else [layer.map, summary]

    def _compared(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """(B, C, p, q) twice -> (B, p, q)."""
        # Not 1 - u.v, which loses half of the digits of a small distance and can come out below 0.
        difference = mine - theirs
        if self.metric == "l1":
            return difference.abs().sum(1)
        return difference.square().sum(1) * (0.5 if self.metric == "cosine" else 1.0)

    def _reduced(self, places: Tensor) -> Tensor:
        """(B, p, q) -> (B,)."""
        flat = places.flatten(1)
        if self.reduce == "mean":
            return flat.mean(1)
        count = 1 if self.reduce == "max" else math.ceil(self.worst * flat.shape[1])
        return flat.topk(count, dim=1).values.mean(1)


def _check(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{what} is {value!r}; it is one of {', '.join(known)}.")


# ---------------------------------------------------------------------------------------------------- by name


def _layers(text: str) -> tuple[int, ...] | None:
    return None if text == "all" else tuple(int(n) for n in text.split("+"))


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]


OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "layers": (_layers, "numbers joined by +, such as 6+12, or all"),
    "tokens": (str, f"one of {', '.join(TOKENS)}"),
    "metric": (str, f"one of {', '.join(METRICS)}"),
    "reduce": (str, f"one of {', '.join(REDUCTIONS)}"),
    "worst": (float, "a number above 0 and at most 1"),
    "cls_weight": (float, "a number, 0 or more"),
    "normalise": (_yes, "yes or no"),
    "size": (int, "a whole number of pixels, a multiple of the patch"),
    "raw": (_yes, "yes or no"),
}
"""Of what follows "?" in a name: how it is read, and what to write."""


def options_of(text: str, name: str) -> dict[str, Any]:
    """The arguments of "KEY=VALUE&KEY=VALUE". Raises UserError for a key or value that does not exist; `name` is the reward's."""
    found = dict[str, Any]()
    for part in text.split("&") if text else []:
        key, _, value = part.partition("=")
        if key not in OPTIONS:
            near = get_close_matches(key, OPTIONS, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{name} has no option {key!r}. {hint}It has {', '.join(OPTIONS)}; write {name}?tokens=patch&reduce=topk."
            )
        read, form = OPTIONS[key]
        try:
            found[key] = read(value)
        except (ValueError, KeyError) as error:
            raise UserError(f"{name} cannot read {key}={value}; it must be {form}.") from error
    return found


def feature_distance(text: str = SOURCE) -> FeatureDistance:
    """The reward `feature-distance`, `feature-distance:SOURCE`, `feature-distance?OPTIONS` or both. Raises UserError.

    SOURCE: a folder or hub id of DINOv2 with or without registers, CLIP or SigLIP. OPTIONS: KEY=VALUE joined by &, the arguments of
    FeatureDistance and of tower_of.
    """
    return _by_name("feature-distance", text, {})


def lpips_like(text: str = SOURCE) -> FeatureDistance:
    """The reward `lpips-like`, the same with the choices of LPIPS_LIKE, which options override. Raises UserError."""
    return _by_name("lpips-like", text, LPIPS_LIKE)


def _by_name(kind: str, text: str, preset: dict[str, Any]) -> FeatureDistance:
    source, question, asked = text.partition("?")
    name = kind + (f":{source}" if source not in ("", SOURCE) else "") + question + asked
    chosen = preset | options_of(asked, kind)
    tower = tower_of(source or SOURCE, chosen.pop("size", None), chosen.pop("raw", False))
    return FeatureDistance(tower, **chosen, name=name, source=source or SOURCE)
