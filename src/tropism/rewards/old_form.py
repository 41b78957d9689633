"""Functions of the older trainers' form, `(images, prompts, metadata) -> rewards` or `(rewards, info)`, unchanged.

`--reward old:FILE.py:FUNCTION` gives it pictures as those trainers did: a tensor (B, 3, H, W) in [0, 1]. `--reward old-uint8:...` gives a
numpy array (B, H, W, 3) of 0..255 instead. A function without arguments that returns such a function is called first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from tropism import plugin
from tropism.core import Batch, Reward, UserError, is_differentiable, name_of
from tropism.rewards.named import Named


def old_form(place: str, as_bytes: bool = False) -> Reward:
    """The reward of "FILE.py:FUNCTION", a function of the older form or a maker of one.

    Its gradient is taken to be real unless it declares `differentiable` False or sees bytes; an align method that needs one finds out at
    its first update whether the score has a graph. `info` is left out. Raises UserError for what cannot be called so.
    """
    made: Any = plugin.load_object(place)
    function = _function(made, place)
    differentiable = is_differentiable(function) and not as_bytes
    return Named(name_of(made), differentiable, adapted(function, as_bytes))


def _function(made: Any, place: str) -> Any:
    """What takes (images, prompts, metadata): the object itself, or what it makes."""
    function = made() if callable(made) and not _takes(made, 3) and _takes(made, 0) else made
    if not callable(function) or isinstance(function, type) or not _takes(function, 3):
        raise UserError(
            f"{place} cannot be called with (images, prompts, metadata), nor without arguments to make such a function. "
            "A function (samples, batch) is named without old: in front."
        )
    return function


def adapted(function: Callable[..., Any], as_bytes: bool = False) -> Callable[[Tensor, Batch], Any]:
    """`function(images, prompts, metadata)` as (samples, batch) -> what it returned, without `info`."""

    def reward(samples: Tensor, batch: Batch) -> Any:
        found = function(
            _bytes(samples) if as_bytes else samples, list(batch.prompts), batch.meta or [{} for _ in batch.prompts]
        )
        return found[0] if _has_info(found) else found

    return reward


def _has_info(found: Any) -> bool:
    """Whether it is (rewards, info): info is a mapping or None, and rewards are not a number, of which there might be two."""
    if not (isinstance(found, tuple) and len(found) == 2):
        return False
    rewards, info = found
    return isinstance(info, Mapping) or (info is None and not isinstance(rewards, int | float | None))


def _bytes(samples: Tensor) -> np.ndarray:
    return (samples.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True
