import pytest
import torch
from PIL import Image
from test_clip import photographs

from tropism.rewards.pixels import Preparation, resized

PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def levels_from_pil(pictures, height, width, mode="bicubic"):
    theirs = [Image.fromarray(p).resize((width, height), PIL[mode]) for p in pictures]
    theirs = torch.stack(
        [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).reshape(height, width, 3) for i in theirs]
    )
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (resized(x, height, width, mode).permute(0, 2, 3, 1) * 255 - theirs).abs()


@pytest.mark.parametrize("side", [128, 256, 512])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_keep_their_gradient(side, value):
    """Every output is a mean of inputs, so the gradient of their sum sums to their number: none is lost to rounding."""
    x = torch.full((1, 3, side, side), value, requires_grad=True)
    resized(x, 224, 224).sum().backward()
    assert x.grad is not None and x.grad.sum().item() == pytest.approx(3 * 224 * 224, rel=1e-4)


@pytest.mark.parametrize("mode", PIL)
@pytest.mark.parametrize(
    ("before", "after"),
    [((64, 64), (48, 48)), ((37, 91), (32, 96)), ((91, 37), (96, 32)), ((20, 31), (48, 74)), ((200, 20), (48, 48)),
     ((100, 300), (90, 100)), ((64, 64), (64, 40)), ((64, 64), (40, 64))],
)  # fmt: skip
def test_any_change_of_size_is_pils(before, after, mode):
    """Within two grey levels, half a level on average: PIL rounds after each pass."""
    levels = levels_from_pil(photographs(*before), *after, mode)
    assert levels.max() < 2 and levels.mean() < 0.5


def test_no_change_is_no_change():
    assert levels_from_pil(photographs(48, 48), 48, 48).max() < 1e-4
    x = torch.rand(1, 3, 6, 8)
    plain = Preparation((), (), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(plain(x), x)


def test_the_crop_is_of_the_centre():
    x = torch.arange(6.0 * 9).reshape(1, 1, 6, 9).expand(1, 3, 6, 9)
    kept = Preparation((), (2, 4), mean=(0.0,) * 3, std=(1.0,) * 3)(x)
    assert torch.equal(kept, x[:, :, 2:4, 2:6])
