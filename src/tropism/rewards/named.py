"""A reward made of a function: its name, and whether its gradient is real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tropism.core import Batch
from tropism.rewards.sources import About


@dataclass(frozen=True)
class Named:
    """`function(samples (B, 3, H, W) in [0, 1], batch) -> (B,)` with the two attributes that every reward carries.

    about: what ours say of themselves beside them.
    """

    name: str
    differentiable: bool
    function: Callable[[Tensor, Batch], Tensor]
    about: About | None = None

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return self.function(samples, batch)
