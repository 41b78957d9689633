"""The rows of a guided run's table: quantiles of its rewards, beside the plain model and best-of-N, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from tropism.run.guided import Piece

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Line:
    """One row of the table: quantiles and mean of the reward; rows of the network and rewards a sample; note."""

    name: str
    values: tuple[float, ...]
    mean: float
    network: float
    rewards: float
    note: str = ""


def best_of(pool: Tensor, n: float) -> tuple[Tensor, Tensor]:
    """(values, weights): the law of the best of n draws from pooled rewards (rows, pool), by order statistics, all rows alike.

    The i-th smallest of P values is the best of n with probability (i / P)^n - ((i - 1) / P)^n; n need not be whole.
    """
    values, size = pool.sort(1).values, pool.shape[1]
    edges = (torch.arange(size + 1, dtype=torch.float64) / size) ** n
    return values.flatten(), (edges.diff() / len(pool)).expand(len(pool), -1).flatten()


def quantiles(values: Tensor, weights: Tensor | None = None) -> tuple[float, ...]:
    """Weighted quantiles: the least value whose cumulative weight reaches the share."""
    order = values.argsort()
    weights = torch.full((len(values),), 1 / len(values), dtype=torch.float64) if weights is None else weights
    reached = weights[order].cumsum(0)
    at = [int(torch.searchsorted(reached, q - 1e-9)) for q in QUANTILES]
    return tuple(values[order][min(i, len(values) - 1)].item() for i in at)


def rows_of(
    method: str, pieces: Sequence[Piece], before: Mapping[str, int] = MappingProxyType({}), teacher: Line | None = None
) -> list[Line]:
    """The plain model, best-of-N at equal network rows and at equal rewards, the teacher if there is one, and the guided run."""
    pool = pools(pieces)
    own = line_of(method, pieces, before)
    found = []
    if pool:
        plain_rows = plain_cost(pieces)
        found.append(plain_line("plain model", pieces))
        if own.network > 1.5 * plain_rows:
            found.append(_line("best of N, equal network rows", pool, own.network / plain_rows, plain_rows))
        if own.rewards > 1:
            found.append(_line("best of N, equal rewards", pool, own.rewards, plain_rows))
    return [*found, *([teacher] if teacher else []), own]


def plain_cost(pieces: Sequence[Piece]) -> float:
    """Network rows of a plain sample."""
    total = lambda name: sum(piece.plain_costs[name] for piece in pieces)
    return total("network") / total("rewards")


def told_share(plain: float, guided: float, distilled: float) -> str:
    """How much of a guide's gain is kept, in a sentence."""
    share = share_kept(plain, guided, distilled)
    if not all(map(math.isfinite, (plain, guided, distilled))):
        return "Some samples have no finite reward, so means cannot tell how much of the guide's gain is kept."
    if share != share:
        return "The guide gained nothing that could be kept."
    if share <= 0:
        return (
            f"None of the guide's gain is kept: without it the mean is {distilled:.4g}, the plain model's {plain:.4g}."
        )
    return f"{share:.0%} of the guide's gain is kept without it."


def share_kept(plain: float, guided: float, distilled: float) -> float:
    """(distilled - plain) / (guided - plain) of mean rewards; NaN where the guide gained nothing."""
    gain = guided - plain
    return (distilled - plain) / gain if gain > 0 and math.isfinite(gain) else math.nan


def plain_line(name: str, pieces: Sequence[Piece]) -> Line:
    """The row of the plain samples, each prompt as heavy as it has guided ones."""
    return _line(name, pools(pieces), 1.0, plain_cost(pieces))


def line_of(name: str, pieces: Sequence[Piece], before: Mapping[str, int] = MappingProxyType({})) -> Line:
    """The row of guided samples; a row backward counts as two. before: what was spent on them all."""
    rewards = torch.cat([piece.rewards for piece in pieces])
    cost = lambda what: (sum(p.costs.get(what, 0) for p in pieces) + before.get(what, 0)) / len(rewards)
    note = "its roll-outs counted" if before else ""
    rows = cost("network") + 2 * cost("backward")
    return Line(name, quantiles(rewards), rewards.mean().item(), rows, cost("rewards"), note)


def pools(pieces: Sequence[Piece]) -> list[Tensor]:
    """Each prompt's pool once, a row for each of its samples (n, P), where the run has pools."""
    return [piece.pool[piece.prompts == p] for piece in pieces if piece.pool.numel() for p in piece.prompts.unique()]


def pooled(found: Sequence[Tensor], n: float) -> tuple[Tensor, Tensor]:
    """`best_of` over all pools, each as heavy as it has samples; values that cannot be drawn are left out."""
    pairs, total = [(*best_of(pool[:1], n), len(pool)) for pool in found], sum(len(pool) for pool in found)
    values, weights = torch.cat([v for v, _, _ in pairs]), torch.cat([w * k / total for _, w, k in pairs])
    return values[weights > 0], weights[weights > 0]


def _line(name: str, pool: Sequence[Tensor], n: float, plain_rows: float) -> Line:
    n = max(n, 1.0)
    values, weights = pooled(pool, n)
    smallest = min(rows.shape[1] for rows in pool)
    note = (
        f"N = {n:.3g}" + (f", a lower bound: {smallest} plain samples a prompt" if n > smallest else "")
        if n > 1
        else ""
    )
    return Line(name, quantiles(values, weights), (values * weights).sum().item(), n * plain_rows, n, note)
