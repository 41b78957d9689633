"""Measures of a restored picture against its reference by name, as columns of a table: pixels, features, segments, boxes, text.

None of them has a gradient here; `feature-distance` and `lpips-like` are also rewards of the same names, which have one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropism import plugin
from tropism.core import UserError
from tropism.restore import detections, fidelity, segments, texts
from tropism.rewards.feature_distance import FeatureDistance, feature_distance, lpips_like
from tropism.rewards.frozen import Frozen

Measure = Callable[[Tensor, Tensor], Tensor]
"""Pictures and references (B, 3, H, W) in [0, 1] -> (B,)."""


@dataclass(frozen=True)
class Proxy:
    """A measure, and whether more of it means a picture nearer to its reference."""

    name: str
    higher_is_better: bool
    measure: Measure

    @torch.no_grad()
    def __call__(self, pictures: Tensor, references: Tensor) -> Tensor:
        """(B,) of pictures and references (B, 3, H, W) in [0, 1]; without gradient. Infinite where the measure is (psnr of equals)."""
        return self.measure(*fidelity.compared(pictures, references))


def features(distance: FeatureDistance) -> Proxy:
    """The proxy of a distance that was made in Python."""
    return Proxy(distance.name, False, distance.distance)


def proxy(text: str) -> Proxy:
    """The proxy of a name: psnr, ssim, feature-distance, lpips-like, segments and boxes (each with :SOURCE), text:FILE.py:FUNCTION, or,
    where these packages and torchvision are installed, lpips and piq:NAME. Raises UserError for another name, and as the loaders do.
    """
    kind = text.partition("?")[0].partition(":")[0]
    rest = text.removeprefix(kind).removeprefix(":")
    if text in _PIXELS:
        return Proxy(text, True, _PIXELS[text])
    if kind in _NETWORKS and text != f"{kind}:":
        better, make = _NETWORKS[kind]
        return Proxy(text, better, make(rest) if rest else make())
    if kind == "text" and rest:
        return Proxy(text, False, partial(texts.text_distance, plugin.load_object(rest)))
    if text == "lpips":
        return Proxy(text, False, _lpips())
    if kind == "piq" and rest in _PIQ:
        return Proxy(text, _PIQ[rest], _piq(rest))
    known = [*_PIXELS, *_NETWORKS, "text:FILE.py:FUNCTION", "lpips", *(f"piq:{name}" for name in _PIQ)]
    near = get_close_matches(text, known, n=1)
    raise UserError(
        f"There is no proxy '{text}'. {f'Did you mean {near[0]}? ' if near else ''}Known are {', '.join(known)}."
    )


def _mean_iou(*source: str) -> Measure:
    found = segments.segmenter(*source)
    return lambda x, y: found.agreement(x, y)["mean_iou"]


def _invented(*source: str) -> Measure:
    found = detections.detector(*source)
    return lambda x, y: torch.tensor([a.invented for a in found.agreement(x, y)], dtype=torch.float64)


_PIXELS: dict[str, Measure] = {"psnr": fidelity.psnr, "ssim": fidelity.ssim}
_NETWORKS: dict[str, tuple[bool, Callable[..., Measure]]] = {
    "feature-distance": (False, lambda *source: feature_distance(*source).distance),
    "lpips-like": (False, lambda *source: lpips_like(*source).distance),
    "segments": (True, _mean_iou),
    "boxes": (False, _invented),
}
"""By name: whether higher is better, and what makes the measure of a source, or without one of the published weights."""


# ---------------------------------------------------------------------------------------------------- other packages

_PIQ = {"fsim": True, "vif_p": True, "haarpsi": True, "multi_scale_ssim": True, "gmsd": False, "mdsi": False}
"""piq's functions (x, y, data_range, reduction) that need no network, and whether higher is better."""


def _lpips() -> Measure:
    """LPIPS of version 0.1 on AlexNet, of the package lpips, whose network is fetched by torchvision. Raises UserError without either."""
    frozen = Frozen(_package("lpips").LPIPS(net="alex", verbose=False))
    return lambda x, y: frozen.like(x)(2 * x - 1, 2 * y - 1).flatten()


def _piq(name: str) -> Measure:
    function = getattr(_package("piq"), name)
    return lambda x, y: function(x.clamp(0, 1), y.clamp(0, 1), data_range=1.0, reduction="none")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"The proxy {name} needs the package {name}, which needs torchvision, and it cannot be imported ({error}). Tropism installs "
            "neither. Use lpips-like, ssim or psnr, or install both for the torch that you have."
        ) from error
