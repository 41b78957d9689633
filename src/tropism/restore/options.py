"""The options of a degradation, and what is drawn from them for one picture: no pixel is looked at here.

Three presets: `realesrgan`, Real-ESRGAN's second-order degradation with its published numbers; `bsrgan-lite`, our lighter one in the
manner of BSRGAN: Gaussian blur, resize and noise once, in random order, then JPEG; `bicubic`, the classical antialiased reduction
alone, where nothing is left to chance.
Source: Wang et al., arXiv 2107.10833, and its options/train_realesrgan_x4plus.yml; Zhang et al., arXiv 2103.14006 (BSRGAN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tropism.core import Stream, UserError, generator
from tropism.restore import kernels

Range = tuple[float, float]
FAMILIES = ("iso", "aniso", "generalised iso", "generalised aniso", "plateau iso", "plateau aniso")
DIRECTIONS = ("up", "down", "keep")
MODES = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class Stage:
    """One round of blur, resize, noise and JPEG. Probabilities in [0, 1]; lengths in pixels; noise levels of pixels in 0..255.

    blur: how often the picture is blurred at all. size: the kernel's, odd. families: probabilities of FAMILIES. sinc: how often a
    low-pass kernel stands in for all of them. sigma, beta, plateau: ranges of the width and of the two exponents; half of the exponents
    lie below 1 and half above. resize: probabilities of DIRECTIONS; factor: the smallest and largest. of_target: whether a factor is of the
    final size rather than of the current one. gaussian: how often the noise is Gaussian, else Poisson; grey: how often the three
    channels share it. jpeg: range of the quality, None for no file after this stage.
    """

    blur: float = 1.0
    size: tuple[int, int] = (7, kernels.LARGEST)
    families: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc: float = 0.1
    sigma: Range = (0.2, 3.0)
    beta: Range = (0.5, 4.0)
    plateau: Range = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    factor: Range = (0.15, 1.5)
    of_target: bool = False
    gaussian: float = 0.5
    noise: Range = (1.0, 30.0)
    poisson: Range = (0.05, 3.0)
    grey: float = 0.4
    jpeg: tuple[int, int] | None = (30, 95)

    def __post_init__(self):
        for name, count in (("families", len(FAMILIES)), ("resize", len(DIRECTIONS))):
            given = getattr(self, name)
            if len(given) != count or min(given) < 0 or abs(sum(given) - 1) > 1e-6:
                raise UserError(f"{name} is {given}; give {count} probabilities that add up to 1.")
        if not (self.size[0] % 2 == self.size[1] % 2 == 1 and 1 <= self.size[0] <= self.size[1] <= kernels.LARGEST):
            raise UserError(
                f"size is {self.size}; give two odd kernel sizes, the smaller first, up to {kernels.LARGEST}."
            )


@dataclass(frozen=True)
class Degradation:
    """The whole: stages, then the resize to 1 / scale and a low-pass of probability `sinc`, before or after a JPEG file.

    jpeg_first: how often JPEG comes before that resize. jpeg: range of its quality, None for none. shuffled: whether blur, resize and
    noise of a stage come in random order. modes: interpolations to draw from. antialias: whether the last resize filters before it samples.
    """

    stages: tuple[Stage, ...] = ()
    scale: int = 4
    sinc: float = 0.0
    jpeg_first: float = 0.5
    jpeg: tuple[int, int] | None = None
    shuffled: bool = False
    modes: tuple[str, ...] = MODES
    antialias: bool = False

    def __post_init__(self):
        if self.scale < 1 or self.scale != int(self.scale):
            raise UserError(f"scale is {self.scale}; give a whole number of at least 1, such as 4.")


PRESETS = {
    "realesrgan": Degradation(
        stages=(
            Stage(),
            Stage(
                blur=0.8,
                sigma=(0.2, 1.5),
                resize=(0.3, 0.4, 0.3),
                factor=(0.3, 1.2),
                of_target=True,
                noise=(1.0, 25.0),
                poisson=(0.05, 2.5),
                jpeg=None,
            ),
        ),
        sinc=0.8,
        jpeg=(30, 95),
    ),
    "bsrgan-lite": Degradation(
        stages=(
            Stage(
                families=(0.5, 0.5, 0.0, 0.0, 0.0, 0.0),
                sinc=0.0,
                sigma=(0.1, 2.8),
                factor=(0.5, 1.5),
                gaussian=1.0,
                noise=(2.0, 25.0),
                grey=0.5,
                jpeg=None,
            ),
        ),
        jpeg_first=0.0,
        jpeg=(30, 95),
        shuffled=True,
    ),
    "bicubic": Degradation(modes=("bicubic",), antialias=True),
}


def preset(name: str) -> Degradation:
    """The options of a name. Raises UserError, with the names there are."""
    if name not in PRESETS:
        raise UserError(f"There is no degradation '{name}'. Give one of {', '.join(PRESETS)}.")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Blur:
    """A kernel as it was drawn: its family ("sinc" or one of FAMILIES) and what that family reads."""

    family: str
    size: int
    sigma: Range = (1.0, 1.0)
    angle: float = 0.0
    beta: float = 1.0
    cutoff: float = math.pi

    @cached_property
    def kernel(self) -> np.ndarray:
        """(21, 21) float64 with sum 1."""
        if self.family == "sinc":
            return kernels.padded(kernels.sinc(self.size, self.cutoff))
        shape = kernels.plateau if self.family.startswith("plateau") else kernels.gaussian
        return kernels.padded(shape(self.size, self.sigma, self.angle, self.beta))


@dataclass(frozen=True)
class Round:
    """What one stage does to one picture, in `order`; `level` is a standard deviation in 0..255 (Gaussian) or a factor (Poisson)."""

    blur: Blur | None
    direction: str
    factor: float
    mode: str
    noise: str
    level: float
    grey: bool
    quality: int | None
    order: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """All that is drawn for one picture but the noise of its pixels."""

    rounds: tuple[Round, ...]
    sinc: Blur | None
    mode: str
    jpeg_first: bool
    quality: int | None


def drawn(how: Degradation, seed: int, index: int) -> Drawn:
    """What happens to the picture of this index: a pure function of the arguments, which looks at no pixel."""
    rng = generator(seed, Stream.DEGRADE, 0, index)
    rounds = tuple(_round(how, stage, rng) for stage in how.stages)
    return Drawn(
        rounds,
        _sinc(rng, (7, kernels.LARGEST), (math.pi / 3, math.pi / 3)) if rng.random() < how.sinc else None,
        _one_of(rng, how.modes),
        rng.random() < how.jpeg_first,
        _quality(rng, how.jpeg),
    )


def _round(how: Degradation, stage: Stage, rng: np.random.Generator) -> Round:
    blurred = _blur(stage, rng) if rng.random() < stage.blur else None
    direction = _one_of(rng, DIRECTIONS, stage.resize)
    least, most = {"up": (1.0, stage.factor[1]), "down": (stage.factor[0], 1.0), "keep": (1.0, 1.0)}[direction]
    noise = "gaussian" if rng.random() < stage.gaussian else "poisson"
    order = ("blur", "resize", "noise")
    return Round(
        blurred,
        direction,
        rng.uniform(least, most),
        _one_of(rng, how.modes),
        noise,
        rng.uniform(*(stage.noise if noise == "gaussian" else stage.poisson)),
        rng.random() < stage.grey,
        _quality(rng, stage.jpeg),
        tuple(order[i] for i in rng.permutation(3)) if how.shuffled else order,
    )


def _blur(stage: Stage, rng: np.random.Generator) -> Blur:
    if rng.random() < stage.sinc:
        return _sinc(rng, stage.size, (math.pi / 3, math.pi / 5))
    family = _one_of(rng, FAMILIES, stage.families)
    size, along, beta = _odd(rng, stage.size), rng.uniform(*stage.sigma), 1.0
    across, angle = along, 0.0
    if family.endswith("aniso"):
        across, angle = rng.uniform(*stage.sigma), rng.uniform(-math.pi, math.pi)
    if family not in ("iso", "aniso"):
        least, most = stage.plateau if family.startswith("plateau") else stage.beta
        beta = rng.uniform(least, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, most)
    return Blur(family, size, (along, across), angle, beta)


def _sinc(rng: np.random.Generator, sizes: tuple[int, int], lowest: Range) -> Blur:
    """`lowest` is the least cutoff of kernels below 13 pixels, and of the others: a low cutoff needs room for its lobes."""
    size = _odd(rng, sizes)
    return Blur("sinc", size, cutoff=rng.uniform(lowest[size >= 13], math.pi))


def _odd(rng: np.random.Generator, sizes: tuple[int, int]) -> int:
    return sizes[0] + 2 * int(rng.integers((sizes[1] - sizes[0]) // 2 + 1))


def _one_of(rng: np.random.Generator, names: Sequence[str], probabilities: Sequence[float] | None = None) -> str:
    place = rng.random() * len(names)
    if probabilities is not None:  # numpy's own choice takes ten times longer
        place = int(np.searchsorted(np.cumsum(probabilities), place / len(names), side="right"))
    return names[min(int(place), len(names) - 1)]


def _quality(rng: np.random.Generator, qualities: tuple[int, int] | None) -> int | None:
    return int(rng.integers(qualities[0], qualities[1] + 1)) if qualities else None
