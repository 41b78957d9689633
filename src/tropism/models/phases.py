"""An adapter whose strength depends on how far the denoising chain has come: early steps lay out, late ones draw texture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tropism import core
from tropism.core import Cond, UserError
from tropism.models import lora

if TYPE_CHECKING:
    from tropism.models.latent import Latent


class Phased:
    """A model whose adapter acts with `strengths`, one for each of as many equal shares of a chain of `steps` steps, first to last.

    A step belongs to the share in which it begins; steps that no share divides evenly go to the earlier ones. Everything but
    `predict` and `kernel` is the model's own, which acts as trained again after each call. Equal strengths are that strength bit
    for bit. Raises UserError for a model without an adapter, strengths that are none or not finite, and fewer steps than strengths.
    """

    def __init__(self, model: Latent, strengths: Sequence[float], steps: int):
        if not isinstance(getattr(model, "lora", None), lora.LoraSettings):
            raise UserError("This model has no LoRA adapter whose strength could differ. Load it with one.")
        if not strengths or not all(math.isfinite(s) for s in strengths):
            raise UserError(f"The strengths are {list(strengths)}; give at least one, all finite. Try 1, 1, 0.")
        if steps < len(strengths):
            raise UserError(f"steps is {steps}, fewer than the {len(strengths)} phases. Take at least a step a phase.")
        self.model, self.strengths, self.steps = model, tuple(map(float, strengths)), steps

    def strength(self, t: float | Tensor, shape: Sequence[int]) -> float:
        """The adapter's strength at a time of the chain, of latents of this shape; (B,) times must be one and the same."""
        if isinstance(t, Tensor):
            t = t.unique().item()  # a batch of several times has no single strength
        begun = int((self.model.process.times(self.steps, shape)[:-1] > t).sum())
        return self.strengths[min(begun, self.steps - 1) * len(self.strengths) // self.steps]

    def predict(self, x_t: Tensor, t: float | Tensor, cond: Cond, guidance: float) -> Tensor:
        """The model's native output after guidance, at the strength of the time's phase."""
        with lora.scaled(self.model, self.strength(t, cond.shape)):
            return self.model.predict(x_t, t, cond, guidance)  # type: ignore[arg-type]

    kernel = core.kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)
