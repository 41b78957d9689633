import pytest
import torch

from tropism.core import Batch, UserError
from tropism.rewards.load import load_reward
from tropism.rewards.low_res import shrunk
from tropism.worlds import glyphs_posterior


def test_minus_the_mean_difference_of_area_means(images):
    low = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    by_hand = images.reshape(4, 3, 16, 4, 16, 4).mean((3, 5))
    reward = load_reward("lr-consistency")
    torch.testing.assert_close(reward(images, Batch(["a"] * 4, low_res=low)), -(by_hand - low).abs().mean((1, 2, 3)))
    assert reward(images, Batch(["a"] * 4, low_res=by_hand)).abs().max() < 1e-15
    torch.testing.assert_close(shrunk(images[..., :32], by_hand[..., :8]), by_hand[..., :8], rtol=0, atol=1e-15)
    assert torch.equal(shrunk(images, images), images)


def test_the_reference_of_a_noisy_picture_is_eight_tenths_of_its_noise_away():
    batch = glyphs_posterior.batch(range(64), seed=1, sigma=0.05)
    value = load_reward("lr-consistency")(batch.reference, batch)
    assert value.mean().item() == pytest.approx(-0.05 * (2 / torch.pi) ** 0.5, rel=0.03)


def test_what_does_not_fit(images):
    reward = load_reward("lr-consistency")
    with pytest.raises(UserError, match=r"low-resolution picture and the batch has none.*low_res=pictures"):
        reward(images, Batch(["a"] * 4))
    for shape in ((3, 3, 16, 16), (4, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(UserError, match=r"it must be \(4, 3, h, w\)"):
            reward(
                images, Batch(["a"] * 4, low_res=torch.zeros(4, *shape[1:]) if shape[0] == 4 else torch.zeros(shape))
            )
    for h, w in ((15, 16), (16, 15), (16, 32), (128, 128), (0, 0)):
        with pytest.raises(UserError, match=rf"64 x 64 pixels are no whole multiple of the {w} x {h}"):
            reward(images, Batch(["a"] * 4, low_res=torch.zeros(4, 3, h, w)))
