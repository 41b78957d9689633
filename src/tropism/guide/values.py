"""How good a noisy state is, before its picture or sequence is finished.

A factory here is called with a run's fixed parts and gives a Value; an algorithm takes any of them as `value`.
At TERMINAL every value is the true reward of the state, without a network call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.core import TERMINAL, Stream, UserError, noise
from tropism.guide.lineages import Setting, ValueOf
from tropism.guide.steps import rewarded

MODES = ("auto", "mean", "argmax", "sample", "soft")


def posterior_mean(mode: str = "auto", k: int = 4) -> ValueOf:
    """v = r(x_0 as the denoiser expects it from x_t): no training, one network call a state, which the next step uses again.

    mode: "mean" decodes E[x_0 | x_t] (Gaussian chains). For tokens: "argmax" takes the likeliest token at every masked place (as the
    paper's code does), "sample" draws k completions and takes alpha log mean exp(r / alpha) of their rewards (their mean where the
    run's alpha is 0), "soft" gives the reward probabilities (R, L, V). "auto": mean, or sample for tokens.
    Source: SVDD, arXiv 2408.08252, algorithm 4 (SVDD-PM); k completions: arXiv 2501.06848, section 4.
    """
    if mode not in MODES or k < 1:
        raise UserError(f"mode is {mode!r} and k is {k}; mode must be one of {', '.join(MODES)}, k at least 1.")
    return lambda run: _PosteriorMean(run, mode, k)


@dataclass(frozen=True)
class _PosteriorMean:
    run: Setting
    mode: str
    k: int
    predicts: bool = True

    def __call__(self, x_t: Tensor, t: float, rows: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return at_the_end(self.run, x_t, rows)
        x0, tokens = self.run.model.x0(x_t, out, t), not x_t.is_floating_point()
        if tokens and self.mode in ("sample", "auto"):
            return _sampled(self.run, x_t, x0, t, rows, self.k)
        if tokens and self.mode == "soft":
            x_t = torch.nn.functional.one_hot(x_t, x0.shape[-1] + 1).to(x0)
        return _scored(self.run, expected(self.run, x_t, x0), rows)


def exact(function: Callable[[Tensor, float], Tensor]) -> ValueOf:
    """A value known in closed form: function(x_t (R, *S), t) -> (R,); the reward itself at TERMINAL."""
    return lambda run: _Exact(run, function)


@dataclass(frozen=True)
class _Exact:
    run: Setting
    function: Callable[[Tensor, float], Tensor]
    predicts: bool = False

    def __call__(self, x_t: Tensor, t: float, rows: Tensor, out: Tensor | None) -> Tensor:
        return at_the_end(self.run, x_t, rows) if t == TERMINAL else _checked(self.function, x_t, t)


def _checked(function: Callable[[Tensor, float], Tensor], x_t: Tensor, t: float) -> Tensor:
    """A user's value of states (R, *S), as (R,) float64. Raises UserError for anything but R numbers of which some are finite."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        found = torch.as_tensor(function(x_t, t))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The value '{name}' failed on states of shape {tuple(x_t.shape)}: {type(error).__name__}: {error}. "
            "A value is a function (x_t, t) -> (B,)."
        ) from error
    if found.shape != (len(x_t),) or found.is_complex():
        raise UserError(
            f"The value '{name}' returned shape {tuple(found.shape)} for {len(x_t)} states. Return one number a state."
        )
    if not found.double().isfinite().any() or torch.isposinf(found.double()).any():
        raise UserError(
            f"The value '{name}' is infinite or NaN for all or some of {len(x_t)} states, so it cannot guide."
        )
    return found.double().cpu()


def expected(run: Setting, x_t: Tensor, x0: Tensor) -> Tensor:
    """The clean state that a prediction stands for: x_0 itself for Gaussian chains, for tokens x_t with its masked places filled."""
    return x0 if x0.shape == x_t.shape else run.model.process.complete(x_t, x0)


def at_the_end(run: Setting, x_t: Tensor, rows: Tensor) -> Tensor:
    """The true reward (R,) of finished states."""
    return _scored(run, run.model.process.complete(x_t, x_t), rows)


def _scored(run: Setting, clean: Tensor, rows: Tensor) -> Tensor:
    return rewarded(run, run.model.decode(clean), rows)


def _mean_of_known(each: Tensor) -> Tensor:
    """Mean over completions (R, k), a failed one (-inf) counting as the lowest of all: else one failure would hide all the others."""
    known = each.isfinite()
    low = each[known].min() if known.any() else each.new_tensor(-torch.inf)
    return torch.where(known.any(1), torch.where(known, each, low).mean(1), -torch.inf)


def _sampled(run: Setting, x_t: Tensor, x0: Tensor, t: float, rows: Tensor, k: int) -> Tensor:
    """alpha log mean exp(r / alpha) over k completions, whose noise is a lineage's own and the same for all its children."""
    index = [run.draw.index[i] for i in rows.tolist()]
    drawn = noise(run.draw.seed, Stream.COMPLETION, run.draw.update, index, int(t * 2**20), 0, (k, *x_t.shape[1:]))[
        :, 0
    ]
    each = torch.stack(
        [_scored(run, run.model.process.complete(x_t, x0, drawn[:, i].to(x_t.device)), rows) for i in range(k)], 1
    )
    each = torch.where(each.isnan(), -torch.inf, each)
    if run.alpha == 0:
        return _mean_of_known(each)
    return run.alpha * (torch.logsumexp(each / run.alpha, 1) - math.log(k))
