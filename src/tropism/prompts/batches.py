"""Prompts by whatever name, their train / held-out split, and the batch of every update."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tropism.core import Batch, Stream, UserError, generator
from tropism.prompts.files import READERS, Prompt, check_lengths, from_row, read_file
from tropism.prompts.sets import DATASET, bundled, nearest, read_dataset
from tropism.prompts.wildcards import expand
from tropism.space.cameras import VIEWS
from tropism.worlds import glyphs, glyphs_posterior, shapes, solids

__all__ = ["Prompt", "as_batch", "batch_of", "listed", "own_rows", "read_prompts", "split", "train_and_held_out"]


def read_prompts(source: str | Path) -> list[Prompt]:
    """The prompts of a file, of a bundled set ("animals"), or of a data set on the Hub ("org/name:column@split").

    A file is .txt (one a line), .jsonl (`prompt`, optional `negative_prompt`, `metadata`) or .csv (the same columns), and
    wins over the others. Wildcards in files and bundled sets are expanded; those in data sets are text.
    Raises UserError for a source that is missing, empty, binary, of another kind, or has a line without a prompt.
    """
    name, path = str(source), Path(source)
    dataset = DATASET.fullmatch(name)
    if os.path.isfile(name) or path.suffix.lower() in READERS:
        found = _opened(path)
    elif name in bundled():
        found = _opened(bundled()[name])
    elif os.path.isdir(dataset["name"] if dataset else name):
        raise UserError(f"'{name}' is a folder. Name a file in it that ends in .txt, .jsonl or .csv.")
    elif dataset:
        found = read_dataset(dataset["name"], dataset["column"], dataset["split"])
    else:
        raise UserError(
            f"There is no prompt file and no bundled prompt set '{name[:200]}'. {nearest(name)} "
            "Or give a .txt, .jsonl or .csv file, or a data set of the Hub as org/name."
        )
    return check_lengths(found, path.name)


def _opened(path: Path) -> list[Prompt]:
    if path.stem in bundled() and not os.path.isfile(path):
        raise UserError(f"There is no prompt file '{path}'. The bundled set goes by its bare name: {path.stem}")
    return expand(read_file(path), path)


def split(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): every tenth distinct prompt is kept out of training; below ten, all serve both (with other noise).

    A line with wildcards gives up a tenth of its prompts, chosen by a hash: every tenth in order could be one and the same
    alternative. No alternative is held out with every prompt that has it, except one that has but one prompt.
    Prompts that are added at the end of a file change nothing for those before.
    """
    unique: dict[str, Prompt] = {}
    for prompt in prompts:  # metadata may hold lists, which have no hash
        unique.setdefault(repr(prompt), prompt)
    distinct = list(unique.values())
    if len(distinct) < 10:
        return distinct, distinct
    held = _held_out(distinct)
    return [p for i, p in enumerate(distinct) if i not in held], [p for i, p in enumerate(distinct) if i in held]


def _held_out(prompts: list[Prompt]) -> set[int]:
    """Line by line, so many that they are a tenth of all so far: a line with a single prompt is held out if it is the tenth."""
    held: set[int] = set()
    kept: Counter = Counter()
    for _, places in groupby(range(len(prompts)), key=lambda i: prompts[i].line or i):
        line = list(places)
        kept.update(choice for i in line for choice in prompts[i].choices)
        held |= _chosen({i: prompts[i] for i in line}, (line[-1] + 1) // 10 - len(held), kept)
    return held


def _chosen(line: dict[int, Prompt], count: int, kept: Counter) -> set[int]:
    """`count` places of a line, first those whose every alternative is left in training; `kept` counts these."""
    found: set[int] = set()
    if not count:
        return found
    ranked = sorted(line, key=lambda i: hashlib.sha256(line[i].text.encode("utf-8", "surrogatepass")).digest())
    for sparing in (True, False):
        for i in ranked:
            if len(found) < count and i not in found and not (sparing and any(kept[c] < 2 for c in line[i].choices)):
                found.add(i)
                kept.subtract(line[i].choices)
    return found


def as_batch(prompts: list[Prompt], index: range | None = None, draws: Sequence[int] | None = None) -> Batch:
    """The batch of these prompts, with their pictures where they have some. draws: each one's place in a run, as meta "draw"."""
    places = [{"name": p.name} if p.fill else {} for p in prompts]
    for place, draw in zip(places, draws or (), strict=bool(draws)):
        place |= {"draw": draw} if place else {}
    batch = Batch(
        [p.text for p in prompts],
        [p.negative for p in prompts],
        meta=[dict(p.meta) | place for p, place in zip(prompts, places, strict=True)],
        index=tuple(index or range(len(prompts))),
    )
    return prompts[0].fill(batch) if prompts and prompts[0].fill else batch


def names_of(batch: Batch) -> list[str]:
    """What the rows of a batch are called on pages: their prompts, or their pictures' names."""
    return [m.get("name", p) for p, m in zip(batch.prompts, batch.meta or [{}] * len(batch), strict=True)]


def batch_of(prompts: list[Prompt], size: int, seed: int, update: int, group: int = 1) -> Batch:
    """The batch of an update, see `chosen`; a pure function."""
    first = update * size // group
    return as_batch(chosen(prompts, size, seed, update, group), draws=[first + i // group for i in range(size)])


def chosen(prompts: list[Prompt], size: int, seed: int, update: int, group: int = 1) -> list[Prompt]:
    """The prompts of an update: in an order shuffled anew every pass, `size / group` at a time, each `group` times in a row.

    size: a multiple of group.
    """
    places = range(update * size // group, (update + 1) * size // group)
    orders = {
        e: generator(seed, Stream.SHUFFLE, e).permutation(len(prompts)) for e in {p // len(prompts) for p in places}
    }
    return [prompts[orders[p // len(prompts)][p % len(prompts)]] for p in places for _ in range(group)]


def train_and_held_out(
    prompts: str | Path | Sequence[str] | None, held_out: str | Path | Sequence[str] | None, model: Any
):
    """(train, held out) prompts: the user's, or those of the bundled world.

    A list of texts is taken as it is: its braces and underscores are no wildcards.
    """
    if prompts is None:
        if not isinstance(model, str) or model not in WORLDS:
            raise UserError(
                f"No prompts were given, and only the bundled models {', '.join(WORLDS)} have their own (this is {model!r}). "
                "Add --prompts FILE with one prompt a line."
            )
        train, held = WORLDS[model]()
    else:
        train, held = split(listed(prompts))
    if held_out is not None:
        train, held = listed(prompts) if prompts is not None else train, listed(held_out)
    return train, held


def _of_shapes() -> list[list[Prompt]]:
    return [[Prompt(s.prompt) for s in shapes.scenes(held_out)] for held_out in (False, True)]


def _of_glyphs() -> list[list[Prompt]]:
    """Scenes of seed 1 to train on, of seed 0 held out."""
    fill = glyphs_posterior.filled
    scene = lambda number, seed: Prompt(glyphs.PROMPT, meta=(("number", number), ("seed", seed)), fill=fill)
    return [[scene(n, seed) for n in range(count)] for count, seed in ((20_000, 1), (4000, 0))]


def _of_solids() -> list[list[Prompt]]:
    """Every solid from every side."""
    return [
        [Prompt(replace(s, view=view).prompt) for s in solids.scenes(held_out) for view in VIEWS]
        for held_out in (False, True)
    ]


WORLDS = {"shapes": _of_shapes, "glyphs": _of_glyphs, "solids": _of_solids}
"""() -> (train, held out) prompts of the bundled models of pictures."""


def listed(prompts: str | Path | Sequence[str]) -> list[Prompt]:
    """The prompts of a source, or of a list of texts as they are."""
    if isinstance(prompts, str | Path):
        return read_prompts(prompts)
    if not prompts:
        raise UserError("The list of prompts is empty. Give at least one prompt.")
    return [from_row({"prompt": p}, f"prompts[{i}]") for i, p in enumerate(prompts)]


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
