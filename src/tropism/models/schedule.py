"""Reads a diffusers scheduler's configuration into a process: plain float64 numbers, never a scheduler's state."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.process.gaussian import PREDICTIONS, SPACINGS, VP, Flow

TABLES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
CORRECT = "Correct it in scheduler/scheduler_config.json, or by --scheduler KEY=VALUE."


def overridden(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration with some of its keys replaced. Raises UserError for a key it does not have or a value of
    another kind than the one it has."""
    for key, value in changes.items():
        if key not in config:
            near = difflib.get_close_matches(key, config, 1)
            hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(k for k in config if k[0] != '_')}."
            raise UserError(f"The scheduler ({config.get('_class_name')}) has no {key!r}. {hint}")
        if config[key] is not None and value is not None and _kind(value) != _kind(config[key]):
            raise UserError(
                f"--scheduler {key}={value} is {_kind(value)}; {key} is {_kind(config[key])}. Its own value is {config[key]}."
            )
    return {**config, **changes}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else "a word" if isinstance(value, str) else "a list"


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of the configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"The scheduler's {key} is {value!r}; it must be a number. {CORRECT}")
    return value


def _times(config: Mapping[str, Any]) -> int:
    """How many times the network was trained on."""
    n = _number(config, "num_train_timesteps", 1000)
    if n != int(n) or n < 1:
        raise UserError(
            f"The scheduler's num_train_timesteps is {n}; it must be a whole number of at least 1. {CORRECT}"
        )
    return int(n)


def _cosine(n: int) -> Tensor:
    """Improved DDPM's cosine schedule, betas capped at 0.999; arXiv 2102.09672, eq. 17."""
    bar = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.tensor([min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)], dtype=torch.float64)


def _betas(config: Mapping[str, Any]) -> Tensor:
    n, kind, number = _times(config), config.get("beta_schedule"), partial(_number, config)
    if (trained := config.get("trained_betas")) is not None:
        if not (isinstance(trained, list | tuple) and all(isinstance(b, int | float) for b in trained) and trained):
            raise UserError(f"The scheduler's trained_betas must be a list of numbers, not {trained!r}. {CORRECT}")
        return torch.as_tensor(trained, dtype=torch.float64)
    if kind == "squaredcos_cap_v2":
        return _cosine(n)
    if kind == "linear":
        return torch.linspace(number("beta_start"), number("beta_end"), n, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(number("beta_start") ** 0.5, number("beta_end") ** 0.5, n, dtype=torch.float64) ** 2
    raise UserError(
        f"The scheduler's beta_schedule is {kind!r}; known are linear, scaled_linear, squaredcos_cap_v2 "
        "and trained_betas. Choose a Stable Diffusion 1.x or 2.x model, or write one: file.py:Class."
    )


def _zero_snr(bars: Tensor) -> Tensor:
    """Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891, algorithm 1."""
    root = bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def alpha_bars(config: Mapping[str, Any]) -> tuple[float, ...]:
    """The table abar_0..abar_{n-1} of a scheduler's configuration, in float64. UserError for an unknown schedule."""
    betas = _betas(config)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError(
            f"The scheduler's betas reach from {betas.min():g} to {betas.max():g}; they must lie between 0 and 1. {CORRECT}"
        )
    bars = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(
                "The scheduler asks for zero terminal SNR (rescale_betas_zero_snr) with epsilon "
                "prediction: at the first step x_0 would be divided by zero. Set rescale_betas_zero_snr "
                "to false in scheduler/scheduler_config.json."
            )
        bars = _zero_snr(bars)
    return tuple(bars.tolist())


def prediction_of(config: Mapping[str, Any]) -> str:
    """What the network predicts: "epsilon", "v_prediction" or "sample"."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(
            f"The scheduler's prediction_type is {kind!r}; it must be one of {', '.join(PREDICTIONS)}. {CORRECT}"
        )
    return kind


def process(config: Mapping[str, Any], eta: float = 0.0) -> VP:
    """DDIM on the model's own betas and spacing, whatever scheduler its folder names.

    config: a scheduler's full configuration, with `_class_name`. `clip_sample` is never read: x_0 of a latent model has
    no bounds, and a clamp would silently zero gradients. Raises UserError for what is not a variance-preserving table.
    """
    bars, spacing, name = alpha_bars(config), config.get("timestep_spacing", "leading"), config.get("_class_name", "")
    if spacing not in SPACINGS:
        raise UserError(
            f"The scheduler's timestep_spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}. {CORRECT}"
        )
    # only these two have a final alpha-bar of their own; the others end at the clean state
    defaults = {"DDIMScheduler": True, "PNDMScheduler": False}
    offset = _number(config, "steps_offset", 0)
    if offset != int(offset) or offset < 0:
        raise UserError(f"The scheduler's steps_offset is {offset}; it must be a whole number of at least 0. {CORRECT}")
    to_one = config.get("set_alpha_to_one", defaults[name]) if name in defaults else True
    return VP(bars, spacing, int(offset), eta, 1.0 if to_one else bars[0])


def flow(config: Mapping[str, Any], eta: float = 0.0, patch: int = 2) -> Flow:
    """The flow-matching process of a FlowMatchEulerDiscreteScheduler's configuration.

    patch: latent pixels a token's side, for the shift that depends on the picture's size. Raises UserError for the karras,
    exponential and beta tables and for inverted times, which have no formula here.
    """
    if not str(config.get("_class_name", "")).startswith("FlowMatch"):
        raise UserError(
            f"The scheduler is {config.get('_class_name')}; this family's chain is flow matching by plain Euler steps. Put a "
            "FlowMatchEulerDiscreteScheduler into the folder's scheduler/."
        )
    odd = [k for k in (*TABLES, "invert_sigmas", "stochastic_sampling") if config.get(k)]
    if odd:
        raise UserError(
            f"The scheduler has {', '.join(odd)}, a spacing of times or a sampler without a formula here. To go on with plain "
            f"Euler steps on shifted times: {' '.join(f'--scheduler {k}=false' for k in odd)}."
        )
    number = partial(_number, config)
    low_high = number("base_shift", 0.5), number("max_shift", 1.15)
    tokens = number("base_image_seq_len", 256), number("max_image_seq_len", 4096)
    return Flow(
        shift=number("shift", 1.0),
        dynamic=(*low_high, *tokens) if config.get("use_dynamic_shifting") else None,
        shift_type=config.get("time_shift_type", "exponential"),
        terminal=None if config.get("shift_terminal") is None else number("shift_terminal"),
        patch=patch,
        eta=eta,
        n=_times(config),
    )
