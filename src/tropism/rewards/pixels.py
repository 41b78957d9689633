"""What a published network sees of a picture, in torch: the resize, crop and normalisation of its own processor.

All of it is differentiable; a pass through PIL or 8-bit integers would cut the gradient.
Source: the image processors of Hugging Face transformers with their PIL backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ROUNDING = 1e-5
MODES = {2: "bilinear", 3: "bicubic"}  # by the numbers that PIL gives them


def resized(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, height, width) in [0, 1], antialiased, as PIL does it. Differentiable.

    Two passes, clamped after each as in PIL: bicubic overshoots at edges, and no published network has seen that. Across
    first, unless only the height shrinks: so does Pillow 13; older ones always go across first, which shows at few pixels.
    Up to ROUNDING outside [0, 1]: resampled white is 1 + 1e-7 as often as not, and a clamp at 1 would take its gradient.
    """
    before = images.shape[-2:]
    down_first = height < before[0] and width > before[1]
    for to in ((height, before[1]) if down_first else (before[0], width), (height, width)):
        if to != tuple(images.shape[-2:]):
            images = F.interpolate(images, to, mode=mode, antialias=True).clamp(-ROUNDING, 1 + ROUNDING)
    return images


def normalised(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """(images - mean) / std, channel by channel."""
    return (images - images.new_tensor(mean).reshape(3, 1, 1)) / images.new_tensor(std).reshape(3, 1, 1)


@dataclass(frozen=True)
class Preparation:
    """Pictures (B, 3, H, W) in [0, 1] -> what the network reads, (B, 3, h, w). Within two grey levels of PIL, which rounds.

    resize: (side,) brings the shorter side to it, (height, width) squashes to both, () leaves the size alone.
    crop: (height, width) of the centre, () for none.
    """

    resize: tuple[int, ...]
    crop: tuple[int, ...] = ()
    mode: str = "bicubic"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, images: Tensor) -> Tensor:
        return normalised(
            self._cropped(resized(images, *self._target(*images.shape[-2:]), self.mode)), self.mean, self.std
        )

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if len(self.resize) == 1:
            short = min(height, width)
            return self.resize[0] * height // short, self.resize[0] * width // short
        return (self.resize[0], self.resize[1]) if self.resize else (height, width)

    def _cropped(self, images: Tensor) -> Tensor:
        if not self.crop:
            return images
        top, left = ((n - keep) // 2 for n, keep in zip(images.shape[-2:], self.crop, strict=True))
        assert min(top, left) >= 0, "a crop larger than the resized picture"
        return images[..., top : top + self.crop[0], left : left + self.crop[1]]


def published(source: str, otherwise: Preparation) -> Preparation:
    """The preparation that a folder's or hub id's preprocessor file asks for; `otherwise` where it has none, or for gaps.

    Raises UserError for a resampling that is neither bilinear nor bicubic.
    """
    settings = processor_settings(source)
    mode = MODES.get(settings.get("resample", 3 if otherwise.mode == "bicubic" else 2))
    if mode is None:
        raise UserError(
            f"'{source}' asks for PIL's resampling {settings['resample']}; Tropism has 2 (bilinear) and 3 (bicubic). "
            'Set "resample": 3 in its preprocessor_config.json.'
        )
    resize = _sides(settings["size"]) if "size" in settings else otherwise.resize
    crop = _sides(settings["crop_size"]) * 2 if settings.get("crop_size") else otherwise.crop
    return Preparation(
        resize if settings.get("do_resize", True) else (),
        crop[:2] if settings.get("do_center_crop", bool(otherwise.crop)) else (),
        mode,
        tuple(settings.get("image_mean") or otherwise.mean),
        tuple(settings.get("image_std") or otherwise.std),
    )


def processor_settings(source: str) -> dict[str, Any]:
    """The preprocessor file of a folder or hub id as a dict; empty where there is none."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        return BaseImageProcessor.get_image_processor_dict(source)[0]
    except OSError:
        return {}


def _sides(size: Any) -> tuple[int, ...]:
    """`size` in any of its spellings -> (shorter side,) or (height, width)."""
    if isinstance(size, int):
        return (size,)
    return (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],)
