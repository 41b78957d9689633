"""A diffusion model whose every answer is known: data from a mixture of isotropic Gaussians, with exact posterior, kernel and tilted law.

`Law` is a mixture; `MixtureModel` its exact denoiser; `Linear` and `Quadratic` are rewards whose soft values have closed forms.
Soft value at time t, alpha > 0: v_t(x) = alpha log E[exp(r(x_0) / alpha) | x_t = x], for the chain of exact reverse kernels.
Source of the soft value: SVDD, arXiv 2408.08252, section 4.1; the formulas are those of Gaussian posteriors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tropism.core import TERMINAL, Batch, Draw, Kernel, Stream, count_rows
from tropism.core import kernel as default_kernel
from tropism.process.gaussian import VP
from tropism.process.kernels import Mixture


@dataclass(frozen=True)
class Law:
    """sum_k weights_k N(means_k, variances_k I): weights (K,), means (K, d), variances (K,), float64."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, weights: Sequence[float], means: Sequence, variances: Sequence[float]) -> Law:
        """From plain numbers; means of one dimension may be numbers."""
        w, m, s = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, variances))
        return cls(w / w.sum(), m.reshape(len(w), -1), s)

    def _components(self, x: Tensor) -> Tensor:
        """log of weight times density, (B, K)."""
        square = (x.double()[:, None] - self.means).pow(2).sum(-1)
        d = self.means.shape[1]
        return self.weights.log() - 0.5 * square / self.variances - 0.5 * d * (2 * math.pi * self.variances).log()

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) of x (B, d)."""
        return torch.logsumexp(self._components(x), 1)

    def cdf(self, x: Tensor) -> Tensor:
        """Of one-dimensional laws: P(X <= x), the shape of x."""
        z = (x.double()[..., None] - self.means[:, 0]) / self.variances.sqrt()
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def mean(self) -> Tensor:
        """(d,)."""
        return self.weights @ self.means

    def noised(self, alpha_bar: float) -> Law:
        """The law of sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps."""
        return Law(self.weights, alpha_bar**0.5 * self.means, alpha_bar * self.variances + 1 - alpha_bar)

    def posterior(self, x_t: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor, Tensor]:
        """x_0 given x_t (B, d): weights (B, K), means (B, K, d), variances (K,)."""
        noised = self.noised(alpha_bar)
        gain = alpha_bar**0.5 * self.variances / noised.variances
        means = self.means + gain[:, None] * (x_t.double()[:, None] - noised.means)
        return noised._components(x_t).softmax(1), means, self.variances * (1 - alpha_bar) / noised.variances


# ---------------------------------------------------------------------------------------------------- rewards


@dataclass(frozen=True)
class Linear:
    """r(x) = slope . x; slope (d,)."""

    slope: Tensor
    name: str = "linear"

    def __call__(self, samples: Tensor, batch: Batch | None = None) -> Tensor:
        return samples @ self.slope.to(samples)

    def log_mean(self, weights: Tensor, means: Tensor, variances: Tensor, alpha: float) -> Tensor:
        """log E exp(r / alpha) under mixtures: weights (..., K), means (..., K, d), variances (K,)."""
        b = self.slope.to(means) / alpha
        return torch.logsumexp(weights.log() + means @ b + 0.5 * b.pow(2).sum() * variances, -1)

    def tilted(self, law: Law, alpha: float) -> Law:
        """law exp(r / alpha) / Z."""
        b = self.slope.double() / alpha
        log = law.weights.log() + law.means @ b + 0.5 * b.pow(2).sum() * law.variances
        return Law(log.softmax(0), law.means + law.variances[:, None] * b, law.variances)


@dataclass(frozen=True)
class Quadratic:
    """r(x) = -strength / 2 |x - centre|^2; centre (d,)."""

    centre: Tensor
    strength: float = 1.0
    name: str = "quadratic"

    def __call__(self, samples: Tensor, batch: Batch | None = None) -> Tensor:
        return -0.5 * self.strength * (samples - self.centre.to(samples)).pow(2).sum(-1)

    def _log_each(self, means: Tensor, variances: Tensor, alpha: float) -> Tensor:
        ratio, d = self.strength / alpha, means.shape[-1]
        spread = 1 + ratio * variances
        square = (means - self.centre.to(means)).pow(2).sum(-1)
        return -0.5 * d * spread.log() - 0.5 * ratio * square / spread

    def log_mean(self, weights: Tensor, means: Tensor, variances: Tensor, alpha: float) -> Tensor:
        """log E exp(r / alpha) under mixtures: weights (..., K), means (..., K, d), variances (K,)."""
        return torch.logsumexp(weights.log() + self._log_each(means, variances, alpha), -1)

    def tilted(self, law: Law, alpha: float) -> Law:
        """law exp(r / alpha) / Z."""
        ratio = self.strength / alpha
        variances = 1 / (1 / law.variances + ratio)
        means = variances[:, None] * (law.means / law.variances[:, None] + ratio * self.centre.double())
        log = law.weights.log() + self._log_each(law.means, law.variances, alpha)
        return Law(log.softmax(0), means, variances)


# ---------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class _Cond:
    shape: tuple[int, ...]
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows) -> _Cond:
        return replace(self, rows=len(range(self.rows)[rows]) if isinstance(rows, slice) else len(rows))


class MixtureModel:
    """The exact denoiser of a law: `predict` is E[x_0 | x_t], float64. `calls` counts its rows as a network's.

    exact: `kernel` is the true reverse transition, whose chain gives the data law for any number of steps; False is DDIM with
    eta = 1 on the posterior mean, the chain that a network would run. Rewards take samples (B, d).
    """

    dtype, device, prediction, steps, guidance = torch.float64, torch.device("cpu"), "sample", 10, 1.0

    def __init__(self, law: Law, alpha_bars: Sequence[float] | None = None, *, exact: bool = True):
        """alpha_bars: of the times 1..T, default cos^2(.98 pi / 2 t / T) for T = 10; the clean state has 1."""
        table = alpha_bars or [math.cos(0.98 * math.pi / 2 * t / 10) ** 2 for t in range(1, 11)]
        self.law, self.exact, self.steps = law, exact, len(table)
        self.process = VP(tuple(table), "trailing", 0, 1.0, 1.0)
        self.calls = {"network": 0, "backward": 0, "decode": 0}

    def encode(self, batch: Batch, draw: Draw | None = None) -> _Cond:
        return _Cond((self.law.means.shape[1],), len(batch))

    def start(self, cond: Any, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
        return draw(Stream.PRIOR, 0, cond.shape).double(), 0

    def _bar(self, t: float) -> float:
        return float(self.process.alpha(t)) ** 2

    def predict(self, x_t: Tensor, t: float | Tensor, cond: Any, guidance: float) -> Tensor:
        weights, means, _ = self.law.posterior(x_t, self._bar(float(t)))
        out = (weights[..., None] * means).sum(1)
        count_rows(self.calls, out, len(x_t))
        return out

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor) -> Tensor:
        return out

    def kernel(self, x_t: Tensor, t: float, s: float, cond, guidance: float, prediction: Tensor | None = None):
        """The exact transition p(x_s | x_t), or the process's own."""
        out = self.predict(x_t, t, cond, guidance) if prediction is None else prediction
        if not self.exact:
            return default_kernel(self, x_t, t, s, cond, guidance, out)
        return self._exact(x_t, self._bar(t), self._bar(s)), out

    def _exact(self, x_t: Tensor, bar_t: float, bar_s: float) -> Kernel:
        """k ~ R, x_0 ~ N(m_k, v_k), x_s ~ q(x_s | x_t, x_0), the Gaussians joined."""
        weights, means, variances = self.law.posterior(x_t, bar_t)
        ratio = bar_t / bar_s
        gain, keep = bar_s**0.5 * (1 - ratio) / (1 - bar_t), ratio**0.5 * (1 - bar_s) / (1 - bar_t)
        spread = gain**2 * variances + (1 - bar_s) * (1 - ratio) / (1 - bar_t)
        return Mixture(weights, gain * means + keep * x_t.double()[:, None], spread.sqrt().expand(len(x_t), -1))

    def decode(self, x0: Tensor) -> Tensor:
        self.calls["decode"] += len(x0)
        return x0

    def latents(self, samples: Tensor) -> Tensor:
        return samples

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def soft_value(self, x_t: Tensor, t: float, reward: Linear | Quadratic, alpha: float) -> Tensor:
        """v_t (B,) in closed form; at TERMINAL the reward."""
        if t == TERMINAL:
            return reward(x_t)
        return alpha * reward.log_mean(*self.law.posterior(x_t, self._bar(t)), alpha)

    def log_z(self, reward: Linear | Quadratic, alpha: float) -> float:
        """log E exp(r / alpha) over the data law."""
        return reward.log_mean(self.law.weights, self.law.means, self.law.variances, alpha).item()
