"""One number a picture, and people's levels of pictures, by name: what they are and how they are read from files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tropism.core import UserError
from tropism.restore.levels import HIGHEST, LOWEST


@dataclass(frozen=True)
class Scores:
    """A number for each picture, by its name. higher_is_worse: whether a higher one means more invented detail.

    levels: whether the numbers are levels from 1 to 5, or means of such. source: what messages call them. left_out: names without a number.
    Raises UserError for a number that is not finite, or a level outside 1 to 5.
    """

    values: Mapping[str, float]
    higher_is_worse: bool
    levels: bool = False
    source: str = "the scores"
    left_out: tuple[str, ...] = ()

    def __post_init__(self):
        if bad := [k for k, v in self.values.items() if not math.isfinite(v)]:
            raise UserError(
                f"In {self.source}, {bad[0]!r} has {self.values[bad[0]]}, which is no finite number"
                f"{f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''}. Score it again, or leave its row out."
            )
        if outside := [k for k, v in self.values.items() if self.levels and not LOWEST <= v <= HIGHEST]:
            raise UserError(
                f"In {self.source}, {outside[0]!r} has {self.values[outside[0]]:g}, and levels are from {LOWEST} to {HIGHEST}. "
                "If these are other numbers than levels, say levels=False."
            )

    @property
    def worse_up(self) -> Scores:
        """The same with higher being worse: levels are turned about 3, other numbers change their sign."""
        if self.higher_is_worse:
            return self
        turned = {k: LOWEST + HIGHEST - v if self.levels else -v for k, v in self.values.items()}
        return replace(self, values=turned, higher_is_worse=True)


@dataclass(frozen=True)
class Ratings:
    """Whole levels from 1 to 5 that people gave: {picture: {rater: level}}.

    Raises UserError for any other level.
    """

    levels: Mapping[str, Mapping[str, int]]
    higher_is_worse: bool = True
    source: str = "the ratings"
    raters: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        for name, given in self.levels.items():
            for rater, level in given.items():
                whole_level(level, f"In {self.source}, {rater!r} rates {name!r} with")
        seen = dict.fromkeys(rater for given in self.levels.values() for rater in given)
        object.__setattr__(self, "raters", tuple(seen))

    @property
    def means(self) -> Scores:
        """The mean level of each picture."""
        found = {name: sum(given.values()) / len(given) for name, given in self.levels.items() if given}
        return Scores(found, self.higher_is_worse, True, self.source)

    def table(self, names: Iterable[str]) -> np.ndarray:
        """(raters, pictures), NaN where a rater gave no level."""
        given = [self.levels[name] for name in names]
        return np.array([[of.get(rater, math.nan) for of in given] for rater in self.raters], float)


def whole_level(value: object, where: str) -> int:
    """A level as a whole number. where: how the message begins. Raises UserError for anything but 1, 2, 3, 4 or 5."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        number = math.nan
    if number not in range(LOWEST, HIGHEST + 1):
        raise UserError(
            f"{where} {str(value)[:40]!r}, and a level is one of 1, 2, 3, 4, 5. Correct it, or leave it out if none was given."
        )
    return int(number)


# ---------------------------------------------------------------------------------------------------- files


def read_scores(
    file: str | Path, *, column: str = "score", higher_is_worse: bool | None = None, levels: bool | None = None
) -> Scores:
    """The numbers of a .csv with the columns name and `column`, as `hallucination score` writes it.

    higher_is_worse: default what the column of that name says, which speaks of `score` where there is one; for another column beside it
    the direction must be given. levels: default whether the file is a judge's, which has a column per_repeat. Rows whose number is empty
    could not be scored; they stand in `left_out`.
    Raises UserError for a file that cannot be read, without names or numbers, with a name twice, or that does not tell its direction.
    """
    rows = _rows(Path(file), ("name", column))
    other = column != "score" and "score" in rows[0]
    if other and higher_is_worse is None:
        raise UserError(
            f"'{file}' has a column score, of which its higher_is_worse speaks, and not of {column}. Give higher_is_worse=True or False, "
            f"or add a table of {column} alone."
        )
    said = bool(higher_is_worse) if other else _direction(rows, Path(file), higher_is_worse)
    values, left_out = dict[str, float](), list[str]()
    for line, row in enumerate(rows, 2):
        name = row["name"]
        if name in values or name in left_out:
            raise UserError(
                f"'{file}' has {name!r} twice, again in line {line}. Keep one of them; names tell pictures apart."
            )
        if row[column].strip():
            values[name] = _number(row[column], f"Line {line} of '{file}' ({name!r})")
        else:
            left_out.append(name)
    judged = "per_repeat" in rows[0] and column == "score"
    return Scores(values, said, judged if levels is None else levels, f"'{Path(file).name}'", tuple(left_out))


def read_ratings(*files: str | Path, higher_is_worse: bool | None = None) -> Ratings:
    """People's levels from .csv files with the columns name, rater and level, several files as one.

    higher_is_worse: whether 5 is the worst; default what the column of that name says. Empty levels are ratings that were not given.
    Raises UserError as `read_scores`, for a level outside 1 to 5, and for two levels of one picture by one rater.
    """
    levels, directions = dict[str, dict[str, int]](), set[bool]()
    for file in map(Path, files):
        rows = _rows(file, ("name", "rater", "level"))
        directions.add(_direction(rows, file, higher_is_worse))
        for line, row in enumerate(rows, 2):
            where, rater = f"Line {line} of '{file}'", row["rater"].strip()
            if not rater:
                raise UserError(f"{where} names no rater. Write who gave the level, any short word will do.")
            if not row["level"].strip():
                continue
            given = levels.setdefault(row["name"], {})
            if rater in given:
                raise UserError(
                    f"{where} is a second rating of {row['name']!r} by {rater!r}. Keep one of them, or name the raters apart."
                )
            given[rater] = whole_level(row["level"], f"{where} gives the level")
    if len(directions) != 1:
        raise UserError("In some of the files of ratings 5 is the worst, in others 1. Turn one kind round first.")
    return Ratings(levels, directions.pop(), ", ".join(f"'{Path(f).name}'" for f in files))


def write_ratings(file: str | Path, ratings: Ratings) -> None:
    """A .csv that `read_ratings` reads: name, rater, level, higher_is_worse. Raises UserError where it cannot be written."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["name", "rater", "level", "higher_is_worse"])
    worse = str(ratings.higher_is_worse).lower()
    table.writerows([name, rater, level, worse] for name, of in ratings.levels.items() for rater, level in of.items())
    try:
        Path(file).write_text(out.getvalue(), "utf-8", newline="")
    except OSError as error:
        raise UserError(f"'{file}' cannot be written ({error.strerror or error}). Choose another place.") from error


def _rows(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table, each with a text in these columns. Raises UserError."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror or error}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text (byte {error.start}). Save it as CSV, UTF-8.") from error
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        names, rows = list(table.fieldnames or []), list(table)
    except csv.Error as error:
        raise UserError(f"'{file}' is no CSV table ({error}). Save it as CSV, UTF-8, with commas.") from error
    if missing := [c for c in columns if c not in names]:
        raise UserError(
            f"'{file}' has no column '{missing[0]}'; it has: {', '.join(names)[:200] or 'none'}. "
            f"Its first line must name {', '.join(columns)}, with commas between."
        )
    if not rows:
        raise UserError(f"'{file}' has no row below its first line. Give a file with at least 3 pictures.")
    if unnamed := [i for i, row in enumerate(rows, 2) if not row["name"].strip()]:
        raise UserError(f"Line {unnamed[0]} of '{file}' has no name. Write the picture's name there.")
    return rows


def _direction(rows: list[dict[str, str]], file: Path, asked: bool | None) -> bool:
    """Whether higher is worse, as the file says or as asked. Raises UserError where neither does, or both differ."""
    known = {"true": True, "false": False, "1": True, "0": False}
    told = {row.get("higher_is_worse", "").strip().lower() for row in rows} - {""}
    if wrong := told - set(known):
        raise UserError(f"'{file}' says higher_is_worse is {min(wrong)[:40]!r}. Write true or false.")
    said = {known[t] for t in told} | (set() if asked is None else {asked})
    if len(said) == 1:
        return said.pop()
    if not said:
        raise UserError(
            f"'{file}' does not say whether a higher number is worse, which scales differ in. Give higher_is_worse=True or False, or "
            "add a column higher_is_worse with true or false in every row."
        )
    raise UserError(
        f"'{file}' says of higher_is_worse both true and false{'' if asked is None else f', where {asked} was asked for'}. "
        "Make its rows one scale, or drop the argument."
    )


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{where} has {text[:40]!r} where a number is expected. Correct it, or empty it.") from error
