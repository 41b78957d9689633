"""Commands about people: how far scores agree with them, a form to ask them with, and the public benchmark that did."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tropism.core import UserError
from tropism.judged import agreed
from tropism.restore import benchmark as public
from tropism.restore.agreement import FEWEST, agreement
from tropism.restore.form import Form, write_form
from tropism.restore.form_answers import read_answers, read_people
from tropism.restore.loading import Sources
from tropism.restore.pairs import paired
from tropism.restore.pictures import save, size
from tropism.restore.ratings import Ratings, Scores, read_scores
from tropism.restore.scoring import write_table

DIRECTIONS = {"worse": True, "better": False, None: None}
PEOPLE = "people.csv"
FORM_PIXELS = 4096
"""Pixels of the longest side that people can look at side by side."""
ALL = "All"


def agree(
    *,
    scores: str | Path,
    people: Sequence[str] = (),
    key: str | Path | None = None,
    exact: str | Path | None = None,
    benchmark: str | None = None,
    column: str = "score",
    exact_column: str = "score",
    scores_higher_is: str | None = None,
    people_higher_is: str | None = None,
    common: bool = False,
    above: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    command: str = "",
) -> dict[str, agreed.Group]:
    """How far scores agree with people, or with a known count: correlations, levels, pairs, each with its interval.

    scores: a .csv with name and `column`. One of: people, ratings as .csv files or the .json files of a form with its key; exact, a .csv
    with name and exact_column; benchmark, a folder of the command `benchmark` or a data set's name. scores_higher_is, people_higher_is:
    worse or better, where the files do not say. common, above, seed: as `agreement` has them. out: a folder, default that of the scores.
    Writes agreement.csv and agreement.html. Returns the groups that were compared: all pictures, and each method of a benchmark.
    Raises UserError for files that cannot be read or compared, and unless one side to compare with is given.
    """
    if sum([bool(people), exact is not None, benchmark is not None]) != 1:
        raise UserError(
            "Say what to compare the scores with, one of: --people FILE of ratings (repeatable), --exact FILE of a known number a picture, "
            "--benchmark FOLDER."
        )
    own = _given("scores", scores_higher_is, lambda up: read_scores(scores, column=column, higher_is_worse=up))
    other, methods, said = _other_side(people, key, exact, exact_column, benchmark, people_higher_is)
    groups = {ALL: _compared(own, other, set(), common, above, seed)}
    for method in sorted(set(methods.values())) if len(set(methods.values())) > 1 else ():
        of_it = {name for name, m in methods.items() if m == method}
        if len(of_it & set(own.values)) >= FEWEST:
            groups[method] = _compared(own, other, of_it, common, above, seed)
    folder = Path(scores).parent if out is None else Path(out)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    for text in [*said, *(f"{name}: {group.found}" for name, group in groups.items())]:
        say(text)
    whose = "people's" if exact is None else "known"
    if (folder / agreed.TABLE).exists():
        say(f"{folder / agreed.TABLE} was there already and is replaced.")
    page = agreed.write(folder, groups, Path(scores).name, other.source, whose, said, command)
    say(f"See {page}; the table is {folder / agreed.TABLE}.")
    return groups


def _given(whose: str, direction: str | None, read):
    """Read a file in a direction that was named. Raises UserError, whose remedy names the flag."""
    if direction not in DIRECTIONS:
        raise UserError(f"--{whose}-higher-is is worse or better, not {direction!r}.")
    try:
        return read(DIRECTIONS[direction])
    except UserError as error:
        remedy = f"Say --{whose}-higher-is worse (or better), or add"
        raise UserError(str(error).replace("Give higher_is_worse=True or False, or add", remedy)) from error


def _other_side(
    people: Sequence[str],
    key: str | Path | None,
    exact: str | Path | None,
    exact_column: str,
    benchmark: str | None,
    direction: str | None,
) -> tuple[Scores | Ratings, dict[str, str], list[str]]:
    """(what people or a count say, {name: method} of a benchmark, what to tell of the raters)."""
    if people and key is not None and all(Path(p).suffix.lower() == ".json" for p in people):
        answers = read_answers(key, people)
        return answers.ratings, {}, str(answers).splitlines()
    if people:
        return _given("people", direction, lambda up: read_people(people, key, up)), {}, []
    if exact is not None:
        read = lambda up: read_scores(exact, column=exact_column, higher_is_worse=up, levels=False)
        return _given("people", direction, read), {}, []
    file = Path(str(benchmark)) / PEOPLE
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as stream:
            methods = {row["name"]: row.get("method") or "" for row in csv.DictReader(stream)}
        return read_scores(file, levels=True), methods, []
    found = {_named(p): p for p in public.pairs(str(benchmark))}
    levels = Scores({name: p.human_score for name, p in found.items()}, True, True, "the benchmark's human scores")
    return levels, {name: p.method for name, p in found.items()}, []


def _compared(
    scores: Scores, human: Scores | Ratings, names: set[str], common: bool, above: float | None, seed: int
) -> agreed.Group:
    """names: of one group, empty for all."""
    mine = agreed.only(scores, names) if names else scores
    theirs = human if not names else agreed.only(human, names)
    return agreed.group(mine, theirs, agreement(mine, theirs, above=above, common=common, seed=seed))


# ---------------------------------------------------------------------------------------------------- asking people


def form(
    *,
    sr: str | Path,
    gt: str | Path,
    lr: str | Path,
    out: str | Path,
    traps: int | None = None,
    title: str = "What is invented?",
    seed: int = 0,
) -> Form:
    """Make a page on which people rate results by the same five levels, without a network; they send back one file each.

    sr, gt, lr: as for `score`. out: the page, a name that ends in .html; its key lies beside it and stays with you. traps: items whose
    answer is known, default one for ten pictures and at least 4. seed: of traps and order. Raises UserError.
    """
    pairs = paired(sr, gt, lr).pairs
    for pair in pairs:
        if max(size(pair.sr)) > FORM_PIXELS:
            raise UserError(
                f"{pair.sr.name} has {pair.width} x {pair.height} pixels, and people cannot compare more than {FORM_PIXELS} on a side. "
                "Cut results, references and low-resolution pictures into parts of the same view first."
            )
    made = write_form(Sources(FORM_PIXELS).triples(pairs), out, seed=seed, traps=traps, title=title)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    beside = f" with the folder {made.pictures.name} beside it" if made.pictures else ""
    say(
        f"{made.page} has {made.items} items, {made.traps} of them traps. Send it to three people or more{beside}; it needs no network."
    )
    say(f"Keep {made.key}: only it tells which item is which. When their files are back:")
    say(f"tropism hallucination agree --scores scores.csv --people ratings-NAME.json --key {made.key}")
    return made


def benchmark(*, out: str | Path, source: str = public.NAME) -> Path:
    """Write the public benchmark's results, references and people's levels into a folder, for `score` and `agree`.

    source: a data set's name on the hub, or a folder that `datasets` reads. out: a new or empty folder; it gets sr, gt and people.csv.
    Raises UserError as `restore.benchmark.pairs`, and for an `out` that is not empty.
    """
    folder, rows = Path(out), list[list[object]]()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is a file or is not empty. Choose another --out.")
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    for pair in public.pairs(source):
        name = _named(pair)
        if (folder / "sr" / f"{name}.png").exists():
            raise UserError(
                f"Two pairs of {source} would both be called {name}.png. Report it: names should differ in letters."
            )
        save(pair.sr, folder / "sr" / f"{name}.png")
        save(pair.gt, folder / "gt" / f"{name}.png")
        rows.append([name, pair.human_score, pair.method, pair.ratings, "true"])
        if len(rows) % 50 == 0:
            say(f"{len(rows)} pairs")
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerows([["name", "score", "method", "ratings", "higher_is_worse"], *rows])
    write_table(folder / PEOPLE, stream.getvalue())
    say(f"{len(rows)} pairs are in {folder}. Score them, then compare:")
    say(f"tropism hallucination score --sr {folder / 'sr'} --gt {folder / 'gt'} --judge URL --out DIR")
    say(f"tropism hallucination agree --scores DIR/scores.csv --benchmark {folder}")
    return folder / PEOPLE


def _named(pair: public.Pair) -> str:
    """A pair's name as a file can have it."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in pair.name)
