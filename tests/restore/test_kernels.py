"""Blur kernels against their formulas, written out again, and the convolution against an impulse and scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.special import j1

from tropism.restore import kernels


def test_a_round_gaussian_is_the_closed_form():
    kernel, s = kernels.gaussian(9, (1.7, 1.7)), 1.7
    line = np.exp(-(np.arange(-4, 5) ** 2) / (2 * s * s))
    np.testing.assert_allclose(kernel, np.outer(line, line) / line.sum() ** 2, atol=1e-15)
    np.testing.assert_array_equal(kernel, kernels.gaussian(9, (1.7, 1.7), angle=0.0, beta=1.0))
    np.testing.assert_allclose(kernel, kernels.gaussian(9, (1.7, 1.7), angle=0.9), atol=1e-15)


def test_an_ellipse_has_its_covariance_and_its_angle():
    """At x, y = (1, 0), (0, 1), (1, 1) against exp(-d^T S^-1 d / 2) with S written as a matrix; y points down."""
    angle, sigma = 0.5, (3.0, 1.2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag(np.square(sigma)) @ turn.T)
    kernel = kernels.gaussian(21, sigma, angle)
    for d in ((1, 0), (0, 1), (1, 1), (-3, 5)):
        expected = math.exp(-0.5 * np.array(d) @ inverse @ np.array(d))
        assert kernel[10 + d[1], 10 + d[0]] / kernel[10, 10] == pytest.approx(expected, rel=1e-12)
    y, x = np.mgrid[:61, :61] - 30
    wide = kernels.gaussian(61, sigma, angle)
    found = [[(wide * a * b).sum() for b in (x, y)] for a in (x, y)]
    np.testing.assert_allclose(found, np.linalg.inv(inverse), rtol=1e-6)


def test_the_other_shapes_at_a_place():
    """q = (2 / 1.5)^2 two pixels to the right."""
    q = (2 / 1.5) ** 2
    for beta in (0.5, 1.0, 2.5):
        bell, table = kernels.gaussian(7, (1.5, 1.5), beta=beta), kernels.plateau(7, (1.5, 1.5), beta=beta)
        assert bell[3, 5] / bell[3, 3] == pytest.approx(math.exp(-0.5 * q**beta))
        assert table[3, 5] / table[3, 3] == pytest.approx(1 / (1 + q**beta))


def test_a_sinc_is_its_formula_and_passes_what_it_should():
    size, cutoff = 21, math.pi / 2
    kernel = kernels.sinc(size, cutoff)
    r = math.hypot(3, 4)
    raw = {0.0: cutoff**2 / (4 * math.pi), r: cutoff * j1(cutoff * r) / (2 * math.pi * r)}
    assert kernel[10 + 4, 10 - 3] / kernel[10, 10] == pytest.approx(raw[r] / raw[0.0])
    assert kernel.min() < 0  # it rings
    gain = np.abs(np.fft.fft(np.pad(kernel.sum(0), (0, 107))))
    frequency = 2 * math.pi * np.arange(128) / 128
    assert gain[frequency < 0.7 * cutoff].min() > 0.8
    assert gain[(frequency > 1.3 * cutoff) & (frequency <= math.pi)].max() < 0.15


@pytest.mark.parametrize("size", [7, 13, 21])
def test_padding_keeps_the_middle(size):
    small = kernels.gaussian(size, (2.0, 2.0))
    kernel = kernels.padded(small)
    assert kernel.shape == (21, 21)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    edge = (21 - size) // 2
    np.testing.assert_array_equal(kernel[edge : 21 - edge, edge : 21 - edge], small)


def test_the_blur_of_an_impulse_is_the_kernel():
    kernel = kernels.padded(kernels.gaussian(15, (3.0, 1.0), 0.7))
    impulse = torch.zeros(1, 3, 41, 45, dtype=torch.float64)
    impulse[:, 1, 20, 22] = 1
    blurred = kernels.blurred(impulse, kernel)
    np.testing.assert_allclose(blurred[0, 1, 10:31, 12:33].numpy(), kernel, atol=1e-15)
    assert blurred[0, 0].abs().max() == 0 == blurred[0, 2].abs().max()
    assert blurred.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("size", [(24, 31), (6, 9), (2, 3), (1, 1)])
def test_borders_are_mirrored_as_scipy_does_it(size):
    """Also of pictures smaller than the kernel; and a lopsided kernel is not turned over."""
    kernel = np.random.default_rng(0).random((21, 21))
    kernel /= kernel.sum()
    picture = torch.rand(1, 3, *size, dtype=torch.float64)
    expected = np.stack([ndimage.correlate(plane.numpy(), kernel, mode="mirror") for plane in picture[0]])
    np.testing.assert_allclose(kernels.blurred(picture, kernel)[0].numpy(), expected, atol=1e-12)
