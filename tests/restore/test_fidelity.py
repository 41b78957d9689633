import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from tropism.core import UserError
from tropism.restore.fidelity import psnr, sharpness, ssim
from tropism.worlds import glyphs


@pytest.fixture(scope="module")
def pair():
    """Three pictures (3, 3, 24, 40), float64, and the same with noise of growing strength."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 6, 10, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.interpolate(x, scale_factor=4, mode="bilinear")
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, (x + noise * torch.tensor([0.02, 0.1, 0.4])[:, None, None, None]).clamp(0, 1)


def by_scipy(x, y):
    """SSIM of one channel by scipy's Gaussian filter of the same window, cut to where all of it lies inside."""
    mean = lambda a: ndimage.gaussian_filter(a, 1.5, truncate=3.4)[5:-5, 5:-5]
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    above = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
    return (above / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))).mean()


def test_ssim_is_that_of_another_hand(pair):
    x, y = pair
    theirs = [
        np.mean([by_scipy(a.numpy(), b.numpy()) for a, b in zip(p, q, strict=True)]) for p, q in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y).numpy(), theirs, rtol=1e-10)
    assert theirs[0] > 0.9 > theirs[1] > 0.3 > theirs[2]
    torch.testing.assert_close(ssim(x.float(), y.float()).double(), ssim(x, y), rtol=1e-5, atol=1e-6)


def test_psnr_is_decibels_of_the_mean_squared_error(pair):
    x, y = pair
    theirs = [10 * math.log10(1 / ((a - b) ** 2).mean()) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(psnr(x, y).numpy(), theirs, rtol=1e-12)
    torch.testing.assert_close(psnr(x * 0, x * 0 + 0.1), torch.full((3,), 20.0, dtype=torch.float64))


def test_equal_pictures_are_infinitely_near():
    """Infinite and not NaN, beside pictures that differ; scenes of digits as they are."""
    x = glyphs.render(glyphs.scenes(range(4), seed=0))
    y = x.clone()
    y[1] = x[0]
    assert psnr(x, y)[[0, 2, 3]].tolist() == [math.inf] * 3
    assert 0 < psnr(x, y)[1] < math.inf
    torch.testing.assert_close(ssim(x, x), torch.ones(4))
    flat = torch.full((2, 3, 16, 16), 0.7)
    torch.testing.assert_close(ssim(flat, flat), torch.ones(2))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_gradient_equals_central_differences(pair, measure):
    x, y = pair[0].clone().requires_grad_(), pair[1]
    (gradient,) = torch.autograd.grad(measure(x, y).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    with torch.no_grad():
        slope = (measure(x + 1e-6 * direction, y) - measure(x - 1e-6 * direction, y)) / 2e-6
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-7)


def test_half_precision_is_compared_in_float32_and_sizes_must_match(pair):
    x, y = pair
    assert psnr(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    with pytest.raises(UserError, match=r"\(3, 3, 24, 40\) are compared with references \(3, 3, 24, 39\)"):
        ssim(x, y[..., :39])
    with pytest.raises(UserError, match=r"windows of 11 x 11 pixels, and the pictures have 10 x 24"):
        ssim(x[..., :10], y[..., :10])


def test_sharpness_is_the_share_of_edges_that_is_left(pair):
    """By scipy's Laplacian; a blur lowers it, noise raises it, a factor on contrast squares, a flat reference has none to lose."""
    x, y = pair
    edges = lambda a: ndimage.laplace(a.mean(0).numpy())[1:-1, 1:-1].var(ddof=1)
    np.testing.assert_allclose(sharpness(y, x), [edges(b) / edges(a) for a, b in zip(x, y, strict=True)], rtol=1e-9)
    np.testing.assert_allclose(sharpness(0.5 * x, x), [0.25] * 3, rtol=1e-9)
    assert (sharpness(torch.nn.functional.avg_pool2d(x, 3, 1), x[..., 1:-1, 1:-1]) < 1).all()
    assert (sharpness(y, x)[1:] > 1).all()
    assert sharpness(x[:1], torch.full_like(x[:1], 0.3)).isnan().all()
