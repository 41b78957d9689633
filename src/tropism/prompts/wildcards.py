"""Wildcards in prompts: {red|blue} is each of its alternatives, __animals__ each line of animals.txt."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

from tropism.core import UserError
from tropism.prompts.files import Prompt, read_file
from tropism.prompts.sets import bundled, nearest

MOST = 100_000

# a name has no slash and begins with a letter or digit, so it never leads out of the folder
WILDCARD = re.compile(r"(\{[^{}]*\|[^{}]*\}|__[^\W_](?:[\w.-]*?[^\W_])?__)")

Choice = tuple[int, str]
Option = tuple[str, tuple[Choice, ...]]
"""A text without wildcards, and (place, alternative) of every choice that led to it."""

Lists = dict[Path, list[tuple[str, Option]]]
"""Every line of the files opened so far, with what it becomes."""


def expand(prompts: list[Prompt], file: Path) -> list[Prompt]:
    """Every combination of every prompt's wildcards, in order, the leftmost changing slowest; negatives stay as they are.

    `{red|blue}` holds alternatives; braces without a bar are text. `__name__` is a line of name.txt beside `file`, or of
    the bundled set of that name. Such lines, and alternatives, may hold wildcards too.
    Raises UserError for braces that are nested or left open, a missing or circular list, or more than 100,000 prompts.
    """
    found, lists, made = [], {}, 0
    for prompt in prompts:
        options = _options(prompt.text, file, (file.resolve(),), lists)
        if options == [(prompt.text, ())]:
            found.append(prompt)
            continue
        made += len(options)
        _check_count(made, file)
        found += [_made(prompt, option, file) for option in options]
    return found


def _made(prompt: Prompt, option: Option, file: Path) -> Prompt:
    text = " ".join(option[0].split())  # an empty alternative leaves two spaces
    if not text:
        raise UserError(f"{_named(prompt.text, file)} can become an empty prompt. Take its empty alternative out.")
    return replace(prompt, text=text, line=prompt.text, choices=tuple(dict.fromkeys(option[1])))


def _options(text: str, file: Path, trail: tuple[Path, ...], lists: Lists) -> list[Option]:
    """All that a text of `file` can become. trail: the files that led here, itself the last."""
    _check_braces(text, file)
    pieces = WILDCARD.split(text)  # text at even places, wildcards at odd ones
    slots = [
        [(t, ((i, a), *picked)) for a, (t, picked) in _alternatives(p, text, file, trail, lists)]
        if i % 2
        else [(p, ())]
        for i, p in enumerate(pieces)
    ]
    _check_count(math.prod(map(len, slots)), file)
    return [
        ("".join(t for t, _ in options), tuple(chain.from_iterable(picked for _, picked in options)))
        for options in product(*slots)
    ]


def _alternatives(
    wildcard: str, text: str, file: Path, trail: tuple[Path, ...], lists: Lists
) -> list[tuple[str, Option]]:
    """(alternative, what it becomes) of everything that a wildcard stands for."""
    if wildcard.startswith("{"):
        return _gathered(((a, _options(a, file, trail, lists)) for a in wildcard[1:-1].split("|")), file)
    found = _find(wildcard[2:-2], text, file)
    if found.resolve() in trail:
        way = " -> ".join(p.name for p in (*trail, found))
        raise UserError(f"The lists of wildcards go round in a circle: {way}. Take {wildcard} out of '{file.name}'.")
    if found not in lists:
        inner = (*trail, found.resolve())
        lists[found] = _gathered(((p.text, _options(p.text, found, inner, lists)) for p in read_file(found)), found)
    return lists[found]


def _gathered(alternatives: Iterable[tuple[str, list[Option]]], file: Path) -> list[tuple[str, Option]]:
    """One by one, so that a list far too long is refused before it fills the memory."""
    found: list[tuple[str, Option]] = []
    for alternative, options in alternatives:
        found += [(alternative, option) for option in options]
        _check_count(len(found), file)
    return found


def _find(name: str, text: str, file: Path) -> Path:
    for path in (file.parent / f"{name}.txt", bundled().get(name)):
        if path is not None and path.is_file():
            return path
    raise UserError(
        f"{_named(text, file)} asks for a line of '{name}.txt', but there is no such file in {file.parent} and no bundled "
        f"set '{name}'. Write that file, or take the double underscores out. {nearest(name)}"
    )


def _check_braces(text: str, file: Path) -> None:
    """Raises UserError for braces that someone who writes alternatives cannot have meant as they stand."""
    if "|" not in text:
        return
    depth, start = 0, 0
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 1 and brace[0] == "{":
            start = brace.start()
        inside = text[start + 1 : brace.start()]
        if depth == 0 and "|" in inside and "{" in inside:
            raise UserError(
                f"{_named(text, file)} has braces within braces. Write them out, or put them in a file: __name__."
            )
        if depth < 0:
            break
    if depth:
        raise UserError(f"{_named(text, file)} has a brace without its other half. Write {{red|blue}}.")


def _check_count(count: int, file: Path) -> None:
    if count > MOST:
        raise UserError(
            f"The wildcards of '{file.name}' make {count:,} prompts or more; the limit is {MOST:,}. "
            "Take alternatives out, or write fewer wildcards in a line."
        )


def _named(text: str, file: Path) -> str:
    return f"The prompt {text[:80]!r} in '{file.name}'"
