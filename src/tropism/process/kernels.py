"""Transition kernels beside core.Normal: a mixture of Gaussians for exact worlds, categorical ones for tokens.

All of them draw from standard normals, so that one keyed noise serves every kernel: a uniform number is the normal's own quantile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def uniforms(noise: Tensor) -> Tensor:
    """Standard normals -> uniforms in (0, 1), float64."""
    return torch.special.ndtr(noise.double()).clamp(1e-12, 1 - 1e-12)


def _choice(probs: Tensor, u: Tensor) -> Tensor:
    """Indices (...) of categories of probs (..., V), not normalised, by the inverse of their cumulative sum at u (...)."""
    total = probs.double().cumsum(-1)
    return (total <= (u.to(total.device) * total[..., -1])[..., None]).sum(-1).clamp_max(probs.shape[-1] - 1)


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(mean_k, std_k^2): weights (B, K), means (B, K, d), stds (B, K). A zero std is a point: no density."""

    weights: Tensor
    means: Tensor
    stds: Tensor
    is_deterministic: bool = False

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One number chooses the component, d are its noise."""
        return (1 + self.means.shape[-1],)

    def sample(self, noise: Tensor) -> Tensor:
        """(B, d) from standard normals (B, 1 + d)."""
        k = _choice(self.weights, uniforms(noise[:, 0]))
        row = torch.arange(len(k), device=k.device)
        return self.means[row, k] + self.stds[row, k, None] * noise[:, 1:].to(self.means)

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) float64."""
        z = (x.double()[:, None] - self.means.double()) / self.stds.double()[..., None]
        log = -0.5 * z**2 - self.stds.double().log()[..., None] - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(log.sum(-1) + self.weights.double().log(), 1)

    def log_ratio(self, other: Mixture, x: Tensor) -> Tensor:
        return self.log_prob(x) - other.log_prob(x)


@dataclass(frozen=True)
class Categorical:
    """Independent tokens: probs (B, L, V) sum to 1 over V; a sample is (B, L), long."""

    probs: Tensor
    is_deterministic: bool = False

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One number a position."""
        return (self.probs.shape[1],)

    def sample(self, noise: Tensor) -> Tensor:
        """(B, L) from standard normals (B, L)."""
        return _choice(self.probs, uniforms(noise))

    def _log(self, x: Tensor) -> Tensor:
        return self.probs.double().gather(-1, x[..., None])[..., 0].log()

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) float64, -inf for a token of probability 0."""
        return self._log(x).sum(1)

    def log_ratio(self, other: Categorical, x: Tensor) -> Tensor:
        mine, theirs = self._log(x), other._log(x)
        return torch.where(mine == theirs, 0.0, mine - theirs).sum(1)


@dataclass(frozen=True)
class RelaxedCategorical:
    """Tokens as one-hot rows with a straight-through gradient: forward a hard draw, backward the softmax of the perturbed logits.

    log_probs (B, L, V), differentiable; kept (B, L) marks positions that are already decoded, whose rows of `x_t` (B, L, V) are copied
    outside the softmax, with their gradient. temperature: of the softmax that the gradient sees; small is near the hard draw but noisy.
    Source: Categorical Reparameterization with Gumbel-Softmax, arXiv 1611.01144, section 2.2 (straight-through).
    """

    log_probs: Tensor
    x_t: Tensor
    kept: Tensor
    temperature: float = 1.0
    is_deterministic: bool = False

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.log_probs.shape[1:])

    def sample(self, noise: Tensor) -> Tensor:
        """(B, L, V), one-hot in its values, from standard normals (B, L, V)."""
        gumbel = -(-uniforms(noise).log()).log()
        perturbed = (self.log_probs + gumbel.to(self.log_probs)) / self.temperature
        soft = perturbed.softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, perturbed.argmax(-1, keepdim=True), 1.0)
        drawn = hard + (soft - soft.detach())
        return torch.where(self.kept[..., None], self.x_t, drawn)

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) float64 of one-hot rows, kept positions left out."""
        rows = torch.where(x > 0.5, self.log_probs.double(), 0.0).sum(-1)
        return torch.where(self.kept, 0.0, rows).sum(1)

    def log_ratio(self, other: RelaxedCategorical, x: Tensor) -> Tensor:
        return self.log_prob(x) - other.log_prob(x)
