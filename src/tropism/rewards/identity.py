"""What a reward is made of, as text: by it a resumed run, and a server's clients, notice another reward under an old name."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tropism.core import Reward
from tropism.rewards import spelled
from tropism.rewards.load import CATALOGUE, URL, split

WHOLE = ("dock:", *URL)
"""Of these every letter counts: a command's arguments, a server's host."""
BEFORE_A_PLACE = tuple(f"{kind}:" for kind in (*CATALOGUE, "old", "old-uint8"))


def identity_of(rewards: Sequence[str], loaded: Reward | None = None) -> str:
    """What rewards are made of: names and weights, of paths the last part, since folders may be written in other ways, addresses and
    hub ids whole, the content of a user's own files, also of those inside product(...) and its like. loaded: the reward that these
    texts name; of servers in it also the hash.
    """
    return " ".join([*map(_of_one, rewards), *served(loaded)])


def served(reward: Reward | None) -> list[str]:
    """The hashes of the servers that a reward asks, also inside a combination."""
    terms: Any = getattr(reward, "terms", ())
    return [*getattr(reward, "served", ()), *(found for part, _ in terms for found in served(part))]


def _of_one(text: str) -> str:
    name = split(text)[0]
    weight = text[len(name) :]
    if spelled.is_spelled(name):
        kind, given = spelled.taken_apart(name)
        return f"{kind}({','.join(map(_of_one, given))}){weight}"
    if name.startswith(WHOLE):
        return text
    kind, colon, place = name.partition(":") if name.startswith(BEFORE_A_PLACE) else ("", "", name)
    if kind in CATALOGUE and not Path(place).exists():
        return text
    return (
        kind + colon + place.rstrip("/").rpartition("/")[2] + weight + ("" if kind in CATALOGUE else fingerprint(place))
    )


def fingerprint(text: str) -> str:
    """Of the file that a text names, "file" or "file.py:object", some letters of its hash; else nothing."""
    for name in (text, text.rpartition(":")[0]):
        if name and Path(name).is_file():
            return f" ({sha256(Path(name).read_bytes()).hexdigest()[:12]})"
    return ""
