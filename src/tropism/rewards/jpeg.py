"""Compressibility: the size of a picture as a JPEG file, as a smooth rate estimate and as true bytes.

The estimate follows the baseline encoder up to its two steps without a gradient: coefficients are not rounded, and the
Huffman code is replaced by a smooth cost in bits. `jpeg-bytes` is what it stands for: Pillow's file at quality 95.
Source: ITU-T T.81 (1992), annexes A, F and K; JFIF 1.02 for the colours.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.named import Named
from tropism.rewards.sources import OWN, About

QUALITY = 95
_LUMA = (
    16,
    11,
    10,
    16,
    24,
    40,
    51,
    61,
    12,
    12,
    14,
    19,
    26,
    58,
    60,
    55,
    14,
    13,
    16,
    24,
    40,
    57,
    69,
    56,
    14,
    17,
    22,
    29,
    51,
    87,
    80,
    62,
    18,
    22,
    37,
    56,
    68,
    109,
    103,
    77,
    24,
    35,
    55,
    64,
    81,
    104,
    113,
    92,
    49,
    64,
    78,
    87,
    103,
    121,
    120,
    101,
    72,
    92,
    95,
    98,
    112,
    100,
    103,
    99,
)
_CHROMA = (
    17,
    18,
    24,
    47,
    99,
    99,
    99,
    99,
    18,
    21,
    26,
    66,
    99,
    99,
    99,
    99,
    24,
    26,
    56,
    99,
    99,
    99,
    99,
    99,
    47,
    66,
    99,
    99,
    99,
    99,
    99,
    99,
) + (99,) * 32
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def table(luma: bool, quality: int = QUALITY) -> Tensor:
    """The (8, 8) quantisation table, float64, of a quality in 1..100, row by row in frequency."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.tensor(
        [min(255, max(1, (v * scale + 50) // 100)) for v in (_LUMA if luma else _CHROMA)], dtype=torch.float64
    ).reshape(8, 8)


def ycbcr(images: Tensor) -> Tensor:
    """RGB in [0, 1] -> Y, Cb, Cr in 0..255, all three centred on 0 (that is, 128 subtracted); (B, 3, H, W)."""
    colours = torch.einsum("kc,bchw->bkhw", torch.tensor(_YCBCR, dtype=torch.float64).to(images), 255 * images)
    return colours - torch.tensor([128.0, 0, 0]).to(images).reshape(1, 3, 1, 1)


def dct(plane: Tensor) -> Tensor:
    """Orthonormal 8x8 DCT-II of a plane (B, H, W), sides multiples of 8 -> (B, H/8, W/8, 8, 8), rows first."""
    blocks = plane.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)
    basis = _basis().to(plane)
    return basis @ blocks @ basis.T


@lru_cache(maxsize=1)
def _basis() -> Tensor:
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi / 8 * n[:, None] * (n + 0.5)) / 2
    basis[0] /= math.sqrt(2)
    return basis


# A coefficient q, in quantisation steps, costs bits(q) = log2(1 + (q / STEP)^2) / 2: flat where rounding makes a zero,
# one bit a doubling beyond. STEP 0.25 ranks pictures better (Spearman 0.998), but its gradient goes to coefficients
# that are rounded away: a walk of 3 grey levels saves 11 % of the bytes above flat, with STEP 1 it saves 21 %. The
# weights are a least-squares fit of Pillow's bytes (quality 95), less the fixed part, on the 500 pictures of
# tests/rewards/varied.py, seed 1. Elsewhere: Spearman 0.988 and 155 bytes rms on files of 2,300 (other seeds); 0.98
# and 75 (renders of `shapes`).
STEP = 1.0
AC_WEIGHT, DC_WEIGHT = 2.920, 4.339
# Exact: the file's header, and the end-of-block and zero-difference codes of every block.
HEADER_BYTES, LUMA_BLOCK_BITS, CHROMA_BLOCK_BITS = 623, 6, 4


def bits(q: Tensor) -> Tensor:
    """The smooth cost of coefficients in quantisation steps, elementwise, >= 0."""
    return 0.5 / math.log(2) * torch.log1p((q / STEP) ** 2)


def _block_bits(q: Tensor) -> Tensor:
    """Bits of one colour plane's blocks (B, h, w, 8, 8) above a flat plane's -> (B,). DC is coded as a difference."""
    dc = q[..., 0, 0]
    above = F.pad(dc[:, :-1, :1], (0, 0, 1, 0))
    difference = dc - torch.cat([above, dc[:, :, :-1]], 2)
    ac = bits(q.flatten(3)[..., 1:]).flatten(1).sum(1)
    return AC_WEIGHT * ac + DC_WEIGHT * bits(difference).flatten(1).sum(1)


def kilobytes(images: Tensor) -> Tensor:
    """Estimated size of pictures (B, 3, H, W) in [0, 1] as JPEG files of quality 95, in units of 1,000 bytes -> (B,).

    Differentiable. Any H and W; at least float32. Raises UserError for another number of channels.
    """
    _check(images)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[-2:]
    planes = ycbcr(F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate"))
    luma = dct(planes[:, 0]) / table(True).to(images)
    chroma = F.avg_pool2d(planes[:, 1:], 2).flatten(0, 1)
    chroma = dct(chroma) / table(False).to(images)
    luma_blocks = luma.shape[1] * luma.shape[2]
    fixed = 8 * HEADER_BYTES + luma_blocks * LUMA_BLOCK_BITS + luma_blocks // 2 * CHROMA_BLOCK_BITS
    return (fixed + _block_bits(luma) + _block_bits(chroma).unflatten(0, (-1, 2)).sum(1)) / 8000


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"jpeg was given samples of shape {tuple(images.shape)}; it measures pictures (B, 3, H, W). "
            "Convert them to three channels."
        )


def true_bytes(images: Tensor, quality: int = QUALITY) -> Tensor:
    """Bytes of the files Pillow writes for pictures (B, 3, H, W) in [0, 1] -> (B,), floating point. No gradient."""
    _check(images)
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        sizes.append(file.tell())
    return torch.tensor(sizes, dtype=torch.promote_types(images.dtype, torch.float32), device=images.device)


def bytes_above_flat(images: Tensor, quality: int = QUALITY) -> Tensor:
    """`true_bytes` minus the bytes of a flat grey picture of the same size (about 690 at 64 px) -> (B,)."""
    return true_bytes(images, quality) - true_bytes(torch.full_like(images[:1], 0.5), quality)


def _compressible(samples: Tensor, batch: Batch) -> Tensor:
    return -kilobytes(samples)


def _incompressible(samples: Tensor, batch: Batch) -> Tensor:
    return kilobytes(samples)


def _fewer_bytes(samples: Tensor, batch: Batch) -> Tensor:
    return -true_bytes(samples) / 1000


def compressibility() -> Named:
    """The reward `jpeg`: minus the estimated kilobytes at quality 95. Differentiable."""
    return Named("jpeg", True, _compressible, About((-math.inf, 0.0), None, OWN, "ITU-T T.81"))


def incompressibility() -> Named:
    """The reward `incompressibility`: plus the estimated kilobytes at quality 95. Differentiable."""
    return Named("incompressibility", True, _incompressible, About((0.0, math.inf), None, OWN, "ITU-T T.81"))


def black_box() -> Named:
    """The reward `jpeg-bytes`: minus the true kilobytes of Pillow's file at quality 95. Not differentiable."""
    return Named(
        "jpeg-bytes", False, _fewer_bytes, About((-math.inf, 0.0), None, "Pillow's: MIT-CMU", "Pillow's JPEG files")
    )
