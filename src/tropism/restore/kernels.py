"""Blur kernels of blind super-resolution, and the convolution that applies one.

A Gaussian family in q = d^T S^-1 d, d the offset from the centre in pixels and S the covariance of a rotated ellipse:
exp(-q^beta / 2), which is the Gaussian at beta = 1, and the plateau 1 / (1 + q^beta), flatter on top. And the ideal circular
low-pass, cutoff J1(cutoff r) / (2 pi r), whose side lobes ring ("sinc").
Source: Real-ESRGAN, Wang et al., arXiv 2107.10833, section 3.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import j1
from torch import Tensor

LARGEST = 21
"""Every kernel is padded with zeros to (21, 21), so that all have one shape."""


def _squared_distance(size: int, sigma: tuple[float, float], angle: float) -> np.ndarray:
    """q of every place of a (size, size) kernel: the squared offset in units of the ellipse's own radii."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return (along / sigma[0]) ** 2 + (across / sigma[1]) ** 2


def gaussian(size: int, sigma: tuple[float, float], angle: float = 0.0, beta: float = 1.0) -> np.ndarray:
    """The (generalised) Gaussian kernel (size, size), float64 with sum 1.

    size is odd; sigma are the two standard deviations in pixels, the first along `angle` (radians from the x axis towards y, which
    points down); beta < 1 has heavier tails, beta > 1 lighter ones.
    """
    kernel = np.exp(-0.5 * _squared_distance(size, sigma, angle) ** beta)
    return kernel / kernel.sum()


def plateau(size: int, sigma: tuple[float, float], angle: float = 0.0, beta: float = 1.0) -> np.ndarray:
    """The plateau kernel (size, size), float64 with sum 1; arguments as in `gaussian`."""
    kernel = 1 / (1 + _squared_distance(size, sigma, angle) ** beta)
    return kernel / kernel.sum()


def sinc(size: int, cutoff: float) -> np.ndarray:
    """The circular low-pass kernel (size, size), float64 with sum 1, of a cutoff in radians a pixel (pi is the highest frequency)."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    r = np.hypot(x, y)
    away = np.where(r == 0, 1, r)
    kernel = np.where(r == 0, cutoff**2 / (4 * math.pi), cutoff * j1(cutoff * away) / (2 * math.pi * away))
    return kernel / kernel.sum()


def padded(kernel: np.ndarray) -> np.ndarray:
    """A kernel of an odd size up to 21 in the middle of zeros, (21, 21)."""
    return np.pad(kernel, (LARGEST - len(kernel)) // 2)


def blurred(images: Tensor, kernel: np.ndarray) -> Tensor:
    """(B, C, H, W) filtered by one kernel of odd size, the same shape; the border is mirrored without repeating its pixel.

    It is a correlation, as in every library for pictures; pictures smaller than the kernel are mirrored more than once.
    """
    reach = len(kernel) // 2
    rows, columns = (_mirrored(n, reach, images.device) for n in images.shape[-2:])
    wide = images[..., rows, :][..., columns].flatten(0, 1)[:, None]
    weights = torch.from_numpy(kernel).to(images)[None, None]
    return F.conv2d(wide, weights).reshape(images.shape)


def _mirrored(n: int, reach: int, device: torch.device) -> Tensor:
    """Which of n pixels stands at -reach .. n - 1 + reach when the row is mirrored at its two end pixels."""
    period = max(1, 2 * (n - 1))
    place = torch.arange(-reach, n + reach, device=device) % period
    return torch.where(place < n, place, period - place)
