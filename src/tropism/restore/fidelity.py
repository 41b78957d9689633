"""How near a restored picture is to its reference, pixel by pixel: PSNR and SSIM, and whether it is as sharp; per picture, in torch.

Source of SSIM: Image Quality Assessment: From Error Visibility to Structural Similarity, Wang et al. 2004, eq. 13, with its Gaussian
window of 11 pixels and standard deviation 1.5, K1 = .01 and K2 = .03.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError

WINDOW, SPREAD = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """(B,) decibels, -10 log10 of the mean squared error over channels and pixels; infinite where two pictures are equal.

    pictures, references: (B, 3, H, W) in [0, 1]. At least float32. Raises UserError for sizes that differ. Differentiable where finite.
    """
    x, y = compared(pictures, references)
    return -10 * (x - y).square().flatten(1).mean(1).log10()


def ssim(pictures: Tensor, references: Tensor) -> Tensor:
    """(B,) in [-1, 1], 1 for equal pictures: the mean over channels and over all windows that lie inside. Differentiable.

    pictures, references: (B, 3, H, W) in [0, 1], no side below 11. At least float32. Raises UserError for other sizes.
    """
    x, y = compared(pictures, references)
    if min(x.shape[-2:]) < WINDOW:
        raise UserError(
            f"SSIM looks through windows of {WINDOW} x {WINDOW} pixels, and the pictures have {x.shape[-1]} x {x.shape[-2]}. Use psnr."
        )
    mean_x, mean_y = windowed(x), windowed(y)
    # Second moments about each picture's own mean: about 0 they would cancel in float32.
    centre = y.mean((2, 3), keepdim=True)
    dx, dy = x - centre, y - centre
    mx, my = mean_x - centre, mean_y - centre
    var_x, var_y = windowed(dx * dx) - mx**2, windowed(dy * dy) - my**2
    covariance = windowed(dx * dy) - mx * my
    means = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_x + var_y + K2**2)
    return (means * structure).flatten(1).mean(1)


FLAT = 1e-9
"""Variance of the Laplacian below which a picture has no edges that could be lost."""


def sharpness(pictures: Tensor, references: Tensor) -> Tensor:
    """(B,) variance of the Laplacian of the mean over channels, as a share of the reference's: 1 as sharp, below 1 blurred.

    pictures, references: (B, 3, H, W) in [0, 1]. NaN where the reference is flat. Raises UserError for sizes that differ.
    """
    x, y = (edges.flatten(1).var(1) for edges in map(_laplacian, compared(pictures, references)))
    return torch.where(y > FLAT, x / y.clamp(min=FLAT), torch.nan)


def _laplacian(images: Tensor) -> Tensor:
    """(B, 1, H - 2, W - 2): four times a pixel less its neighbours."""
    grey = images.mean(1, keepdim=True)
    inner = grey[..., 1:-1, 1:-1]
    return 4 * inner - grey[..., :-2, 1:-1] - grey[..., 2:, 1:-1] - grey[..., 1:-1, :-2] - grey[..., 1:-1, 2:]


def windowed(images: Tensor) -> Tensor:
    """The Gaussian mean about every pixel whose window lies inside: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = torch.exp(-0.5 * (at / SPREAD) ** 2)
    kernel = (bell / bell.sum()).to(images).expand(images.shape[1], 1, 1, WINDOW)
    across = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(across, kernel.mT, groups=images.shape[1])


def compared(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision, at least float32. Raises UserError unless both are (B, 3, H, W) of one size."""
    if pictures.shape != references.shape or pictures.ndim != 4:
        raise UserError(
            f"Pictures {tuple(pictures.shape)} are compared with references {tuple(references.shape)}; both must be (B, 3, H, W) of one "
            "size. Cut them to the same view."
        )
    wide = torch.promote_types(torch.promote_types(pictures.dtype, references.dtype), torch.float32)
    return pictures.to(wide), references.to(device=pictures.device, dtype=wide)
