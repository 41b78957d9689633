"""A judge's reply as a verdict: the last JSON object that holds a score, whatever stands around it; never a number nobody said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tropism.core import UserError
from tropism.restore.judge_pictures import Box
from tropism.restore.levels import HIGHEST, LOWEST

MOST_TEXT = 65_536
"""Letters of a reply that are read, the last ones."""
MOST_ITEMS = 200
MOST_STARTS = 2000
_START = re.compile(r"\{(?=\s*[\"}])")
_SCORE = re.compile(
    r"\b(?:score|level)\b[\s\"'*_]*(?:is|of|=|:)?[\s\"'*_]*([1-5])(?:\.0+)?\b(?![.,]\d)(?!\s*(?:-|–|to|through|or|and)\s*\d)",
    re.I,
)


class JudgeUnavailable(UserError):
    """The judge cannot be asked at all, whatever the picture: it is not there, wants a key, has no eyes, or is not to be asked."""


class JudgeFailed(UserError):
    """The judge gave no verdict on this picture."""


class ParseError(JudgeFailed):
    """A reply that holds no score, or none that can be one. `raw` is the reply."""

    def __init__(
        self,
        why: str,
        raw: str = "",
        remedy: str = "Ask a model that follows instructions, or let it say more: max_tokens=4096.",
    ):
        start = " ".join("".join(c if c.isprintable() else " " for c in raw).split())[:120]
        said = f", which begins {start!r}" if start else ""
        super().__init__(f"The judge's reply{said} {why}. {remedy}")
        self.raw = raw


@dataclass(frozen=True)
class Item:
    """A discrepancy. box: shares of the picture, None where the judge gave none. severity: 1 to 3, or None. repeat: which one saw it."""

    box: Box | None
    kind: str
    description: str
    severity: int | None
    omission: bool
    repeat: int = 0


@dataclass(frozen=True)
class Verdict:
    """One reply. score: the level 1-5 that it names. expected: the mean level under its token's probabilities, where they are known."""

    score: int
    items: tuple[Item, ...]
    confidence: float | None
    raw: str
    expected: float | None = None
    usage: tuple[int, int] | None = None


def parse(text: str, size: tuple[int, int] = (1, 1)) -> Verdict:
    """The verdict of a reply. size: width and height of the candidate shown, for judges that give boxes in pixels.

    <think> blocks, code fences and prose around the object are passed over. 3.0 and "4" count as whole; 3.7, 9 and a reply without a
    score raise ParseError. Of several objects with a score the last one counts, and must be right.
    """
    said = _spoken(text[-MOST_TEXT:])
    scored = [found for found in _objects(said) if "score" in found]
    if not scored:
        return Verdict(_in_prose(said, text), (), None, text)
    last = scored[-1]
    score = _level(last["score"])
    if score is None:
        raise ParseError(f"gives the score {str(last['score'])[:40]!r}, which is no whole number from 1 to 5", text)
    items = last.get("items")
    items = items if isinstance(items, list) else []
    items = [item for item in items[:MOST_ITEMS] if isinstance(item, dict)]
    unit = _unit([found for item in items if (found := _sides(item.get("box")))], size)
    read = tuple(_item(item, unit) for item in items)
    return Verdict(score, read, _share(last.get("confidence")), text)


def _spoken(text: str) -> str:
    """A reply without what its model thought aloud; a thought that never ends leaves nothing after it."""
    text = re.sub(r"<think>.*?</think>", " ", text, flags=re.S | re.I)
    text = re.split(r"</think>", text, flags=re.I)[-1]
    return re.split(r"<think>", text, flags=re.I)[0]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects of a text, in order; the last MOST_STARTS places where one could begin are tried."""
    decoder, end = json.JSONDecoder(), 0
    for start in [m.start() for m in _START.finditer(text)][-MOST_STARTS:]:
        if start < end:
            continue
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        yield found


def _in_prose(said: str, text: str) -> int:
    """The level of a reply without an object, where it names exactly one. Raises ParseError."""
    found = {int(level) for level in _SCORE.findall(said)}
    if len(found) != 1:
        why = "names several scores" if found else "holds no score" if said.strip() else "is empty"
        raise ParseError(why, text)
    return found.pop()


def _level(value: Any) -> int | None:
    """A whole number from 1 to 5 of a number or a text, else None."""
    number = _number(value)
    return int(number) if number is not None and number.is_integer() and LOWEST <= number <= HIGHEST else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _share(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= 1 else None


def _item(item: dict[str, Any], unit: tuple[float, float]) -> Item:
    kind, severity = str(item.get("kind", item.get("type", "")))[:40], _number(item.get("severity"))
    return Item(
        box=_box(item.get("box"), unit),
        kind=kind,
        description=str(item.get("description", ""))[:400],
        severity=int(severity) if severity in (1, 2, 3) else None,
        omission=item.get("omission") is True or kind.lower() in ("missing", "omission"),
    )


def _sides(value: Any) -> Box | None:
    """left, top, right, bottom as they were given, of an object or a list; None where they are no four numbers from 0 up."""
    if isinstance(value, dict):
        value = [value.get(side) for side in ("left", "top", "right", "bottom")]
    numbers = [_number(v) for v in value] if isinstance(value, list) and len(value) == 4 else [None]
    if any(n is None or n < 0 for n in numbers):
        return None
    left, top, right, bottom = (n for n in numbers if n is not None)
    return left, top, right, bottom


THOUSAND, SLIP = 1000.0, 1.05
"""Some models place boxes on a scale from 0 to this, whatever was asked for and whatever the picture's size."""


def _unit(boxes: Sequence[Box], size: tuple[int, int]) -> tuple[float, float]:
    """What a reply's boxes beyond 1 are divided by, across and down, pixels or thousandths, to become shares. One reply has one
    scale: pixels, unless a box that fits into a thousand leaves the picture by more than a slip.
    """
    across, down = (max((max(b[i], b[i + 2]) for b in boxes), default=0.0) for i in (0, 1))
    leaves = across > SLIP * size[0] or down > SLIP * size[1]
    return (THOUSAND, THOUSAND) if leaves and max(across, down) <= THOUSAND else (float(size[0]), float(size[1]))


def _box(value: Any, unit: tuple[float, float]) -> Box | None:
    """left, top, right, bottom as shares; None where they are no box inside the picture."""
    found = _sides(value)
    if not found:
        return None
    unit = (1.0, 1.0) if max(found) <= 1 else unit
    left, top, right, bottom = found[0] / unit[0], found[1] / unit[1], found[2] / unit[0], found[3] / unit[1]
    inside = max(left, top, right, bottom) <= 1 and left < right and top < bottom
    return (left, top, right, bottom) if inside else None


def expected_level(tokens: Sequence[Any]) -> float | None:
    """The mean level under the probabilities of the token that names the score; None where they were not sent.

    tokens: `choices[0].logprobs.content` of a chat completion, with `top_logprobs`.
    """
    rows = [t for t in tokens if isinstance(t, dict)]
    texts = [str(t.get("token", "")) for t in rows]
    named = list(re.finditer(r'"score"\s*:\s*"?\s*(?=\d)', "".join(texts)))
    if not named:
        return None
    at, start = named[-1].end(), 0
    for row, text in zip(rows, texts, strict=True):
        if start <= at < start + len(text):
            return _mean_level(row.get("top_logprobs") or [])
        start += len(text)
    return None


def _mean_level(candidates: list[Any]) -> float | None:
    weights = dict[int, float]()
    for candidate in candidates:
        token = str(candidate.get("token", "")).strip(' "') if isinstance(candidate, dict) else ""
        logarithm = _number(candidate.get("logprob")) if token in ("1", "2", "3", "4", "5") else None
        if logarithm is not None:
            weights[int(token)] = weights.get(int(token), 0.0) + math.exp(min(logarithm, 0.0))
    total = sum(weights.values())
    return sum(level * weight for level, weight in weights.items()) / total if total > 0 else None


def capped(verdict: Verdict, highest: int) -> Verdict:
    """A verdict whose every finding is an omission, at most at level `highest`; any other as it is."""
    if not verdict.items or not all(item.omission for item in verdict.items):
        return verdict
    expected = None if verdict.expected is None else min(verdict.expected, float(highest))
    return replace(verdict, score=min(verdict.score, highest), expected=expected)
