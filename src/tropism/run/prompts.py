"""Prompt files, their train / held-out split, and the batch of every update."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tropism.core import Batch, Stream, UserError, generator
from tropism.worlds import shapes

LONGEST = 20_000


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    text: str
    negative: str = ""
    meta: tuple = ()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read .txt (one a line), .jsonl (`prompt`, optional `negative_prompt`, `metadata`) or .csv (the same columns).

    Raises UserError for a file that is missing, empty, binary, of another kind, or has a line without a prompt.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(
            f"Prompts cannot be read from '{path.name}': its ending is '{path.suffix}'. Use .txt (one prompt a line), "
            ".jsonl or .csv (with a `prompt` column)."
        )
    found = READERS[path.suffix.lower()](_text(path), path.name)
    if not found:
        raise UserError(f"The prompt file '{path.name}' holds no prompt. Write one prompt a line.")
    longest = max(found, key=lambda p: len(p.text)).text
    if len(longest) > LONGEST:
        raise UserError(
            f"'{path.name}' has a prompt of {len(longest)} characters; the limit is {LONGEST}. Is it one prompt a line?"
        )
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"There is no prompt file '{path}'. Check the path given to --prompts.")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompt file '{path.name}' is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise UserError(f"The prompt file '{path.name}' is binary, not text. Give a .txt, .jsonl or .csv file.")
    return text


def _from_txt(text: str, name: str) -> list[Prompt]:
    return [Prompt(line.strip()) for line in text.split("\n") if line.strip()]


def _from_jsonl(text: str, name: str) -> list[Prompt]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"'{name}' line {number} is not JSON: {error}. Write one object a line.") from error
            found.append(_from_row(row, f"'{name}' line {number}"))
    return found


def _from_csv(text: str, name: str) -> list[Prompt]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"'{name}' is not a table of comma-separated values: {error}. Is a quote left open?") from error
    return [_from_row(row, f"'{name}' row {number}") for number, row in enumerate(rows, 1)]


def _from_row(row, place: str) -> Prompt:
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place} has no `prompt`. Give every line a `prompt` that is text.")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{place} has half a character (a lone surrogate) in its `prompt`. Save the file as UTF-8.")
    meta, negative = row.get("metadata"), row.get("negative_prompt") or ""
    if not isinstance(negative, str):
        raise UserError(f"{place} has a `negative_prompt` that is not text: {negative!r}. Put it in quotes.")
    return Prompt(" ".join(text.split()), negative, tuple(meta.items()) if isinstance(meta, dict) else ())


READERS = {".txt": _from_txt, ".jsonl": _from_jsonl, ".csv": _from_csv}


def split(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): every tenth distinct prompt is kept out of training; below ten, all serve both (with other noise)."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:  # metadata may hold lists, which have no hash
        unique.setdefault(repr(prompt), prompt)
    distinct = list(unique.values())
    if len(distinct) < 10:
        return distinct, distinct
    return [p for i, p in enumerate(distinct) if i % 10 != 9], distinct[9::10]


def as_batch(prompts: list[Prompt], index: range | None = None) -> Batch:
    return Batch(
        [p.text for p in prompts],
        [p.negative for p in prompts],
        meta=[dict(p.meta) for p in prompts],
        index=tuple(index or range(len(prompts))),
    )


def batch_of(prompts: list[Prompt], size: int, seed: int, update: int) -> Batch:
    """The batch of an update: the prompts in an order shuffled anew every pass, `size` at a time; a pure function."""
    places = range(update * size, (update + 1) * size)
    orders = {
        e: generator(seed, Stream.SHUFFLE, e).permutation(len(prompts)) for e in {p // len(prompts) for p in places}
    }
    return as_batch([prompts[orders[p // len(prompts)][p % len(prompts)]] for p in places])


def train_and_held_out(
    prompts: str | Path | Sequence[str] | None, held_out: str | Path | Sequence[str] | None, model: Any
):
    """(train, held out) prompts: the user's, or those of the bundled world."""
    if prompts is None:
        if model != "shapes":
            raise UserError(
                f"No prompts were given, and only the bundled model 'shapes' has its own (this is {model!r}). "
                "Add --prompts FILE with one prompt a line."
            )
        train, held = ([Prompt(s.prompt) for s in shapes.scenes(side)] for side in (False, True))
    else:
        train, held = split(_listed(prompts))
    if held_out is not None:
        train, held = _listed(prompts) if prompts is not None else train, _listed(held_out)
    return train, held


def _listed(prompts: str | Path | Sequence[str]) -> list[Prompt]:
    if isinstance(prompts, str | Path):
        return read_prompts(prompts)
    if not prompts:
        raise UserError("The list of prompts is empty. Give at least one prompt.")
    return [_from_row({"prompt": p}, f"prompts[{i}]") for i, p in enumerate(prompts)]


def own_rows(batch: Batch) -> Batch:
    """This process's rows of an update's batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return batch
    rank, world = dist.get_rank(), dist.get_world_size()
    if len(batch) < world:
        raise UserError(
            f"The batch has {len(batch)} samples for {world} processes; every process needs at least one. "
            f"Try --batch {world}."
        )
    return batch[rank::world]
