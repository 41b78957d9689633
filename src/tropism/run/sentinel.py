"""Is the trained reward still worth its name? Held-out rewards that fall while it rises say no; the best weights are kept.

The sentinel looks at evaluations on fixed prompts and noise, so two of them are compared picture by picture. It sees the trained reward and
the held-out ones, never a gold measure.
Source of the phenomenon: Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REACTIONS = ("keep", "stop", "shrink", "off")
"""What follows an alarm: the best weights are kept beside the last; the run ends with them; it goes back to them at half the rate."""
Z = 4.0
"""Standard errors that a fall must have; the best was chosen among many, so it was also lucky."""
SHARE = 0.15
"""Share of the gain at the best that must be lost."""
PATIENCE = 2
"""Evaluations in a row that must say so."""
ALIKE = 1e-6
"""Spread, in units of the largest value, below which all pictures are worth the same."""

COLLAPSED = 0.25
"""Share of their first value to which variety or colours of the training samples fall in a collapse."""
DARKENED = 0.9
"""Share of dark pixels that is one, where less than half of it was dark at first."""
WINDOW = 3
"""Updates that such a statistic is averaged over."""


@dataclass(frozen=True)
class Seen:
    """One evaluation: the trained reward (n,) and the held-out rewards by name, (n,) each, on the same n pictures every time."""

    update: int
    trained: Tensor
    held_out: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """best: the update whose held-out score is highest, of those at which nothing held out had fallen.

    alarm: what is wrong, in a sentence, or "". falling: evaluations in a row.
    """

    best: int
    alarm: str = ""
    falling: int = 0


def scores(seen: Sequence[Seen]) -> Tensor:
    """Every held-out reward (rewards, evaluations, n) in units of its spread at the first evaluation; without one, the trained reward."""
    columns = [torch.stack([s.held_out[name].double() for s in seen]) for name in seen[0].held_out]
    columns = columns or [torch.stack([s.trained.double() for s in seen])]
    return torch.stack([(c - c[0].mean()) / _unit(c) for c in columns])


def _unit(column: Tensor) -> Tensor:
    """The spread of (evaluations, n) at the first; where all pictures were worth the same then, over all evaluations."""
    least = ALIKE * column[0].abs().max()
    spreads = [s for s in (column[0].std(correction=0), column.std(correction=0)) if s > least]
    return spreads[0] if spreads else torch.ones_like(least)


def assess(seen: Sequence[Seen]) -> Verdict:
    """What the evaluations so far say, the first of them of the base model.

    The mean of the held-out rewards is asked, and each alone, so that one that rises hides none that falls. The best evaluation is
    the one of the highest mean among those in which none of them had fallen.
    """
    columns = scores(seen)
    whole = columns.mean(0)
    falls = [_falls(seen, column) for column in (whole, *(columns if len(columns) > 1 else ()))]
    means, fallen = whole.mean(1), {i for found in falls for i in found}
    best = max((i for i in range(len(seen)) if i not in fallen), key=lambda i: means[i].item())
    streaks = [next(k for k in range(len(seen)) if len(seen) - 1 - k not in found) for found in falls]
    falling = max(streaks)
    if falling < PATIENCE or not seen[0].held_out:
        return Verdict(seen[best].update, "", falling)
    since = falls[streaks.index(falling)][len(seen) - 1]
    fell = (columns[:, -1] - columns[:, since]).mean(1)
    worst = list(seen[0].held_out)[int(fell.argmin())]
    rose = (seen[-1].trained - seen[since].trained).double().mean().item()
    lost = (seen[since].held_out[worst] - seen[-1].held_out[worst]).double().mean().item()
    alarm = f"over-optimised: since update {seen[since].update} the trained reward rose by {rose:.3g}, while {worst} fell by {lost:.3g}"
    return Verdict(seen[best].update, alarm, falling)


def _falls(seen: Sequence[Seen], score: Tensor) -> dict[int, int]:
    """Evaluations at which a score (evaluations, n) had fallen, each with the one before it that was the best till then."""
    found, best = {}, 0
    for i in range(1, len(seen)):
        if _has_fallen(seen, score, best, i):
            found[i] = best
        if score[i].mean() > score[best].mean():
            best = i
    return found


def _has_fallen(seen: Sequence[Seen], score: Tensor, best: int, now: int) -> bool:
    """Whether the score fell, picture by picture, by more than chance and more than a little, while the trained reward did not."""
    change = score[now] - score[best]
    if len(change) < 2:  # one picture does not tell a fall from chance
        return False
    error = change.std(correction=1) / len(change) ** 0.5
    least = torch.maximum(Z * error, SHARE * (score[best].mean() - score[0].mean()).clamp_min(0))
    rose = seen[now].trained.double().mean() >= seen[best].trained.double().mean()
    return bool(-change.mean() > least) and bool(rose)


def collapsed(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the statistics of training samples say, in words, or "". lines: those of a record, "samples/..." in them.

    It speaks of what is plain to see, a set of pictures that has become one picture, one colour, or black; not of quality.
    """
    names = {"variety": "variety", "colour_entropy": "colours"}
    told = [line for line in lines if "samples/variety" in line]
    if len(told) < 2 * WINDOW:
        return ""
    mean = lambda name, of: sum(line.get(f"samples/{name}") or 0.0 for line in of) / WINDOW
    for name, word in names.items():
        first, now = mean(name, told[:WINDOW]), mean(name, told[-WINDOW:])
        if now < COLLAPSED * first:
            return f"collapsed: the samples have kept {now / first:.0%} of the {word} they had at the start"
    first, now = mean("dark_share", told[:WINDOW]), mean("dark_share", told[-WINDOW:])
    return (
        f"collapsed: {now:.0%} of the samples' pixels are dark, {first:.0%} at the start"
        if now > DARKENED > 2 * first
        else ""
    )
