"""Degradations: what is drawn, how often, and what it does to a picture."""

import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tropism.core import UserError
from tropism.restore.degrade import (
    PRESETS,
    Degradation,
    Stage,
    degraded,
    drawn,
    gaussian_noise,
    jpeg,
    poisson_noise,
    preset,
)

REAL = PRESETS["realesrgan"]
PICTURES = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def many():
    return [drawn(REAL, 0, i) for i in range(10_000)]


# ---------------------------------------------------------------------------------------------------- what is drawn


def near(share, expected, tolerance=0.02):
    assert abs(share - expected) < tolerance, (share, expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_options_come_as_often_as_published(many, stage):
    """The table of Real-ESRGAN's x4plus file, both columns, over 10,000 draws."""
    rounds = [d.rounds[stage] for d in many]
    share = lambda what, among=rounds: sum(map(what, among)) / len(among)
    near(share(lambda r: r.blur is not None), (1.0, 0.8)[stage])
    for direction, expected in zip(("up", "down", "keep"), ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))[stage], strict=True):
        near(share(lambda r, d=direction: r.direction == d), expected)
    near(share(lambda r: r.noise == "gaussian"), 0.5)
    near(share(lambda r: r.grey), 0.4)
    for mode in ("area", "bilinear", "bicubic"):
        near(share(lambda r, m=mode: r.mode == m), 1 / 3)
    blurs = [r.blur for r in rounds if r.blur]
    near(share(lambda b: b.family == "sinc", blurs), 0.1)
    families = Counter(b.family for b in blurs if b.family != "sinc")
    shares = {"iso": 0.45, "aniso": 0.25, "generalised iso": 0.12, "generalised aniso": 0.03}
    for family, expected in {**shares, "plateau iso": 0.12, "plateau aniso": 0.03}.items():
        near(families[family] / families.total(), expected, 0.015)
    sizes = Counter(b.size for b in blurs)
    assert sorted(sizes) == [7, 9, 11, 13, 15, 17, 19, 21]
    assert all(abs(n / sizes.total() - 1 / 8) < 0.02 for n in sizes.values())


def spread(values, least, most):
    """Uniform between two ends: near them, never beyond, and the mean in the middle."""
    values, width = np.array(values, float), most - least
    assert least <= values.min() < least + 0.03 * width, values.min()
    assert most - 0.03 * width < values.max() <= most, values.max()
    assert abs(values.mean() - (least + most) / 2) < 0.05 * width


@pytest.mark.parametrize("stage", [0, 1])
def test_ranges_are_the_published_ones(many, stage):
    rounds = [d.rounds[stage] for d in many]
    blurs = [r.blur for r in rounds if r.blur and r.blur.family != "sinc"]
    spread([b.sigma[0] for b in blurs], 0.2, (3, 1.5)[stage])
    spread([b.sigma[1] for b in blurs], 0.2, (3, 1.5)[stage])
    round_ones, uneven = ([b for b in blurs if ("aniso" in b.family) == way] for way in (False, True))
    spread([b.angle for b in uneven], -math.pi, math.pi)
    assert all(b.sigma[0] == b.sigma[1] and b.angle == 0 for b in round_ones)
    assert all(b.sigma[0] != b.sigma[1] for b in uneven)
    for direction, (least, most) in {
        "down": ((0.15, 0.3)[stage], 1.0),
        "up": (1.0, (1.5, 1.2)[stage]),
    }.items():
        spread([r.factor for r in rounds if r.direction == direction], least, most)
    assert {r.factor for r in rounds if r.direction == "keep"} == {1.0}
    spread([r.level for r in rounds if r.noise == "gaussian"], 1, (30, 25)[stage])
    spread([r.level for r in rounds if r.noise == "poisson"], 0.05, (3, 2.5)[stage])
    assert {r.quality for r in rounds} == (set(range(30, 96)) if stage == 0 else {None})


def test_exponents_lie_half_below_one(many):
    blurs = [r.blur for d in many for r in d.rounds if r.blur]
    bells = [b.beta for b in blurs if b.family.startswith("generalised")]
    near(np.mean(np.array(bells) < 1), 0.5, 0.03)
    spread([b for b in bells if b < 1], 0.5, 1)
    spread([b for b in bells if b > 1], 1, 4)
    tables = [b.beta for b in blurs if b.family.startswith("plateau")]
    near(np.mean(np.array(tables) == 1), 0.5, 0.03)
    spread([b for b in tables if b > 1], 1, 2)
    assert {b.beta for b in blurs if b.family in ("iso", "aniso")} == {1.0}


def test_the_last_steps_come_as_often_as_published(many):
    near(np.mean([d.sinc is not None for d in many]), 0.8)
    near(np.mean([d.jpeg_first for d in many]), 0.5)
    assert {d.quality for d in many} == set(range(30, 96))
    last = [d.sinc for d in many if d.sinc]
    for above in (False, True):
        spread([b.cutoff for b in last if (b.size >= 13) == above], math.pi / 3, math.pi)
        within = [r.blur for d in many for r in d.rounds if r.blur and r.blur.family == "sinc"]
        spread([b.cutoff for b in within if (b.size >= 13) == above], math.pi / (5 if above else 3), math.pi)


def test_every_kernel_sums_to_one_in_21_by_21(many):
    seen = Counter()
    for d in many[:400]:
        for found in [r.blur for r in d.rounds] + [d.sinc]:
            if found:
                seen[found.family] += 1
                assert found.kernel.shape == (21, 21)
                assert abs(found.kernel.sum() - 1) < 1e-5
    assert len(seen) == 7


def test_draws_hang_on_seed_and_index_alone():
    assert drawn(REAL, 3, 7) == drawn(REAL, 3, 7)
    assert len({str(drawn(REAL, seed, i)) for seed in range(3) for i in range(3)}) == 9


# ---------------------------------------------------------------------------------------------------- what is done


@pytest.mark.parametrize("name", PRESETS)
def test_a_degraded_picture(name):
    how = preset(name)
    low = degraded(PICTURES, how, 1)
    assert low.shape == (3, 3, 8, 12) and low.dtype == torch.float32
    steps = low.double() * 255
    assert (steps - steps.round()).abs().max() < 1e-4 and low.min() >= 0 and low.max() <= 1
    assert torch.equal(low, (low * 255).round() / 255)
    assert torch.equal(low, degraded(PICTURES, how, 1))
    assert torch.equal(low[[2, 0]], degraded(PICTURES[[2, 0]], how, 1, [2, 0])), "other pictures of the batch count"
    chance = name != "bicubic"
    assert torch.equal(low, degraded(PICTURES, how, 2)) != chance
    assert torch.equal(low[0], degraded(PICTURES[:1], how, 1, [5])[0]) != chance


def test_other_scales_and_small_pictures():
    assert degraded(PICTURES, replace(REAL, scale=2), 0).shape == (3, 3, 16, 24)
    for seed in range(12):  # a first resize to .15 of 4 pixels leaves one
        assert degraded(PICTURES[:1, :, :4, :4], REAL, seed).shape == (1, 3, 1, 1)
    assert degraded(PICTURES[:0], REAL, 0).shape == (0, 3, 8, 12)
    assert degraded(PICTURES.double(), REAL, 0).dtype == torch.float64
    assert degraded(PICTURES.bfloat16(), REAL, 0).dtype == torch.float32


def test_a_double_picture_degrades_as_a_single_one():
    """To within one step of 8 bits, without JPEG, which magnifies a step."""
    how = replace(REAL, jpeg=None, stages=tuple(replace(s, jpeg=None, gaussian=1.0) for s in REAL.stages))
    far = (degraded(PICTURES.double(), how, 4) - degraded(PICTURES, how, 4)).abs()
    assert far.max() < 1.01 / 255


def test_bicubic_is_pillows():
    pixels = (PICTURES[0] * 255).round().byte()
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    low = degraded(pixels[None].float() / 255, PRESETS["bicubic"], 0)[0] * 255
    assert np.abs(low.permute(1, 2, 0).numpy() - np.asarray(small, float)).max() <= 1.001


def test_factors_are_of_the_final_size_or_of_the_current_one():
    """The same draw twice: 32 x 48 times a factor, or 8 x 12 times it, and then to 8 x 12."""
    still = Stage(blur=0, resize=(0, 1, 0), factor=(0.3, 0.6), gaussian=1, noise=(0, 0), jpeg=None)
    for of_target, sides in ((False, (32, 48)), (True, (8, 12))):
        how = Degradation((replace(still, of_target=of_target),), modes=("area",))
        factor = drawn(how, 0, 0).rounds[0].factor
        small = F.interpolate(PICTURES[:1], [int(n * factor) for n in sides], mode="area")
        expected = F.interpolate(small, (8, 12), mode="area")
        assert (degraded(PICTURES[:1], how, 0) - expected).abs().max() <= 0.501 / 255


def test_every_picture_and_stage_has_noise_of_its_own():
    """With nothing else left to chance: other pixels for another index, another seed, another stage."""
    noisy = Stage(blur=0, resize=(0, 0, 1), gaussian=1, noise=(20, 20), grey=0, jpeg=None)
    grey = torch.full((1, 3, 64, 64), 0.5)
    once, twice = Degradation((noisy,), scale=1), Degradation((noisy, noisy), scale=1)
    a, b, c = ((degraded(grey, once, s, [i]) - grey).flatten() for s, i in ((0, 0), (0, 1), (1, 0)))
    for one, other in ((a, b), (a, c)):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.05
    both = degraded(grey, twice, 0, [0]) - grey
    assert both.std().item() * 255 == pytest.approx(20 * math.sqrt(2), rel=0.03), "the second field repeats the first"


def test_every_step_leaves_its_mark():
    """One option at a time over a picture that else only shrinks."""
    still = Stage(blur=0, resize=(0, 0, 1), gaussian=1, noise=(0, 0), jpeg=None)
    plain = Degradation((still,), modes=("area",))
    low = degraded(PICTURES, plain, 0)
    marks = {
        "blur": replace(plain, stages=(replace(still, blur=1.0, sinc=0, sigma=(2, 3)),)),
        "resize": replace(plain, stages=(replace(still, resize=(0, 1, 0), factor=(0.2, 0.3)),)),
        "gaussian": replace(plain, stages=(replace(still, noise=(20, 30)),)),
        "poisson": replace(plain, stages=(replace(still, gaussian=0, poisson=(1, 2)),)),
        "jpeg": replace(plain, stages=(replace(still, jpeg=(30, 30)),)),
        "last jpeg": replace(plain, jpeg=(30, 30), jpeg_first=0),
        "first jpeg": replace(plain, jpeg=(30, 30), jpeg_first=1),
        "last sinc": replace(plain, sinc=1.0),
    }
    found = {name: degraded(PICTURES, how, 0) for name, how in marks.items()}
    for name, other in found.items():
        assert (other - low).abs().mean() > 1 / 255, name
    assert not torch.equal(found["last jpeg"], found["first jpeg"])


def test_shuffled_steps():
    orders = Counter(drawn(PRESETS["bsrgan-lite"], 0, i).rounds[0].order for i in range(3000))
    assert len(orders) == 6 and all(abs(n / 3000 - 1 / 6) < 0.04 for n in orders.values())
    first = {drawn(PRESETS["bsrgan-lite"], 0, i).rounds[0].order: i for i in range(300)}
    assert len({str(degraded(PICTURES[:1], PRESETS["bsrgan-lite"], 0, [i])) for i in first.values()}) == 6
    assert {r.order for i in range(50) for r in drawn(REAL, 0, i).rounds} == {("blur", "resize", "noise")}


def test_shuffling_changes_the_picture():
    """The same draws in two orders: noise before a strong blur is gone, after it is not."""
    stage = Stage(blur=1.0, sinc=0.0, sigma=(2.9, 3), resize=(0, 0, 1), gaussian=1.0, noise=(29, 30), jpeg=None)
    how = Degradation((stage,), scale=1, shuffled=True)
    flat, rough = torch.full((1, 3, 32, 32), 0.5), {}
    for i in range(20):
        order = drawn(how, 0, i).rounds[0].order
        rough[order.index("noise") < order.index("blur")] = degraded(flat, how, 0, [i]).std().item()
    assert rough[True] < 0.5 * rough[False]


# ---------------------------------------------------------------------------------------------------- noise and JPEG


def test_gaussian_noise_has_its_deviation():
    picture = torch.full((1, 3, 300, 300), 0.5, dtype=torch.float64)
    for grey in (False, True):
        added = gaussian_noise(picture, 20, grey, np.random.default_rng(0)) - picture
        assert added.std().item() * 255 == pytest.approx(20, rel=0.02)
        assert abs(added.mean().item()) < 1e-3
        assert torch.allclose(added[:, 0], added[:, 1], atol=1e-15) == grey


@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_has_the_variance_of_its_counts(grey):
    """Two grey levels, so counts are of 2 values: the variance of x is level^2 x / 2."""
    dark, light = 51 / 255, 204 / 255
    picture = torch.full((1, 3, 400, 400), dark, dtype=torch.float64)
    picture[..., 200:] = light
    added = poisson_noise(picture, 0.7, grey, np.random.default_rng(0)) - picture
    for part, x in ((added[..., :200], dark), (added[..., 200:], light)):
        assert part.mean().item() == pytest.approx(0, abs=0.005)
        assert part.var().item() == pytest.approx(0.7**2 * x / 2, rel=0.03)
    assert torch.allclose(added[:, 0], added[:, 2], atol=1e-12) == grey


def test_poisson_counts_go_up_to_a_power_of_two():
    """Five levels count in eighths; pure black stays."""
    levels = torch.tensor([10, 60, 110, 160, 210]).double().repeat_interleave(6000).reshape(1, 1, 100, 300) / 255
    picture = levels.expand(1, 3, 100, 300)
    added = poisson_noise(picture, 1.0, False, np.random.default_rng(1)) - picture
    bright = added[picture == 210 / 255]
    assert bright.var().item() == pytest.approx(210 / 255 / 8, rel=0.05)
    black = torch.zeros(1, 3, 4, 4)
    assert torch.equal(poisson_noise(black, 3.0, False, np.random.default_rng(0)), black)


def test_jpeg_is_pillows_file():
    pixels = (PICTURES[:1] * 255).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    beyond = pixels.float() / 255
    beyond[beyond == 1], beyond[beyond == 0] = 1.5, -0.5
    assert torch.equal((jpeg(beyond, 40)[0] * 255).round().byte(), expected)
    assert torch.equal(jpeg(beyond, None), beyond)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: preset("real-esrgan"), "no degradation 'real-esrgan'. Give one of realesrgan, bsrgan-lite, bicubic"),
        (lambda: degraded(PICTURES[..., :30, :46], REAL, 0), "46 x 30 pixels does not divide by 4. Crop it to 44 x 28"),
        (lambda: degraded(PICTURES[:, :1], REAL, 0), r"not \(3, 1, 32, 48\)"),
        (lambda: degraded(PICTURES[0], REAL, 0), r"not \(3, 32, 48\)"),
        (lambda: Degradation(scale=0), "scale is 0; give a whole number"),
        (lambda: Stage(families=(0.5, 0.5)), "give 6 probabilities"),
        (lambda: Stage(resize=(0.5, 0.6, -0.1)), "give 3 probabilities"),
        (lambda: Stage(size=(7, 20)), "two odd kernel sizes"),
        (lambda: Stage(size=(7, 23)), "up to 21"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(UserError, match=says):
        make()
