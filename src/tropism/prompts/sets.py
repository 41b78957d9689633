"""Prompt sets by name: those that ship inside the package, and data sets on the Hugging Face Hub, read lazily."""

from __future__ import annotations

import difflib
import importlib
import re
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from tropism.core import UserError
from tropism.prompts.files import Prompt, from_row

DATASET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<column>[^@]+))?(@(?P<split>.+))?")
"""org/name, org/name:column, org/name@split or org/name:column@split."""

COLUMNS = ("prompt", "text", "caption", "Prompt")
MOST_ROWS = 10_000


def bundled() -> dict[str, Path]:
    """The file of every bundled set, by its name."""
    found = Path(str(files("tropism") / "prompts")).glob("*.txt")
    return {p.stem: p for p in sorted(found, key=lambda p: p.stem)}


def nearest(name: str) -> str:
    """A sentence with the bundled set that `name` may have meant, and all there are."""
    close = difflib.get_close_matches(name.lower(), bundled(), 1, cutoff=0.5)
    return (f"Did you mean '{close[0]}'? " if close else "") + f"Bundled: {', '.join(bundled())}."


def read_dataset(name: str, column: str | None = None, split: str | None = None) -> list[Prompt]:
    """The first 10,000 rows of one column of a data set on the Hub; rows without text are left out.

    name: "org/name". column: default the first of prompt, text, caption, Prompt that exists. split: default "train".
    Raises UserError for a data set, column or split that is missing, gated or out of reach, or for a missing package.
    """
    chosen, values = _values(_library(name), name, column, split or "train")
    if len(values) > MOST_ROWS:
        Console(soft_wrap=True, highlight=False, markup=False).print(
            f"Only the first {MOST_ROWS:,} rows of '{name}' are read, and it has more. "
            "For others, save them one a line as a .txt file."
        )
    texts = {i: v for i, v in enumerate(values[:MOST_ROWS], 1) if v is not None}
    for value in texts.values():
        if not isinstance(value, str):
            raise UserError(f"The column '{chosen}' of '{name}' holds {type(value).__name__}, not text. Name another.")
    found = [from_row({"prompt": v}, f"'{name}' row {i}") for i, v in texts.items() if v.strip()]
    if not found:
        raise UserError(f"'{name}' holds no prompt there. Name another column or split: {name}:COLUMN@SPLIT")
    return found


def _library(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"There is no prompt file '{name}', and reading a data set of that name needs a package that cannot be "
            f'imported ({error}). Install it: pip install "tropism[data]"'
        ) from error


def _values(library: Any, name: str, column: str | None, split: str) -> tuple[str, list[Any]]:
    """(column, its values), streamed, so that little is downloaded: one row for the names, then that column alone."""
    try:
        rows = library.load_dataset(name, split=split, streaming=True)
        first = next(iter(rows), None)
        if first is None:
            return "", []
        chosen = _column(first, column, name)
        return chosen, [row.get(chosen) for row in islice(rows.select_columns([chosen]), MOST_ROWS + 1)]
    except UserError:
        raise
    except Exception as error:  # the package, its hub client and its readers raise kinds of their own, by version
        raise _unreadable(name, split, error) from error


def _column(row: dict[str, Any], asked: str | None, name: str) -> str:
    for column in (asked,) if asked else COLUMNS:
        if column in row:
            return column
    missing = f"no column '{asked}'" if asked else f"none of the columns {', '.join(COLUMNS)}"
    raise UserError(f"The data set '{name}' has {missing}. It has: {', '.join(row)}. Write {name}:COLUMN.")


def _unreadable(name: str, split: str, error: Exception) -> UserError:
    said = f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"There is no prompt file '{name}', and no data set of that name on the Hub that you may read {said}. Check "
            f"https://huggingface.co/datasets/{name}; if it is gated, ask for access there and run: hf auth login"
        )
    if isinstance(error, ValueError):
        return UserError(f"The data set '{name}' cannot be read, split '{split}' {said}. Try {name}@SPLIT.")
    return UserError(
        f"The data set '{name}' cannot be reached {said}. Check the network and HF_HUB_OFFLINE, or save its prompts "
        "one a line as a .txt file."
    )
