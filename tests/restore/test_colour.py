"""The two colour corrections: answers that are known, gradients, and what cannot be."""

import pytest
import torch

from tropism.core import UserError
from tropism.restore.colour import adain, low_frequencies, wavelet


def pictures(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adain_takes_mean_and_spread_and_nothing_else():
    one, other = pictures(0, 2, 3, 9, 8), 0.3 * pictures(1, 2, 3, 9, 8) + 0.5
    found = adain(one, other, epsilon=0.0)
    torch.testing.assert_close(found.mean((2, 3)), other.mean((2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.std((2, 3)), other.std((2, 3)), rtol=1e-12, atol=1e-12)
    pattern = (one - one.mean((2, 3), keepdim=True)) / one.std((2, 3), keepdim=True)
    torch.testing.assert_close(
        (found - other.mean((2, 3), keepdim=True)) / other.std((2, 3), keepdim=True), pattern, rtol=1e-9, atol=1e-9
    )


def test_adain_by_hand():
    """Values 0 and 1 have variance 1/2 by n - 1; 10 and 14 have 8: each becomes 12 -+ 2, but for epsilon."""
    one = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    other = torch.tensor([10.0, 14.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    torch.testing.assert_close(adain(one, other, 0.0).flatten(), torch.tensor([10.0, 14.0], dtype=torch.float64))
    expected = 12 - 0.5 * (8 + 1e-5) ** 0.5 / (0.5 + 1e-5) ** 0.5
    assert adain(one, other)[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-12)


def test_an_even_picture_stays_even():
    even = torch.full((1, 3, 6, 6), 0.25, dtype=torch.float64)
    found = adain(even, pictures(0, 1, 3, 6, 6))
    assert torch.isfinite(found).all() and found.std((2, 3)).max() < 1e-12


def test_the_blur_by_hand():
    """A point of 16 spreads as the kernel does, and at the next level into holes of 2; a corner repeats itself."""
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[0, 0, 4, 4] = 16
    once = low_frequencies(point, 1)[0, 0]
    assert once[3:6, 3:6].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert once.sum() == 16
    twice = low_frequencies(point, 2)[0, 0]
    assert twice[4].tolist() == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    wide = torch.zeros(1, 1, 1, 33, dtype=torch.float64)
    wide[..., 16] = 1  # holes of 1, 2 and 4 reach 7 pixels to each side
    assert low_frequencies(wide, 3)[0, 0, 0].nonzero().flatten().tolist() == list(range(9, 24))
    corner = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    corner[0, 0, 0, 0] = 16
    assert low_frequencies(corner, 1)[0, 0, 0, 0] == 9


def test_wavelet_keeps_detail_and_takes_the_rest():
    one, other = pictures(0, 2, 3, 20, 24), pictures(1, 2, 3, 20, 24)
    torch.testing.assert_close(wavelet(one, one), one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wavelet(one + 0.25, other), wavelet(one, other), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wavelet(one, other + 0.25), wavelet(one, other) + 0.25, rtol=1e-12, atol=1e-12)
    stripes = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    stripes[..., ::2] = 1  # one level blurs stripes of a pixel to their mean
    even = torch.full_like(stripes, 0.25)
    inside = wavelet(stripes, even, levels=1)[..., 1:-1]
    torch.testing.assert_close(inside, stripes[..., 1:-1] - 0.25, rtol=1e-12, atol=1e-12)


def test_channels_do_not_mix():
    one, other = pictures(0, 1, 3, 8, 8), pictures(1, 1, 3, 8, 8)
    changed = other.clone()
    changed[:, 1] += 0.5
    for correct in (adain, wavelet):
        moved = (correct(one, changed) - correct(one, other)).abs().amax((0, 2, 3))
        assert moved[[0, 2]].max() == 0 and moved[1] > 0.4


@pytest.mark.parametrize("correct", [adain, lambda a, b: wavelet(a, b, levels=2)], ids=["adain", "wavelet"])
def test_gradients(correct):
    one, other = (pictures(i, 2, 2, 4, 5).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradcheck(correct, (one, other), atol=1e-6)


def test_other_sizes_are_refused():
    for correct in (adain, wavelet):
        with pytest.raises(UserError, match=r"\(1, 3, 8, 8\) and .* \(1, 3, 2, 2\).*enlarged"):
            correct(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match="levels is 0"):
        low_frequencies(torch.zeros(1, 3, 8, 8), 0)
