"""What a reward's function returned, made into numbers where that is unambiguous; and where in whose code it failed."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_numbers(value: Any, count: int, samples: Tensor) -> Tensor:
    """`value` as (count,) floating point on the samples' device, with its graph if it has one.

    Lists may hold tensors of one number, and None for a sample that cannot be scored (NaN). Axes of length 1 are taken away. Whole
    numbers and lists become the samples' precision, at least float32; float64 where the samples are tokens.
    Raises ValueError, TypeError or RuntimeError that says what was found instead.
    """
    wide = torch.promote_types(samples.dtype, torch.float32) if samples.is_floating_point() else torch.float64
    found = value if isinstance(value, Tensor) else _of_list(value, wide, samples.device)
    if found.is_complex():
        raise ValueError("complex numbers")
    if found.numel() != count or max(found.shape, default=1) != count:
        raise ValueError(f"shape {tuple(found.shape)}")
    found = found.reshape(count).to(samples.device)
    return found if found.is_floating_point() else found.to(wide)


def _of_list(value: Any, wide: torch.dtype, device: torch.device) -> Tensor:
    if value is None:
        raise TypeError("NoneType; is a return missing?")
    try:
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(items, list | tuple):
            items = [torch.nan if v is None else v for v in items]
            if any(isinstance(v, Tensor) for v in items):
                return torch.stack([torch.as_tensor(v).to(device, wide).reshape(()) for v in items])
        return torch.as_tensor(items, dtype=wide, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{type(value).__name__}, not numbers ({str(error).splitlines()[0][:200]})") from error


def place_of(error: BaseException, but: str = "\0") -> str:
    """ "file.py, line 3": the innermost frame that is neither Python's own nor an installed package's, nor has `but` in its path."""
    frames = traceback.extract_tb(error.__traceback__)
    others = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))
    own = [f for f in frames if not f.filename.startswith((*others, "<")) and but not in f.filename] or list(frames)
    return f"{own[-1].filename.rpartition('/')[2]}, line {own[-1].lineno}" if own else "somewhere"


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or ["without a word"])[0][:most]


def told(error: BaseException, again: Callable[[int], object], prompts: Sequence[str]) -> str:
    """An exception in one sentence: what, where, and for which sample. again(i): the call repeated for sample i alone."""
    what = f"raised {type(error).__name__}: {first_line(error)} ({place_of(error)})"
    return f"{what}, for {_first_failing(again, prompts)}. Correct it there."


def _first_failing(again: Callable[[int], object], prompts: Sequence[str]) -> str:
    for i, prompt in enumerate(prompts):
        try:
            again(i)
        except Exception:
            return f"the sample of the prompt {prompt[:80]!r}"
    return f"{len(prompts)} samples together, the first of the prompt {''.join(prompts[:1])[:80]!r}"
