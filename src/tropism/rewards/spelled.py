"""Rewards of rewards as text: product(a,b=2), minimum(a,b), hinge(a,0.3), target(a,5), one inside another."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from tropism.core import Reward, UserError
from tropism.rewards.combine import hinge, minimum, product, target

OF_MANY = {"product": product, "minimum": minimum}
OF_ONE = {"hinge": hinge, "target": target}
_CALL = re.compile(rf"({'|'.join([*OF_MANY, *OF_ONE])})\((.*)\)", re.DOTALL)


def is_spelled(text: str) -> bool:
    """Whether the text is such a reward, rather than a name."""
    return _CALL.fullmatch(text.strip()) is not None


def read(text: str, load: Callable[[str], Reward], split: Callable[[str], tuple[str, float]]) -> Reward:
    """The reward that the text spells. load: of one name. split: "NAME=WEIGHT" -> (NAME, WEIGHT). Raises UserError."""
    kind, given = taken_apart(text)
    if kind in OF_ONE:
        return OF_ONE[kind](load(given[0]), _number(kind, given))
    if len(given) < 2:
        raise UserError(
            f"{text} has {len(given)} reward; {kind}(...) joins at least two. Try {kind}(jpeg,clip:FOLDER)."
        )
    pairs = [split(g) for g in given]
    return OF_MANY[kind]([(load(name), weight) for name, weight in pairs])


def taken_apart(text: str) -> tuple[str, list[str]]:
    """("hinge", ["a", "0.3"]) of a spelled reward. Raises UserError for an empty place."""
    found = _CALL.fullmatch(text.strip())
    assert found is not None
    return found[1], arguments(found[2])


def arguments(inside: str) -> list[str]:
    """What stands between the commas, those inside brackets left alone. Raises UserError for an empty place."""
    found, depth = [""], 0
    for c in inside:
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    found = [f.strip() for f in found]
    if not all(found):
        raise UserError(f"A reward is missing between the commas of ({inside}). Name one, or drop a comma.")
    return found


def _number(kind: str, given: Sequence[str]) -> float:
    try:
        number = float(given[1]) if len(given) == 2 else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UserError(
            f"{kind}({','.join(given)}) is not a reward and a number. Write {kind}(NAME,NUMBER), for example {kind}(jpeg,-1.2)."
        )
    return number
