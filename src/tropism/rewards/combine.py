"""Weighted sums of rewards, with every part reported under its own name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch, Reward, UserError, is_differentiable, name_of, scored


def weighted(parts: dict[Reward, float] | Iterable[tuple[Reward, float]]) -> Combination:
    """The reward sum_i weight_i * reward_i, from {reward: weight} or (reward, weight) pairs.

    A combination inside is taken apart. Raises UserError if there is no part, a weight is not finite, or two parts
    share a name.
    """
    pairs: Any = parts.items() if isinstance(parts, dict) else parts
    return Combination(tuple(term for reward, weight in pairs for term in _taken_apart(reward, weight)))


def _taken_apart(reward: Reward, weight: float) -> list[tuple[Reward, float]]:
    weight = _checked(reward, weight)
    inner = reward.terms if isinstance(reward, Combination) else ((reward, 1.0),)
    return [(part, weight * w) for part, w in inner]


def _checked(reward: Reward, weight: float) -> float:
    if not math.isfinite(weight):
        raise UserError(
            f"The weight of reward '{name_of(reward)}' is {weight}; it must be a finite number. "
            f"Try {name_of(reward)}=1."
        )
    return float(weight)


class Combination:
    """A weighted sum of rewards, made by `weighted`. `terms` holds the (reward, weight) pairs.

    It is differentiable if every part is; otherwise it carries no gradient, and `blocking` names the parts to blame.
    """

    def __init__(self, terms: tuple[tuple[Reward, float], ...]):
        names = [name_of(reward) for reward, _ in terms]
        if not terms:
            raise UserError("A combination of no rewards. Give at least one, for example --reward jpeg.")
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(
                f"The reward '{repeated[0]}' is given {names.count(repeated[0])} times; a name may appear "
                "once. Add their weights up, or give one a `name` of its own."
            )
        self.terms = terms
        self.name = _spelled(names, [weight for _, weight in terms])
        self.blocking = tuple(name_of(reward) for reward, _ in terms if not is_differentiable(reward))
        self.differentiable = not self.blocking

    def parts(self, samples: Tensor, batch: Batch) -> dict[str, Tensor]:
        """{name: (B,)}, unweighted; each part is computed once."""
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return {name_of(reward): scored(reward, samples, batch) for reward, _ in self.terms}

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what `parts` returned, so that logging the parts costs no second evaluation."""
        values = [weight * parts[name_of(reward)] for reward, weight in self.terms]
        return reduce(torch.add, values)  # a sum, so that parts of different precision are promoted

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return self.total(self.parts(samples, batch))


def _spelled(names: list[str], weights: list[float]) -> str:
    """ "a + 0.3 b - c" """
    sizes = ["" if abs(w) == 1 else f"{abs(w):g} " for w in weights]
    signs = ["- " if w < 0 else "+ " for w in weights]
    text = " ".join(sign + size + name for sign, size, name in zip(signs, sizes, names, strict=True))
    return text[2:] if text.startswith("+") else "-" + text[2:]
