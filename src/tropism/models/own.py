"""A user's own model: what it must bring, and what the rest is when it does not say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropism import core
from tropism.core import Batch, Draw, Stream, UserError
from tropism.process.masked import Masked

NEEDED = ("process", "predict", "x0", "decode")
TO_ALIGN = ("encode", "start", "trainable")


@dataclass(frozen=True)
class Prompts:
    """The default condition: one prompt a row, and one sample's latent shape."""

    prompts: tuple[str, ...]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Prompts:
        if isinstance(rows, slice):
            return replace(self, prompts=self.prompts[rows])
        return replace(self, prompts=tuple(self.prompts[int(i)] for i in rows))


class Completed:
    """A model with defaults for what it lacks: conditions are prompts, the start is noise or masks, nothing trains.

    encode needs `shape`, one sample's latent shape, unless the model has an encode of its own.
    """

    def __init__(self, model: Any):
        self._model = model
        self.calls = getattr(model, "calls", {"network": 0, "backward": 0})

    def predict(self, x_t: Tensor, t: float | Tensor, cond: Any, guidance: float) -> Tensor:
        """The model's own; its rows are counted here where it does not count them itself."""
        out = self._model.predict(x_t, t, cond, guidance)
        if not hasattr(self._model, "calls"):
            core.count_rows(self.calls, out, len(x_t))
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._model, name)
        except AttributeError:
            if name.startswith("_") or name not in _DEFAULTS:
                raise
        default = _DEFAULTS[name]
        return partial(default, self) if callable(default) else default


def _named(model: Any) -> str:
    """The user's own class."""
    return type(getattr(model, "_model", model)).__name__


def _encode(model: Any, batch: Batch, draw: Draw | None = None) -> Prompts:
    if batch.visual is not None:
        raise UserError(
            f"{_named(model)} has no `encode` of its own, so it reads no picture beside the words. Write it."
        )
    return Prompts(tuple(batch.prompts), tuple(model.shape))


def _start(model: Any, cond: Any, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
    if isinstance(model.process, Masked):
        return torch.full((len(cond), *cond.shape), model.process.mask, device=model.device), 0
    return draw(Stream.PRIOR, 0, cond.shape).to(model.device, torch.promote_types(model.dtype, torch.float32)), 0


def _latents(model: Any, samples: Tensor) -> Tensor:
    raise UserError(f"{_named(model)} has no `latents` (samples -> clean states), which is needed here. Write it.")


def _base(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


_DEFAULTS: dict[str, Any] = {
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "encode": _encode,
    "start": _start,
    "kernel": core.kernel,
    "latents": _latents,
    "base": _base,
    "trainable": lambda model: {},
}
