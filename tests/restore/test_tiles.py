"""Tiles: the whole picture's result where the function looks no further than the context, and no seam where it does."""

import itertools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tropism.core import UserError
from tropism.restore import pictures, tiles


def picture(*size, seed=0):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def network(reach, k=1, seed=0):
    """A convolution with zero padding that looks `reach` pixels around, a sine so that it is not linear, then k times as large."""
    weights = (
        torch.rand(3 * k * k, 3, 2 * reach + 1, 2 * reach + 1, generator=torch.Generator().manual_seed(seed)) - 0.5
    )

    def function(x):
        return F.pixel_shuffle(torch.sin(F.conv2d(x, weights.to(x), padding=reach)), k)

    return function


SIZES = [
    (16, 64, 48, 4, 4),
    (65, 48, 32, 5, 2),
    (33, 95, 32, 4, 6),
    (100, 31, 32, 3, 1),
    (70, 70, 24, 0, 5),
    (20, 20, 64, 8, 8),
]


@pytest.mark.parametrize(("height", "width", "tile", "context", "blend"), SIZES)
def test_an_identity_is_exact(height, width, tile, context, blend):
    image = picture(height, width)
    found = tiles.tiled(lambda x: x, image, tile=tile, context=context, blend=blend)
    assert torch.equal(found, image)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("height", "width", "tile", "context", "blend"), SIZES)
def test_a_short_sighted_function_gives_the_whole_result(height, width, tile, context, blend, k):
    """It looks as far as the context, not one pixel less, and also its zero padding at the picture's edge is the same."""
    function, image = network(context, k), picture(height, width).double()
    found = tiles.tiled(function, image, tile=tile, context=context, blend=blend)
    assert found.shape == (1, 3, k * height, k * width)
    assert (found - function(image)).abs().max() < 1e-12


def test_one_pixel_further_is_seen():
    """The test above can fail: a function that looks beyond the context does differ, and only where tiles meet."""
    function, image = network(5), picture(32, 86)
    off = (tiles.tiled(function, image, tile=32, context=4, blend=6) - function(image)).abs().amax((0, 1))
    assert off.max() > 1e-3
    assert off[:, :18].max() < 1e-6, "before the first fade"


def test_weights_of_the_tiles_add_up_to_one():
    """A function that ignores its input and gives tile number i the value of a unit vector's place shows its own weight."""
    length, tile, context, blend = 150, 40, 4, 6
    starts, fades = tiles.places(length, tile, context, blend)
    weights = []
    for chosen in range(len(starts)):
        calls = itertools.count()
        line = tiles.tiled(
            lambda x, c=calls, n=chosen: torch.full_like(x, float(next(c) == n)),
            picture(20, length),
            tile=tile,
            context=context,
            blend=blend,
        )
        weights.append(line[0, 0, 0])
    assert torch.equal(torch.stack(weights).double().sum(0), torch.ones(length, dtype=torch.float64))
    for i, (start, weight) in enumerate(zip(starts, weights, strict=True)):
        seen = weight.nonzero().flatten()
        assert seen[0] >= start + (context if i else 0) and seen[-1] < start + tile - (
            context if i + 1 < len(starts) else 0
        )
    for first, past in fades:
        ramp = torch.stack(weights)[:, first:past]
        assert (ramp > 0).sum(0).eq(2).all(), "two tiles share every pixel of a fade"


@pytest.mark.parametrize("n", [1, 2, 5, 32, 33])
def test_a_fade_and_its_rest_are_exactly_one(n):
    for dtype in (torch.float32, torch.float64):
        w = tiles.fade(n).to(dtype)
        assert torch.equal(w + (1 - w), torch.ones_like(w))
    assert torch.equal(tiles.fade(n), 1 - tiles.fade(n).flip(0))
    assert n == 1 or (tiles.fade(n).diff() > 0).all()
    assert tiles.fade(n).min() > 0 and tiles.fade(n).max() < 1


def test_places_share_what_they_must():
    for length, tile, (context, blend) in itertools.product(range(1, 220), (32, 45), ((0, 1), (3, 6), (4, 7))):
        starts, fades = tiles.places(length, tile, context, blend)
        assert starts[0] == 0 and starts[-1] + tile == max(length, tile)
        assert len(fades) == len(starts) - 1 and all(b - a == blend for a, b in fades)
        for (a, b), (first, past) in zip(itertools.pairwise(starts), fades, strict=True):
            assert first - b >= context and a + tile - past >= context
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(fades))
        least = 1 if length <= tile else -(-(length - 2 * context - blend) // (tile - 2 * context - blend))
        assert len(starts) == least, "no more tiles than needed"


@pytest.mark.parametrize("step", [2, 8])
def test_places_on_a_grid(step):
    """Every tile starts on it, covers what is left, and shares no less with its neighbours than without a grid."""
    for length, tile, (context, blend) in itertools.product(range(1, 220), (32, 45), ((0, 1), (3, 2))):
        starts, fades = tiles.places(length, tile, context, blend, step)
        assert starts[0] == 0 and all(s % step == 0 for s in starts)
        assert max(length, tile) <= starts[-1] + tile < max(length, tile) + step
        for (a, b), (first, past) in zip(itertools.pairwise(starts), fades, strict=True):
            assert first - b >= context and a + tile - past >= context and past <= length
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(fades))


def test_a_grid_changes_no_result():
    function, image = network(3, 2), picture(101, 87).double()
    pieces = tiles.strips(
        function, lambda y, x, h, w: image[..., y : y + h, x : x + w], 101, 87, tile=36, context=3, blend=4, step=8
    )
    assert (torch.cat(list(pieces), 2) - function(image)).abs().max() < 1e-12


@pytest.mark.parametrize("side", [-1, -2])
def test_a_far_sighted_function_changes_smoothly(side):
    """Every tile gets its own level, as a generative model's tiles do: no step is larger than the fade's own, either way."""
    image, calls = picture(*((40, 90) if side == -1 else (90, 40))), itertools.count()
    found = tiles.tiled(lambda x: torch.full_like(x, float(next(calls) % 2)), image, tile=42, context=2, blend=12)
    line = found[0, 0].movedim(side, 0)[:, 0]
    assert line.diff().abs().max() <= tiles.fade(12).diff().max() + 1e-6
    assert found.max() == 1 and found.min() == 0


def test_tiles_are_of_one_size_and_cover_small_sides():
    seen = []
    tiles.tiled(lambda x: seen.append(tuple(x.shape)) or x, picture(20, 100), tile=32, context=2, blend=2)
    assert set(seen) == {(1, 3, 20, 32)} and len(seen) == 4


def test_batches_other_channels_and_gradients():
    """A decoder's case: 4 latent channels to 3, 8 times larger; the gradient is the whole function's."""
    weights = torch.rand(3 * 64, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    function = lambda z: F.pixel_shuffle(torch.sin(F.conv2d(z, weights, padding=1)), 8)
    latents = torch.rand(2, 4, 13, 21, dtype=torch.float64).requires_grad_()
    found, whole = tiles.tiled(function, latents, tile=10, context=1, blend=2), function(latents)
    assert found.shape == whole.shape == (2, 3, 104, 168) and found.dtype == torch.float64
    assert torch.allclose(found, whole, atol=1e-12)
    mine, expected = (torch.autograd.grad((y * y).sum(), latents)[0] for y in (found, whole))
    assert torch.allclose(mine, expected, atol=1e-10)


def test_a_tile_at_a_time():
    """No window is larger than a tile, and a file's strip is given away before the next row of tiles is read."""
    order, image = [], picture(90, 40)

    def window(top, left, height, width):
        assert height <= 32 and width <= 32
        order.append(("read", top))
        return image[..., top : top + height, left : left + width]

    rows = 0
    for strip in tiles.strips(lambda x: x, window, 90, 40, tile=32, context=2, blend=4):
        order.append(("gave", rows))
        rows += strip.shape[-2]
        assert strip.shape[-1] == 40 and strip.shape[-2] <= 32
    assert rows == 90
    reads = [i for i, (what, _) in enumerate(order) if what == "read"]
    gave = [i for i, (what, _) in enumerate(order) if what == "gave"]
    assert gave[0] < reads[2] and gave[-2] < gave[-1] and reads[-1] > gave[2]


def test_one_row_of_tiles_is_in_memory(tmp_path, monkeypatch):
    """When a row is made, nobody holds the row before it: of a large picture that would be gigabytes."""
    made, alive, strip_of = [], [], tiles._strip

    def watched(*arguments):
        alive.append(sum(ref() is not None for ref in made))
        strip, k = strip_of(*arguments)
        made.append(weakref.ref(strip))
        return strip, k

    monkeypatch.setattr(tiles, "_strip", watched)
    image = picture(120, 60)
    pictures.save(image, tmp_path / "in.png")
    tiles.upscaled(lambda x: x, pictures.read(tmp_path / "in.png"), tmp_path / "out.png", tile=32, context=2, blend=2)
    tiles.tiled(lambda x: x, image, tile=32, context=2, blend=2)
    assert len(alive) == 10 and max(alive) == 0


def test_from_file_to_file(tmp_path):
    image = (picture(75, 130) * 255).round() / 255
    pictures.save(image, tmp_path / "in.png", profile=b"\0" * 16 + b"RGB " + b"\0" * 108)
    large = network(2, k=2)
    function = lambda x: large(x) / 4 + 0.5
    opened = pictures.read(tmp_path / "in.png")
    tiles.upscaled(function, opened, tmp_path / "out.png", tile=32, context=3, blend=4)
    with Image.open(tmp_path / "out.png") as found:
        assert found.size == (260, 150) and found.info["icc_profile"][16:20] == b"RGB "
        expected = (function(image)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(found, float) - expected).max() <= 1


def test_a_failure_leaves_the_old_file(tmp_path):
    """A model that fails at its fifth tile: no half picture, and what was there before stays."""
    pictures.save(picture(70, 70), tmp_path / "in.png")
    (tmp_path / "out.png").write_bytes(b"old")
    calls = itertools.count()

    def function(x):
        if next(calls) == 4:
            raise RuntimeError("the fifth tile")
        return x

    with pytest.raises(RuntimeError, match="fifth"):
        tiles.upscaled(function, pictures.read(tmp_path / "in.png"), tmp_path / "out.png", tile=32, context=2, blend=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", "out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("function", "sizes", "says"),
    [
        (lambda x: x[..., :-1, :], (32, 2, 2), "same whole number of times larger"),
        (lambda x: F.avg_pool2d(x, 2), (32, 2, 2), "same whole number"),
        (lambda x: x.repeat(1, 1, 1, 2), (32, 2, 2), "same whole number"),
        (lambda x: x[0], (32, 2, 2), "same whole number"),
        (lambda x, c=itertools.count(): F.interpolate(x, scale_factor=1 + next(c)), (32, 2, 2), "1 as before"),
        (
            lambda x: x,
            (32, 12, 4),
            "Tiles of 32 px are too small for a context of 12 and a blend of 4 px; they need 38",
        ),
        (lambda x: x, (32, 2, 0), "blend at least 1"),
        (lambda x: x, (32, -1, 2), "context at least 0"),
    ],
)
def test_bad_functions_and_sizes(function, sizes, says):
    with pytest.raises(UserError, match=says):
        tiles.tiled(function, picture(50, 50), **dict(zip(("tile", "context", "blend"), sizes, strict=True)))
