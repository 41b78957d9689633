"""Low-resolution pictures made from good ones, as blind super-resolution is trained: blur, resize, noise and JPEG, twice.

What happens to a picture is drawn first (`drawn`, in restore.options), all of it from (seed, index) alone, and then done, so neither the
batch nor the other pictures change it.

Real-ESRGAN also sharpens the references it trains on; that is left out, since a reward that compares with a sharpened reference
teaches over-sharpening. Its JPEG is a differentiable stand-in with real-valued qualities; ours is Pillow's file (4:2:0), whole qualities.
Source: Real-ESRGAN, Wang et al., arXiv 2107.10833, section 3.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tropism.core import Stream, UserError, generator
from tropism.restore import kernels
from tropism.restore.options import PRESETS, Degradation, Round, Stage, drawn, preset

__all__ = ["PRESETS", "Degradation", "Stage", "degraded", "drawn", "gaussian_noise", "jpeg", "poisson_noise", "preset"]

_GREY = (0.299, 0.587, 0.114)


@torch.no_grad()
def degraded(images: Tensor, how: Degradation, seed: int, index: Sequence[int] | None = None) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, H / scale, W / scale), multiples of 1/255 in [0, 1], float32 (float64 if that came in).

    index: B whole numbers that name the pictures, 0 to B - 1 by default; (seed, index) is all that chance depends on. No gradient.
    Raises UserError for sides that are no multiple of the scale.
    """
    height, width = images.shape[-2:]
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"A degradation takes pictures (B, 3, H, W), not {tuple(images.shape)}.")
    if height % how.scale or width % how.scale or not height * width:
        down = tuple(n // how.scale * how.scale for n in (width, height))
        raise UserError(
            f"A picture of {width} x {height} pixels does not divide by {how.scale}. Crop it to {down[0]} x {down[1]} first."
        )
    names = range(len(images)) if index is None else [int(i) for i in index]
    assert len(names) == len(images), (len(names), len(images))
    work = images.detach().cpu().to(torch.float64 if images.dtype == torch.float64 else torch.float32)
    done = [_degraded(one[None], how, seed, i) for one, i in zip(work, names, strict=True)]
    return torch.cat(done).to(images.device) if done else work.new_zeros(0, 3, height // how.scale, width // how.scale)


def _degraded(x: Tensor, how: Degradation, seed: int, index: int) -> Tensor:
    plan, target = drawn(how, seed, index), tuple(n // how.scale for n in x.shape[-2:])
    for number, (stage, chosen) in enumerate(zip(how.stages, plan.rounds, strict=True)):
        x = _rounded(x, chosen, target if stage.of_target else None, (seed, index, number + 1))
    if plan.jpeg_first:
        x = jpeg(x, plan.quality)
    x = F.interpolate(x, target, mode=plan.mode, antialias=how.antialias and plan.mode != "area")
    x = kernels.blurred(x, plan.sinc.kernel) if plan.sinc else x
    if not plan.jpeg_first:
        x = jpeg(x, plan.quality)
    return (x * 255).round().clamp(0, 255) / 255


def _rounded(x: Tensor, chosen: Round, target: tuple[int, ...] | None, key: tuple[int, int, int]) -> Tensor:
    """One picture after one stage; `target` is the size that its factor is of, None for the size it has."""
    for step in chosen.order:
        if step == "blur" and chosen.blur:
            x = kernels.blurred(x, chosen.blur.kernel)
        elif step == "resize":
            size = [max(1, int(n * chosen.factor)) for n in target or x.shape[-2:]]
            x = F.interpolate(x, size, mode=chosen.mode)
        elif step == "noise":
            rng = generator(key[0], Stream.DEGRADE, 0, key[1], key[2])
            add = gaussian_noise if chosen.noise == "gaussian" else poisson_noise
            x = add(x, chosen.level, chosen.grey, rng).clamp(0, 1)
    return jpeg(x, chosen.quality)


def gaussian_noise(images: Tensor, sigma: float, grey: bool, rng: np.random.Generator) -> Tensor:
    """(B, 3, H, W) in [0, 1] plus normal noise of standard deviation sigma / 255; grey: one draw for the three channels. Not clamped."""
    shape = (len(images), 1 if grey else 3, *images.shape[-2:])
    return images + torch.from_numpy(rng.standard_normal(shape, np.float32)).to(images) * (sigma / 255)


def poisson_noise(images: Tensor, level: float, grey: bool, rng: np.random.Generator) -> Tensor:
    """(B, 3, H, W) in [0, 1] plus `level` times shot noise of mean 0 and variance x / n. Not clamped.

    x is the picture in 8 bits (its luminance if grey) and n the number of its values, up to the next power of two: as if a
    photograph's values were counts of light.
    """
    noisy = []
    for image in images:
        x = (image * image.new_tensor(_GREY)[:, None, None]).sum(0, keepdim=True) if grey else image
        counts = (x * 255).round().clamp(0, 255).double().numpy() / 255
        n = 2 ** math.ceil(math.log2(len(np.unique(counts))))
        noisy.append(image + level * torch.from_numpy(rng.poisson(counts * n) / n - counts).to(image))
    return torch.stack(noisy)


def jpeg(images: Tensor, quality: int | None) -> Tensor:
    """(B, 3, H, W) clamped to [0, 1], through Pillow's JPEG file of a quality in 1..100; None returns them untouched."""
    if quality is None:
        return images
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    decoded = []
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(images) / 255
