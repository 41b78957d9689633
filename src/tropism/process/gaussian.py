"""Gaussian noising processes: x_t = alpha_t x_0 + sigma_t eps, and the reverse step as a Kernel.

`VP` is the variance-preserving chain of DDPM, DDIM and Stable Diffusion, on the model's own table of alpha-bars and its own
grid of times. `Flow` is the straight path of Stable Diffusion 3 and Flux.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tropism.core import TERMINAL, Normal, UserError

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def falling(times: Tensor) -> Tensor:
    """The times themselves, TERMINAL last. Raises UserError where they are not finite, or do not fall from the first to the last."""
    if (
        bool(torch.isfinite(times).all())
        and bool((times[1:-1] <= times[:-2]).all())
        and (len(times) < 3 or times[-2] < times[0])
    ):
        return times
    shown = ", ".join(f"{t:.4g}" for t in times[:4].tolist())
    raise UserError(
        f"The schedule's times do not fall from step to step: {shown}... Correct the scheduler's shifts and offsets "
        "(scheduler/scheduler_config.json, --scheduler KEY=VALUE), or take fewer steps."
    )


def _wide(values: float | Tensor, like: Tensor) -> float | Tensor:
    """(B,) -> (B, 1, ...) with like's dtype and device; a number stays one."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(values, Tensor) else values


@dataclass(frozen=True)
class VP:
    """alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), DDIM steps with eta in [0, 1].

    alpha_bars: the table (n,) as Python floats, looked up at the integer time, never interpolated.
    spacing: "leading" (with `offset`), "trailing" or "linspace", as the model's own pipeline spaces its times.
    A step goes to the time that follows in the grid. diffusers' DDIM goes to t - n // steps instead, which is the same except for
    "linspace", and for "trailing" when `steps` does not divide n.
    final: alpha-bar at TERMINAL; 1 for DDPM, the scheduler's own for DDIM (SD 1.5: alpha_bars[0]).
    Source: Denoising Diffusion Implicit Models, arXiv 2010.02502, eq. 12 and 16.
    """

    alpha_bars: tuple[float, ...]
    spacing: str = "leading"
    offset: int = 0
    eta: float = 0.0
    final: float = 1.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}; it must lie in [0, 1] (0: deterministic DDIM, 1: DDPM). Try --eta 0.")
        if self.spacing not in SPACINGS:
            raise UserError(
                f"The spacing of times is {self.spacing!r}, which has no formula here; it must be one of "
                f"{', '.join(SPACINGS)}. Take the model's own: timestep_spacing in its scheduler_config.json."
            )

    def times(self, steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """(steps + 1,) float64 on the CPU: the pipeline's own times, downwards, then TERMINAL."""
        n = len(self.alpha_bars)
        if not 1 <= steps <= n:
            raise UserError(
                f"steps is {steps}; this model has times 0..{n - 1}, so steps must lie in 1..{n}. Try --steps {min(50, n)}."
            )
        if self.spacing == "leading":
            grid = torch.arange(steps).flip(0) * (n // steps) + self.offset
        elif self.spacing == "trailing":
            grid = torch.tensor([round(n - i * n / steps) - 1 for i in range(steps)])
        else:
            grid = torch.linspace(0, n - 1, steps, dtype=torch.float64).round().flip(0)
        return falling(torch.cat([grid.double().clamp(0, n - 1), torch.tensor([TERMINAL], dtype=torch.float64)]))

    def alpha_bar(self, t: float | Tensor) -> float | Tensor:
        """abar at a time or at (B,) times; float or (B,) float64."""
        if isinstance(t, Tensor) and t.ndim:
            table = torch.tensor((*self.alpha_bars, self.final), dtype=torch.float64, device=t.device)
            return table[t.long()]
        t = float(t)
        return self.final if t == TERMINAL else self.alpha_bars[int(t)]

    def alpha(self, t: float | Tensor) -> float | Tensor:
        bar = self.alpha_bar(t)
        return bar.sqrt() if isinstance(bar, Tensor) else math.sqrt(bar)

    def sigma(self, t: float | Tensor) -> float | Tensor:
        bar = self.alpha_bar(t)
        return (1 - bar).sqrt() if isinstance(bar, Tensor) else math.sqrt(1 - bar)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told for (B,) times: the integer step."""
        return t.long()

    def _schedule(self, t: float | Tensor, like: Tensor):
        return _wide(self.alpha(t), like), _wide(self.sigma(t), like)

    def forward(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """x_t (B, *S) from a clean state and standard normals."""
        alpha_t, sigma_t = self._schedule(t, x0)
        return alpha_t * x0 + sigma_t * noise.to(x0)

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor, prediction: str) -> Tensor:
        """The clean state a native output stands for, linear in x_t and out; UserError for a prediction not in PREDICTIONS."""
        alpha_t, sigma_t = self._schedule(t, x_t)
        if prediction == "epsilon":
            return (x_t - sigma_t * out) / alpha_t
        if prediction == "v_prediction":
            return alpha_t * x_t - sigma_t * out
        if prediction == "sample":
            return out
        raise UserError(
            f"The prediction is {prediction!r}, and nobody knows how to get x_0 from that; it must be one of "
            f"{', '.join(PREDICTIONS)}. Take the model's own: prediction_type in its scheduler_config.json."
        )

    def reverse(self, x_t: Tensor, x0: Tensor, t: float, s: float) -> Normal:
        """p(x_s | x_t) given the predicted x_0: DDIM eq. 12, with eq. 16's sigma scaled by eta."""
        bar_t, bar_s = self.alpha_bar(t), self.alpha_bar(s)
        std = self.eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(max(0.0, 1 - bar_t / bar_s))
        eps = (x_t - math.sqrt(bar_t) * x0) / math.sqrt(1 - bar_t)
        mean = math.sqrt(bar_s) * x0 + math.sqrt(max(0.0, 1 - bar_s - std**2)) * eps
        return Normal(mean, std, is_deterministic=std == 0)

    def complete(self, x_t: Tensor, x0: Tensor, noise: Tensor | None = None) -> Tensor:
        """The clean state after the last step: x_t itself for a Gaussian chain."""
        return x_t


# ---------------------------------------------------------------------------------------------------- flow matching

SHIFTS = ("exponential", "linear")


@dataclass(frozen=True)
class Flow:
    """Flow matching: alpha_t = 1 - t, sigma_t = t, the network predicts the velocity eps - x_0; Euler steps down from t = 1.

    table: "scheduler" spaces the times evenly over the scheduler's own (already shifted) table of n times, as Stable
    Diffusion 3 does; "even" takes 1, ..., 1/N, as Flux does. Both are then shifted: t -> shift t / (1 + (shift - 1) t).
    dynamic: (base_shift, max_shift, base_tokens, max_tokens) makes the shift depend on the picture's size: mu is linear in its
    tokens ((h / patch) (w / patch)), and shift = exp(mu) for shift_type "exponential", mu for "linear"; None is off.
    terminal: stretches the grid so that its last time is this one; None is off.
    eta: 0 is the ODE; above it the SDE of Flow-GRPO with noise level eta (0.7 in its paper), which keeps the marginals of
    the ODE as steps become small. Its last step is the ODE's, so that no noise is left on the picture.
    Source: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206, section 5.3.2 (shift);
    Flow-GRPO, arXiv 2505.05470, eq. 9 (SDE).
    """

    table: str = "scheduler"
    shift: float = 1.0
    dynamic: tuple[float, float, float, float] | None = None
    shift_type: str = "exponential"
    terminal: float | None = None
    patch: int = 2
    eta: float = 0.0
    n: int = 1000
    final: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise UserError(
                f"eta is {self.eta}; for flow matching it is the noise level of an SDE and at least 0. Try --eta 0.7."
            )
        if self.shift_type not in SHIFTS:
            raise UserError(
                f"The time shift is of type {self.shift_type!r}; it must be one of {', '.join(SHIFTS)}. "
                "Correct time_shift_type in scheduler/scheduler_config.json."
            )
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise UserError(f"The time shift is {self.shift}; it must be positive. Try --scheduler shift=3.")
        if self.terminal is not None and not 0 <= self.terminal < 1:
            raise UserError(
                f"The last time (shift_terminal) is {self.terminal}; it must lie in [0, 1). Try --scheduler shift_terminal=null."
            )
        if self.dynamic is not None and self.dynamic[2] == self.dynamic[3]:
            raise UserError(
                f"base_image_seq_len and max_image_seq_len are both {self.dynamic[2]:g}, so the time shift has no slope between "
                "them. Give the numbers of tokens of the smallest and the largest picture, such as 256 and 4096."
            )

    def _shifted(self, t: Tensor, shape: Sequence[int] | None) -> Tensor:
        shift = self.shift
        if self.dynamic is not None:
            assert shape is not None, "a resolution-dependent shift needs the latent shape"
            low, high, fewest, most = self.dynamic
            tokens = (shape[-2] // self.patch) * (shape[-1] // self.patch)
            mu = low + (high - low) * (tokens - fewest) / (most - fewest)
            shift = math.exp(min(mu, 700)) if self.shift_type == "exponential" else mu
            if not 1e-6 < shift < 1e6:
                raise UserError(
                    f"The time shift is {shift:g} for {tokens} tokens; it must be positive and ordinary. Correct base_shift and max_shift "
                    "(--scheduler base_shift=0.5), or take another picture size."
                )
        return shift * t / (1 + (shift - 1) * t)

    def times(self, steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """(steps + 1,) float64 on the CPU: times in (0, 1], downwards, then TERMINAL. shape: the latents', (..., h, w)."""
        if not 1 <= steps <= self.n:
            raise UserError(
                f"steps is {steps}; this model was trained on {self.n} times, so it must lie in 1..{self.n}. Try --steps {min(28, self.n)}."
            )
        if self.table == "even":
            t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        else:
            ends = torch.tensor([1, 1 / self.n], dtype=torch.float64)
            first, last = (ends if self.dynamic else self.shift * ends / (1 + (self.shift - 1) * ends)).tolist()
            t = torch.linspace(first, last, steps, dtype=torch.float64)
        t = self._shifted(t, shape)
        if self.terminal and t[-1] < 1:
            t = 1 - (1 - t) * (1 - self.terminal) / (1 - t[-1])
        return falling(torch.cat([t, torch.tensor([TERMINAL], dtype=torch.float64)]))

    def alpha(self, t: float | Tensor) -> float | Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: float | Tensor) -> float | Tensor:
        if isinstance(t, Tensor) and t.ndim:
            return torch.where(t == TERMINAL, 0.0, t.double())
        return 0.0 if float(t) == TERMINAL else float(t)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told for (B,) times: t in [0, n]."""
        return t * self.n

    def forward(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """x_t (B, *S) from a clean state and standard normals."""
        return _wide(self.alpha(t), x0) * x0 + _wide(self.sigma(t), x0) * noise.to(x0)

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor, prediction: str = "velocity") -> Tensor:
        """The clean state a velocity stands for, linear in x_t and out."""
        return x_t - _wide(self.sigma(t), x_t) * out

    def reverse(self, x_t: Tensor, x0: Tensor, t: float, s: float) -> Normal:
        """p(x_s | x_t) given the predicted x_0: the Euler step of the ODE, or with eta > 0 Flow-GRPO's Euler-Maruyama step."""
        sigma_t, sigma_s = float(self.sigma(t)), float(self.sigma(s))
        if self.eta == 0 or sigma_s == 0:
            ratio = sigma_s / sigma_t
            return Normal(ratio * x_t + (1 - ratio) * x0, 0.0, is_deterministic=True)
        at_start = sigma_t > 1 - 1e-9  # there it would be infinite; some shifts come to 1 - 2e-15
        noise = self.eta * math.sqrt(sigma_t / (1 - (sigma_s if at_start else sigma_t)))
        v, dt, half = (x_t - x0) / sigma_t, sigma_s - sigma_t, noise**2 / (2 * sigma_t)
        mean = x_t * (1 + half * dt) + v * (1 + half * (1 - sigma_t)) * dt
        return Normal(mean, noise * math.sqrt(-dt))

    def complete(self, x_t: Tensor, x0: Tensor, noise: Tensor | None = None) -> Tensor:
        """The clean state after the last step: x_t itself for a Gaussian chain."""
        return x_t


def linear_coefficients(process: VP | Flow, times: Sequence[float], prediction: str) -> list[tuple[float, float]]:
    """(a, b) of each deterministic step, mean = a x_t + b out: the closed forms that tests and DRTune's path use."""
    coefficients = []
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t, s in pairwise(times):
        a, b = (
            process.reverse(x, process.x0(x, out, t, prediction), t, s).mean.item()
            for x, out in ((one, zero), (zero, one))
        )
        coefficients.append((a, b))
    return coefficients
