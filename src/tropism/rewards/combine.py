"""Rewards made of rewards: weighted sum, product, minimum, hinge and target; every part is reported under its own name.

A sum can also weigh its terms per prompt (a prompt's metadata names the rewards it is meant for) and on scales of their own
(see `align.normalise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch, Reward, UserError, is_differentiable, name_of, scored

Join = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""Values (B,) of the terms and their weights -> (B,)."""


def weighted(parts: dict[Reward, float] | Iterable[tuple[Reward, float]]) -> Combination:
    """The reward sum_i weight_i * reward_i, from {reward: weight} or (reward, weight) pairs.

    A sum inside is taken apart. Raises UserError if there is no part, a weight is not finite, or two parts share a name.
    """
    pairs: Any = parts.items() if isinstance(parts, dict) else parts
    return Combination(tuple(term for reward, weight in pairs for term in _taken_apart(reward, weight)))


def product(parts: Iterable[tuple[Reward, float]]) -> Combination:
    """prod_i reward_i ^ weight_i: none can be bought with another. Raises UserError, also later, for a reward that is not positive."""
    return Combination(tuple(parts), _powers, "product")


def minimum(parts: Iterable[tuple[Reward, float]]) -> Combination:
    """min_i weight_i * reward_i: the worst counts, and alone has a gradient."""
    return Combination(tuple(parts), lambda values, weights: _least(_scaled(values, weights)), "minimum")


def hinge(reward: Reward, threshold: float) -> Combination:
    """min(r, threshold): beyond the threshold nothing is gained and no gradient is left. ReFL, arXiv 2304.05977."""
    c = _finite(threshold, f"The threshold of hinge({name_of(reward)})")
    return Combination(((reward, 1.0),), lambda values, _: values[0].clamp_max(c), "hinge", c)


def target(reward: Reward, value: float) -> Combination:
    """-|r - value|: as near the value as can be. AlignProp's aesthetic loss, arXiv 2310.03739."""
    c = _finite(value, f"The value of target({name_of(reward)})")
    return Combination(((reward, 1.0),), lambda values, _: -(values[0] - c).abs(), "target", c)


def _scaled(values: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [w * v for v, w in zip(values, weights, strict=True)]


def _sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return reduce(torch.add, _scaled(values, weights))  # a sum, so that parts of different precision are promoted


def _least(values: Sequence[Tensor]) -> Tensor:
    return reduce(torch.minimum, values)


def _powers(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    known = reduce(torch.logical_and, [torch.isfinite(v) for v in values])
    lowest = min(v.masked_fill(~torch.isfinite(v), 1).min().item() for v in values)
    if not lowest > 0:
        raise UserError(
            f"A reward inside product(...) is {lowest:.4g}; a product needs positive rewards. Take minimum(...) or a sum."
        )
    whole = reduce(torch.mul, [v**w for v, w in zip(values, weights, strict=True)])
    return whole.masked_fill(~known, math.nan)


def _taken_apart(reward: Reward, weight: float) -> list[tuple[Reward, float]]:
    if isinstance(reward, Combination) and reward.join is _sum:
        return [(part, _checked(part, weight) * w) for part, w in reward.terms]
    return [(reward, weight)]


def _checked(reward: Reward, weight: float) -> float:
    return _finite(weight, f"The weight of reward '{name_of(reward)}'")


def _finite(number: float, what: str) -> float:
    if not math.isfinite(number):
        raise UserError(f"{what} is {number}; it must be a finite number. Try 1.")
    return float(number)


@dataclass(frozen=True)
class Combination:
    """Rewards joined into one. `terms` holds the (reward, weight) pairs; `join` makes one number of theirs.

    scales: name of a term -> (mean, spread); in a sum (value - mean) / spread takes the value's place.
    It is differentiable if every part is; otherwise it carries no gradient, and `blocking` names the parts to blame.
    Raises UserError for no terms, two of one name, or a weight that is not finite.
    """

    terms: tuple[tuple[Reward, float], ...]
    join: Join = _sum
    kind: str = "sum"
    constant: float | None = None
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self):
        names = self.names
        if not names:
            raise UserError("A combination of no rewards. Give at least one, for example --reward jpeg.")
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(
                f"The reward '{repeated[0]}' is given {names.count(repeated[0])} times; a name may appear "
                "once. Add their weights up, or give one a `name` of its own."
            )
        object.__setattr__(self, "terms", tuple((r, _checked(r, w)) for r, w in self.terms))

    @property
    def names(self) -> list[str]:
        return [name_of(reward) for reward, _ in self.terms]

    @property
    def name(self) -> str:
        """ "a + 0.3 b - c", "product(a, b=2)", "hinge(a, 0.3)"; what is inside the brackets can be given as a reward again."""
        if self.join is _sum:
            return _spelled(self.names, [weight for _, weight in self.terms])
        inside = [n if w == 1 else f"{n}={w:g}" for n, (_, w) in zip(self.names, self.terms, strict=True)]
        return f"{self.kind}({', '.join(inside + ([] if self.constant is None else [f'{self.constant:g}']))})"

    @property
    def blocking(self) -> tuple[str, ...]:
        found = [getattr(r, "blocking", (name_of(r),)) for r, _ in self.terms if not is_differentiable(r)]
        return tuple(name for names in found for name in names)

    @property
    def differentiable(self) -> bool:
        return not self.blocking

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError if a part, by its own `check_prompts`, cannot score one of the prompts."""
        for part, _ in self.terms:
            getattr(part, "check_prompts", lambda _: None)(prompts)

    def parts(self, samples: Tensor, batch: Batch) -> dict[str, Tensor]:
        """{name: (B,)}, unweighted, also of what is inside; each is computed once. NaN where a prompt is not meant for a term."""
        found: dict[str, Tensor] = {}
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            for (reward, _), meant in zip(self.terms, self._meant(batch), strict=True):
                inside = unrouted(reward, batch) if self.join is _sum else batch
                found |= (
                    _everywhere(reward, samples, inside) if all(meant) else _somewhere(reward, samples, inside, meant)
                )
        return found

    def total(self, parts: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(B,) of what `parts` returned, so that logging the parts costs no second evaluation."""
        values = []
        for name, meant in zip(self.names, self._meant(batch), strict=True):
            mean, spread = self.scales.get(name, (0.0, 1.0))
            value = parts[name] if name not in self.scales else (parts[name] - mean) / spread
            values.append(value if all(meant) else _zero_elsewhere(value, meant))
        return self.join(values, [weight for _, weight in self.terms])

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        return self.total(self.parts(samples, batch), batch)

    def _meant(self, batch: Batch) -> list[list[bool]]:
        """For each term, which rows it is meant for: those whose metadata "reward" names it, or names nothing.

        Raises UserError for the name of no term: all would be silent.
        """
        if self.join is not _sum or batch.meta is None:
            return [[True] * len(batch)] * len(self.terms)
        check_routes(self, batch.prompts, batch.meta)
        asked = [routed(meta) for meta in batch.meta]
        return [[not names or name in names for names in asked] for name in self.names]


def routed(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the rewards that a prompt's metadata asks for: one, a list, or () for all."""
    named = meta.get("reward", ())
    return (named,) if isinstance(named, str) else tuple(named)


def check_routes(reward: Reward, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for a prompt that is meant for a reward there is not."""
    names = reward.names if isinstance(reward, Combination) and reward.join is _sum else [name_of(reward)]
    for prompt, told in zip(prompts, meta, strict=True):
        for name in routed(told):
            if name not in names:
                raise UserError(
                    f"The prompt {prompt[:60]!r} is meant for the reward '{name}', but the rewards are {', '.join(names)}. "
                    "Name one of these in its `reward`, or add it with --reward."
                )


def unrouted(reward: Reward, batch: Batch) -> Batch:
    """The batch as a reward sees it that is a term elsewhere: prompts name the terms there, and not what is inside of one."""
    if batch.meta is None or not isinstance(reward, Combination):
        return batch
    return replace(batch, meta=[{k: v for k, v in meta.items() if k != "reward"} for meta in batch.meta])


def _everywhere(reward: Reward, samples: Tensor, batch: Batch) -> dict[str, Tensor]:
    if isinstance(reward, Combination):
        inside = reward.parts(samples, batch)
        return {**inside, reward.name: reward.total(inside, batch)}
    return {name_of(reward): scored(reward, samples, batch)}


def _somewhere(reward: Reward, samples: Tensor, batch: Batch, meant: list[bool]) -> dict[str, Tensor]:
    """Values of the rows that are meant, NaN elsewhere; rows that are not meant are not scored."""
    rows = [i for i, m in enumerate(meant) if m]
    if not rows:
        return {name_of(reward): torch.full((len(batch),), math.nan, device=samples.device)}
    at = torch.tensor(rows, device=samples.device)
    some = _everywhere(reward, samples[at], batch[rows])
    return {name: v.new_full((len(batch),), math.nan).index_put((at.to(v.device),), v) for name, v in some.items()}


def _zero_elsewhere(value: Tensor, meant: list[bool]) -> Tensor:
    return torch.where(torch.tensor(meant, device=value.device), value, torch.zeros_like(value))


def _spelled(names: list[str], weights: list[float]) -> str:
    """ "a + 0.3 b - c" """
    sizes = ["" if abs(w) == 1 else f"{abs(w):g} " for w in weights]
    signs = ["- " if w < 0 else "+ " for w in weights]
    text = " ".join(sign + size + name for sign, size, name in zip(signs, sizes, names, strict=True))
    return text[2:] if text.startswith("+") else "-" + text[2:]
