import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import dctn
from scipy.stats import spearmanr
from varied import KINDS, varied

from tropism.core import Batch, UserError
from tropism.rewards import jpeg
from tropism.worlds import shapes

FEW = varied(20, seed=5)


def test_dct_is_scipys():
    plane = torch.randn(2, 24, 40, dtype=torch.float64)
    ours = jpeg.dct(plane)
    assert ours.shape == (2, 3, 5, 8, 8)
    for b, i, j in [(0, 0, 0), (1, 2, 4), (1, 0, 3)]:
        block = plane[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
        np.testing.assert_allclose(ours[b, i, j].numpy(), dctn(block, norm="ortho"), atol=1e-12)


def test_colours_are_pillows_which_rounds_down():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pillow = np.asarray(Image.fromarray(pixels).convert("YCbCr"), float) - 128
    ours = jpeg.ycbcr(torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255)[0] - 0.5
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), pillow, atol=0.6)


@pytest.mark.parametrize("quality", [10, 50, 75, 95, 100])
def test_tables_are_pillows(quality):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    tables = Image.open(io.BytesIO(file.getvalue())).quantization
    for index, luma in ((0, True), (1, False)):
        np.testing.assert_array_equal(jpeg.table(luma, quality).flatten().numpy(), tables[index])


def test_quantised_coefficients_give_back_pillows_picture():
    """Rounding our coefficients and inverting every step lands on the decoded file: the whole pipeline is Pillow's."""
    image = torch.from_numpy(np.random.default_rng(1).integers(90, 160, (1, 3, 16, 16)) / 255)
    planes = jpeg.ycbcr(image)
    luma = (jpeg.dct(planes[:, 0]) / jpeg.table(True)).round() * jpeg.table(True)
    basis = jpeg._basis()
    y = (basis.T @ luma @ basis)[0].permute(0, 2, 1, 3).reshape(16, 16) + 128
    file = io.BytesIO()
    Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "JPEG", quality=95)
    decoded = Image.open(io.BytesIO(file.getvalue()))
    decoded.draft("YCbCr", None)
    assert np.abs(y.numpy() - np.asarray(decoded, float)[..., 0]).mean() < 0.7  # libjpeg rounds colours before the DCT


@pytest.mark.parametrize(("seed", "size", "count"), [(1, 64, 500), (2, 64, 500), (3, 128, 100)])
def test_rank_and_size_follow_pillows_bytes(seed, size, count):
    images = varied(count, seed, size)
    estimate, true = jpeg.kilobytes(images), jpeg.true_bytes(images) / 1000
    assert spearmanr(estimate, true).statistic > 0.98
    error = (estimate - true).abs() / true
    assert error.median() < (0.05 if size == 64 else 0.1)
    assert error.max() < 0.35


def test_rank_within_every_kind_of_picture():
    images = varied(500, 1)
    estimate, true = jpeg.kilobytes(images), jpeg.true_bytes(images)
    for i, kind in enumerate(KINDS):
        rank = spearmanr(estimate[i :: len(KINDS)], true[i :: len(KINDS)]).statistic
        assert rank > (0.8 if kind == "gradient" else 0.95 if kind != "grain" else 0.97), (kind, rank)


def test_a_flat_picture_costs_what_it_costs():
    flat = torch.full((1, 3, 64, 64), 0.5)
    assert jpeg.true_bytes(flat).item() == pytest.approx(690, abs=15)
    assert jpeg.kilobytes(flat).item() == pytest.approx(0.689, abs=0.003)
    assert jpeg.bytes_above_flat(flat).item() == 0


def test_texture_is_seen_above_flat():
    scenes = shapes.scenes()[::200]
    above = {t: jpeg.bytes_above_flat(shapes.pictures(scenes, 0, t)).mean() for t in ("flat", "grain", "stripes")}
    assert above["grain"] > 1.5 * above["flat"]
    assert above["stripes"] > 1.5 * above["flat"]


@pytest.mark.parametrize("shape", [(64, 64), (50, 71), (8, 8), (1, 17), (128, 48)])
def test_any_size(shape):
    images = F.interpolate(FEW, shape, mode="bilinear", antialias=True)
    estimate, true = jpeg.kilobytes(images), jpeg.true_bytes(images) / 1000
    assert ((estimate - true).abs() / true).max() < 0.25


def test_gradient_in_float64():
    images = (0.1 + 0.8 * FEW[:10]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(jpeg.kilobytes(images).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    slope = (jpeg.kilobytes(images + h * direction) - jpeg.kilobytes(images - h * direction)).detach() / (2 * h)
    exact = (gradient * direction).flatten(1).sum(1)
    assert ((exact - slope).abs() / exact.abs().clamp_min(1e-3)).max() < 1e-6


def test_descending_the_estimate_shrinks_the_file():
    x, start = FEW[4:8].clone().requires_grad_(), jpeg.true_bytes(FEW[4:8])
    optimiser = torch.optim.Adam([x], lr=0.003)
    for _ in range(40):
        optimiser.zero_grad()
        jpeg.kilobytes(x).sum().backward()
        optimiser.step()
    flat = jpeg.true_bytes(torch.full_like(FEW[:1], 0.5))
    left = (jpeg.true_bytes(x) - flat) / (start - flat)
    assert (left < 0.9).all()
    assert left.mean() < 0.7


def test_signs():
    batch = Batch(["a"] * 20)
    torch.testing.assert_close(jpeg.compressibility()(FEW, batch), -jpeg.incompressibility()(FEW, batch))
    torch.testing.assert_close(jpeg.black_box()(FEW, batch), -jpeg.true_bytes(FEW) / 1000)


@pytest.mark.parametrize("measure", [jpeg.kilobytes, jpeg.true_bytes])
def test_refuses_what_is_not_rgb(measure):
    with pytest.raises(UserError, match="three channels"):
        measure(torch.zeros(2, 1, 64, 64))
