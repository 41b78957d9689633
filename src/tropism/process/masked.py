"""Masked (absorbing) discrete diffusion: x_t is x_0 with each token replaced by MASK with probability m(t), independently.

Tokens are 0..V-1, MASK is V. A state is (B, L), long; relaxed states are one-hot rows (B, L, V + 1), for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.core import TERMINAL, UserError
from tropism.process.kernels import Categorical, RelaxedCategorical, uniforms


@dataclass(frozen=True)
class Masked:
    """The log-linear schedule m(t) = (1 - end) t on t in (0, 1], in SUBS form: decoded tokens never change, MASK is never predicted.

    vocabulary: V. end: chance that a token survives at t = 1. temperature: of relaxed states' gradients.
    fill: "sample" draws what is still masked in the last step, to t = 0, where m = 0; "argmax" takes the likeliest token there.
    Source: Simple and Effective Masked Diffusion Language Models, arXiv 2406.07524, eq. 6 and 10, section 3.2.3 (SUBS).
    """

    vocabulary: int
    end: float = 1e-3
    temperature: float = 1.0
    fill: str = "sample"

    def __post_init__(self):
        if self.vocabulary < 2 or not 0 <= self.end < 1 or not self.temperature > 0:
            raise UserError(
                f"A masked process needs at least 2 tokens, an end in [0, 1) and a positive temperature, not {self.vocabulary}, "
                f"{self.end} and {self.temperature}. Try Masked(4)."
            )
        if self.fill not in ("sample", "argmax"):
            raise UserError(f"fill is {self.fill!r}; it must be sample or argmax.")

    @property
    def mask(self) -> int:
        return self.vocabulary

    def times(self, steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """(steps + 1,) float64: 1, ..., 1 / steps, then TERMINAL, which stands for t = 0."""
        if steps < 1:
            raise UserError(f"steps is {steps}; it must be at least 1. Try --steps 64.")
        t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        return torch.cat([t, torch.tensor([TERMINAL], dtype=torch.float64)])

    def alpha(self, t: float | Tensor) -> float | Tensor:
        """Chance that a token is not masked."""
        return 1 - self.sigma(t)

    def sigma(self, t: float | Tensor) -> float | Tensor:
        """m(t): chance that a token is masked."""
        if isinstance(t, Tensor) and t.ndim:
            return torch.where(t == TERMINAL, 0.0, (1 - self.end) * t.double())
        return 0.0 if float(t) == TERMINAL else (1 - self.end) * float(t)

    def forward(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """x_t (B, L) of clean tokens (B, L) from standard normals (B, L)."""
        chance = torch.as_tensor(self.sigma(t), dtype=torch.float64, device=x0.device).reshape(-1, 1)
        return torch.where(uniforms(noise).to(x0.device) < chance, self.mask, x0)

    def loss_weight(self, t: float | Tensor) -> float | Tensor:
        """Weight m'(t) / m(t) = 1 / t of a masked token's cross entropy in the negative evidence bound."""
        return 1 / t

    def reverse(self, x_t: Tensor, x0: Tensor, t: float, s: float) -> Categorical | RelaxedCategorical:
        """p(x_s | x_t) for predicted probabilities x0 (B, L, V): a masked token stays so with chance m(s) / m(t)."""
        stay = float(self.sigma(s)) / float(self.sigma(t))
        if x_t.is_floating_point():
            return self._relaxed(x_t, x0, stay)
        if stay == 0 and self.fill == "argmax":
            x0 = torch.nn.functional.one_hot(x0.argmax(-1), self.vocabulary).to(x0)
        drawn = torch.cat([(1 - stay) * x0, x0.new_full((*x0.shape[:2], 1), stay)], -1)
        frozen = torch.nn.functional.one_hot(x_t, self.vocabulary + 1).to(x0)
        return Categorical(torch.where((x_t == self.mask)[..., None], drawn, frozen))

    def _relaxed(self, x_t: Tensor, x0: Tensor, stay: float) -> RelaxedCategorical:
        tiny = torch.finfo(x0.dtype).tiny
        log = torch.cat([(1 - stay) * x0, x0.new_full((*x0.shape[:2], 1), stay)], -1).clamp_min(tiny).log()
        return RelaxedCategorical(log, x_t, x_t[..., -1] < 0.5, self.temperature)

    def complete(self, x_t: Tensor, x0: Tensor, noise: Tensor | None = None) -> Tensor:
        """Clean tokens (B, L): what is masked is filled from x0 (B, L, V), the likeliest or, with normals (B, L), a draw.

        x0 may be tokens (B, L) too.

        A relaxed state keeps its rows and its gradient: (B, L, V), masked rows become x0's probabilities.
        """
        if x_t.is_floating_point():
            return x_t[..., :-1] + x_t[..., -1:] * x0
        if not x0.is_floating_point():  # clean tokens already
            return torch.where(x_t == self.mask, x0, x_t)
        fill = x0.argmax(-1) if noise is None else Categorical(x0).sample(noise)
        return torch.where(x_t == self.mask, fill, x_t)
