"""The files that raters saved, read back: names instead of the form's words, and what its traps tell of each rater."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.core import UserError
from tropism.restore.form import ANSWERS, KEY, MUST, PEOPLE, SAME
from tropism.restore.ratings import Ratings, read_ratings, whole_level


@dataclass(frozen=True)
class Rater:
    """One person's file. rated of pictures: without the traps. caught of traps: answered as they must be; answered: at all.

    kept: whether the ratings count. word: what to know of them, a sentence; why they are left out where they are.
    """

    name: str
    rated: int
    pictures: int
    caught: int
    answered: int
    traps: int
    kept: bool
    word: str


@dataclass(frozen=True)
class Answers:
    """The ratings of the raters who are kept, every rater, and notes on pictures with too few ratings."""

    ratings: Ratings
    raters: tuple[Rater, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*(f"{r.name}: {r.word}" for r in self.raters), *self.notes])


def read_answers(key: str | Path, files: Sequence[str | Path]) -> Answers:
    """The ratings in the files that a form's raters saved. key: the form's .key.json.

    A rater who misses a trap, or answered none, is left out and named, with the reason.
    Raises UserError for files that cannot be read or belong to another form, a rater twice, levels outside 1 to 5, items rated twice or
    unknown to the key, and where no rater is left.
    """
    told = _json(Path(key), KEY, "the key of a form")
    items = told.get("items")
    if not isinstance(items, dict) or not all(
        isinstance(i, dict) and {"kind", "name"} <= set(i) for i in items.values()
    ):
        raise UserError(f"The key '{key}' does not tell its items. Give the .key.json as it was written with the form.")
    if not files:
        raise UserError("No file of a rater was given. Collect the ratings-NAME.json that the form saves.")
    raters, levels, seen = list[Rater](), dict[str, dict[str, int]](), dict[str, Path]()
    for file in map(Path, files):
        name, given = _given(file, str(told.get("form")), items)
        if name in seen:
            raise UserError(
                f"'{file}' and '{seen[name]}' are both by the rater {name!r}. Keep the later one, or if they are two people, change the "
                "rater in one of them."
            )
        seen[name] = file
        raters.append(_rater(name, given, items))
        for word, level in given.items():
            if raters[-1].kept and items[word]["kind"] == "picture":
                levels.setdefault(items[word]["name"], {})[name] = level
    if not levels:
        raise UserError("No rater is left: " + " ".join(f"{r.name}: {r.word}" for r in raters) + " Ask more people.")
    names = [i["name"] for i in items.values() if i["kind"] == "picture"]
    ratings = Ratings(levels, True, f"the answers to '{Path(key).name}'")
    return Answers(ratings, tuple(raters), _notes(names, levels))


def read_people(
    files: Sequence[str | Path], key: str | Path | None = None, higher_is_worse: bool | None = None
) -> Ratings:
    """People's ratings: .csv files with the columns name, rater, level, or the .json files of a form with its key.

    Raises UserError as `read_ratings` and `read_answers`, and for files of both kinds.
    """
    kinds = {Path(f).suffix.lower() for f in files}
    if kinds == {".csv"}:
        return read_ratings(*files, higher_is_worse=higher_is_worse)
    if kinds != {".json"}:
        raise UserError(
            f"Ratings are read from .csv files or from a form's .json files, not from {', '.join(sorted(kinds)) or 'nothing'}. "
            "Give files of one of these kinds."
        )
    if key is None:
        raise UserError(
            "The files of a form call pictures by words that only its key knows. Give the .key.json that was written beside it."
        )
    return read_answers(key, files).ratings


def _json(file: Path, kind: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror or error}). Check the path.") from error
    except ValueError as error:
        raise UserError(f"'{file}' is no JSON ({error}). It may be cut short: save it again from the form.") from error
    if not isinstance(found, dict) or found.get("format") != kind:
        raise UserError(f'\'{file}\' is not {what}: it does not say "format": "{kind}". Give the file as it was saved.')
    return found


def _given(file: Path, form: str, items: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """(rater, {item: level}) of a saved file. Raises UserError."""
    found = _json(file, ANSWERS, "a file that the form saved")
    if found.get("form") != form:
        raise UserError(
            f"'{file}' answers another form ({str(found.get('form'))[:40]!r}) than this key's ({form!r}). Give the key of its form."
        )
    rater, rows, given = found.get("rater"), found.get("ratings"), dict[str, int]()
    if not isinstance(rater, str) or not rater.strip() or not isinstance(rows, list):
        raise UserError(f"'{file}' has no rater or no ratings. Save it again from the form.")
    if found.get("higher_is_worse") is not True:
        raise UserError(f"'{file}' does not say that higher is worse, as the form does. Save it again from the form.")
    for row in rows:
        word = row.get("item") if isinstance(row, dict) else None
        if not isinstance(word, str) or word not in items or word in given:
            wrong = "rates twice" if isinstance(word, str) and word in given else "rates what the key does not know:"
            raise UserError(
                f"'{file}' {wrong} {str(word)[:40]!r}. Save it again from the form, and give that form's key."
            )
        given[word] = whole_level(row.get("level"), f"'{file}' gives {word!r} the level")
    return rater.strip(), given


def _rater(name: str, given: dict[str, int], items: dict[str, Any]) -> Rater:
    pictures = [w for w, i in items.items() if i["kind"] == "picture"]
    traps = [w for w, i in items.items() if i["kind"] in MUST]
    answered = [w for w in traps if w in given]
    missed = [w for w in answered if given[w] != MUST[items[w]["kind"]]]
    rated = sum(w in given for w in pictures)
    if missed:
        first = items[missed[0]]
        what = "the reference itself" if first["kind"] == SAME else f"another picture in place of {first['name']!r}"
        word = f"left out, missed {len(missed)} of {len(answered)} traps; {what} was rated {given[missed[0]]}, not {MUST[first['kind']]}."
    elif not answered:
        word = "left out, answered no trap, so nothing is known of the care that was taken."
    else:
        word = f"rated {rated} of {len(pictures)} pictures, and all of the {len(answered)} traps that were answered rightly."
    kept = bool(answered) and not missed
    return Rater(name, rated, len(pictures), len(answered) - len(missed), len(answered), len(traps), kept, word)


def _notes(names: Sequence[str], levels: dict[str, dict[str, int]]) -> tuple[str, ...]:
    few = [n for n in names if len(levels.get(n, {})) < PEOPLE]
    if not few:
        return ()
    return (
        f"{len(few)} of {len(names)} pictures have fewer than {PEOPLE} ratings, the first {few[0]!r} with {len(levels.get(few[0], {}))}. "
        "Ask more people.",
    )
