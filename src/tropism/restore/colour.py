"""Give an enlarged picture the colours of the low-resolution one: generative upscalers drift in tone.

Both are plain, differentiable functions of (B, C, H, W); neither clamps or rounds, so they can stand before a reward. Whether a score was
taken before or after the correction belongs beside the score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError

KERNEL = ((1, 2, 1), (2, 4, 2), (1, 2, 1))  # sixteenths


def _same_size(pictures: Tensor, source: Tensor) -> None:
    if pictures.shape != source.shape:
        raise UserError(
            f"The pictures are {tuple(pictures.shape)} and the source of their colours is {tuple(source.shape)}; they must be the same. "
            "Enlarge the low-resolution picture first: tropism.models.low_res.enlarged."
        )


def adain(pictures: Tensor, source: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Each channel of `pictures` (B, C, H, W) with the mean and standard deviation that it has in `source` (B, C, H, W).

    epsilon: added to both variances, so that an even picture stays even. Variances divide by H W - 1. Any range; nothing is clamped.
    Raises UserError for another shape. Source: Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization,
    arXiv 1703.06868, eq. 8, here on pixels, as in the released code of StableSR (arXiv 2305.07015).
    """
    _same_size(pictures, source)
    mean, like = (x.mean((2, 3), keepdim=True) for x in (pictures, source))
    std, wanted = (torch.sqrt(x.var((2, 3), keepdim=True) + epsilon) for x in (pictures, source))
    return (pictures - mean) / std * wanted + like


def low_frequencies(pictures: Tensor, levels: int = 5) -> Tensor:
    """`pictures` (B, C, H, W) blurred by a 3x3 binomial kernel with holes, 1, 2, 4... pixels wide, edges repeated: à-trous wavelets.

    Raises UserError for less than one level.
    """
    if levels < 1:
        raise UserError(f"levels is {levels}; it must be at least 1. Try levels=5.")
    channels = pictures.shape[1]
    kernel = (pictures.new_tensor(KERNEL) / 16).expand(channels, 1, 3, 3)
    for level in range(levels):
        hole = 2**level
        padded = F.pad(pictures, (hole,) * 4, mode="replicate")
        pictures = F.conv2d(padded, kernel, groups=channels, dilation=hole)
    return pictures


def wavelet(pictures: Tensor, source: Tensor, levels: int = 5) -> Tensor:
    """The fine detail of `pictures` (B, C, H, W) on the low frequencies of `source` (B, C, H, W).

    levels: octaves that count as detail; 5 leaves what is wider than about 32 pixels to the source. Any range; nothing is clamped.
    Raises UserError for another shape. Source: Exploiting Diffusion Prior for Real-World Image Super-Resolution, arXiv 2305.07015,
    released code (wavelet reconstruction).
    """
    _same_size(pictures, source)
    return pictures - low_frequencies(pictures, levels) + low_frequencies(source, levels)
