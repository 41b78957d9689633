"""What objects a prompt asks for, and how many of each: read off the batch's metadata, or off a plain English prompt."""

from __future__ import annotations

import re
from typing import Any

from tropism.core import Batch, UserError

NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBER_OF = {word: number for number, word in enumerate(NUMBERS)} | {"a": 1, "an": 1, "zero": 0}
# Where the description of an object ends and that of its place begins.
PLACES = (
    "on", "in", "at", "under", "over", "above", "below", "behind", "before", "near", "beside", "inside", "against",
    "with", "without", "from", "by", "next", "to", "during", "that", "which", "who", "is", "are",
)  # fmt: skip
OPENING = re.compile(r"^(an? )?(photo|photograph|picture|image|painting|drawing|illustration) (of|showing) ")
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "teeth": "tooth", "feet": "foot", "oxen": "ox", "knives": "knife", "wolves": "wolf", "leaves": "leaf",
    "loaves": "loaf", "shelves": "shelf", "calves": "calf", "tomatoes": "tomato", "potatoes": "potato",
}  # fmt: skip
SAME = ("sheep", "fish", "deer", "aircraft", "scissors", "glasses", "trousers", "bus", "series")

Wanted = list[tuple[str, int]]


def wanted_of(batch: Batch) -> list[Wanted]:
    """[(object, count), ...] for each row: `batch.meta[i]`'s "object" and "count" (1 if absent), else the prompt's.

    Raises UserError for a prompt without a count that can be read, or metadata of another form.
    """
    metas: list[dict] = batch.meta or [{}] * len(batch)
    return [
        _of_meta(meta) if meta and "object" in meta else wanted_of_prompt(prompt)
        for prompt, meta in zip(batch.prompts, metas, strict=True)
    ]


def _of_meta(meta: dict[str, Any]) -> Wanted:
    thing, count = meta["object"], meta.get("count", 1)
    fits = isinstance(thing, str) and thing.strip() and isinstance(count, int) and not isinstance(count, bool)
    if not fits or count < 0:
        raise UserError(
            f"metadata asks for {count!r} of {thing!r}; an object is a word and its count a whole number, 0 or more. "
            'Write {"object": "dog", "count": 3}.'
        )
    return [(thing.strip(), count)]


def wanted_of_prompt(prompt: str) -> Wanted:
    """[(object in the singular, count), ...] of "three dogs", "a photo of two cats and a red ball on grass".

    Things are joined by "and" or commas, each begins with a number, "a", "an" or "no", and ends before its place. Raises
    UserError for anything else.
    """
    text = OPENING.sub("", re.sub(r"[^\w\s,-]", "", prompt.lower()).strip())
    things = [_thing(part) for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", text)]
    # A later part without a number is the scene ("two cats, oil painting"); the first must have one.
    if things[0] is None:
        raise UserError(
            f"Cannot tell how many of what the prompt {prompt[:60]!r} asks for. Begin it with a count, as in 'three dogs', "
            'or give metadata {"object": "dog", "count": 3} in a .jsonl file of prompts.'
        )
    return [thing for thing in things if thing is not None]


def _thing(part: str) -> tuple[str, int] | None:
    words = part.split()
    if len(words) < 2 or not (words[0] in NUMBER_OF or words[0].isdecimal()):
        return None
    count = int(words[0]) if words[0].isdecimal() else NUMBER_OF[words[0]]
    place = next((i for i in range(1, len(words)) if _ends_before(words, i)), len(words))
    name = words[1:place]
    if not name:
        return None
    return " ".join([*name[:-1], name[-1] if count == 1 else singular(name[-1])]), count


def _ends_before(words: list[str], i: int) -> bool:
    """Whether the name of a thing has ended: a place begins, or, behind a plural, what the things do ("dogs running")."""
    return words[i] in PLACES or (words[i].endswith("ing") and singular(words[i - 1]) != words[i - 1])


def singular(word: str) -> str:
    """The singular of an English noun, by rule and a short list: dogs -> dog, cherries -> cherry, boxes -> box."""
    if word in IRREGULAR or word in SAME:
        return IRREGULAR.get(word, word)
    if re.search(r"\w[^aeiou]ies$", word):
        return word[:-3] + "y"
    if re.search(r"(s|x|z|ch|sh)es$", word) and not re.search(
        r"(horse|house|vase|nose|rose|case|base|maze|axe)s$", word
    ):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
