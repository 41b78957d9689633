"""Varied pictures for the compressibility tests: renders of every texture, noise, blurs, gradients, mixtures."""

import numpy as np
import torch
from scipy import ndimage

from tropism.worlds import shapes

KINDS = (*shapes.TEXTURES, "flat", "noise", "blurred", "gradient", "photo", "washed", "overlay")


def _power_law(rng, size):
    """Noise with a 1/f^a spectrum and correlated channels, as photographs have; (size, size, 3), std about 1."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    f[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((3, size, size))) / f ** rng.uniform(0.7, 1.8)
    fields = np.real(np.fft.ifft2(spectrum))
    fields = (fields - fields.mean((1, 2), keepdims=True)) / fields.std((1, 2), keepdims=True)
    mix = np.eye(3) * rng.uniform(0.05, 0.5) + rng.uniform(0.5, 1)
    return np.moveaxis(np.tensordot(mix, fields, 1), 0, -1) / 1.5


def picture(kind, rng, size=64):
    """One picture (size, size, 3), float in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    base, contrast = rng.uniform(0.2, 0.8, 3), rng.uniform(0.02, 0.35)
    if kind == "noise":
        return np.clip(base + contrast * rng.standard_normal((size, size, 3)), 0, 1)
    if kind == "blurred":
        noise, radius = rng.standard_normal((size, size, 3)), rng.uniform(0.5, 5)
        field = ndimage.gaussian_filter(noise, (radius, radius, 0), mode="wrap")
        return np.clip(base + contrast * field / field.std(), 0, 1)
    if kind == "gradient":
        return np.clip(base + 0.4 * (x[..., None] * rng.uniform(-1, 1, 3) + y[..., None] * rng.uniform(-1, 1, 3)), 0, 1)
    if kind == "photo":
        return np.clip(base + contrast * _power_law(rng, size), 0, 1)
    scene = rng.choice(np.array(shapes.scenes(), dtype=object))
    if kind in ("washed", "overlay"):
        drawn = np.kron(shapes.render(scene, rng), np.ones((size // 64, size // 64, 1))) / 255
        if kind == "washed":
            strength, radius = rng.uniform(0.1, 0.9), rng.uniform(0, 2)
            return np.clip(base + strength * (ndimage.gaussian_filter(drawn, (radius, radius, 0)) - base), 0, 1)
        return np.clip(drawn + 0.4 * contrast * _power_law(rng, size), 0, 1)
    return np.kron(shapes.render(scene, rng, kind), np.ones((size // 64, size // 64, 1))) / 255


def varied(count=500, seed=0, size=64):
    """(count, 3, size, size) float64 in [0, 1], the kinds taken in turn; size a multiple of 64."""
    drawn = [picture(KINDS[i % len(KINDS)], np.random.default_rng([seed, i]), size) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
