"""Scores of many pictures: one row each, whatever goes wrong with one of them, and nothing asked twice after an interruption."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tropism.core import UserError
from tropism.restore.judge import HallucinationJudge, HSResult
from tropism.restore.judge_cache import write_whole
from tropism.restore.judge_reply import JudgeFailed, JudgeUnavailable
from tropism.restore.resampled import intervals

COLUMNS = (
    "name",
    "score",
    "per_repeat",
    "sd",
    "omissions",
    "items",
    "mode",
    "judge",
    "prompt_version",
    "higher_is_worse",
    "swap_difference",
    "error",
)
EVERY = 20
"""Rows between two writings of the table."""
HOPELESS = 3
"""As many first pictures without any verdict end the scoring: this judge will not give one to the others either."""
Source = Tensor | Callable[[], Tensor]
"""A picture, or a call that loads it when its turn comes."""
Triple = tuple[str, Source, Source | None, Source | None]


@dataclass(frozen=True)
class Row:
    """A picture's result, or why there is none. swap_difference: what the other order of pictures changed, None where not tried."""

    name: str
    result: HSResult | None = None
    swap_difference: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """The mean score over pictures with the ends of its 95 % bootstrap interval, and how many were scored and failed.

    swaps: pictures also shown in the other order. swap_difference: their mean absolute difference, NaN without any.
    """

    mean: float
    low: float
    high: float
    scored: int
    failed: int
    swaps: int
    swap_difference: float


def score_folder(
    judge: HallucinationJudge,
    triples: Iterable[Triple],
    out: str | Path,
    *,
    parallel: int = 1,
    swap_share: float = 0.05,
) -> Iterator[Row]:
    """Score (name, sr, gt, lr) one after the other, yield each row in order, and keep all of them in `out`, a scores.csv.

    triples: pictures as HallucinationJudge.score takes them, or calls that load them, whose UserError becomes the row's error.
    parallel: pictures that are asked about at a time. swap_share: of the pictures, chosen by their names, are also shown in the other
    order. The table is written whole every 20 rows, at the end, and when the work is interrupted; with a cache the same call then asks
    only for what is missing. A picture that cannot be scored is a row with an error. Raises UserError for two equal names, for a judge
    that cannot be asked at all, and where none of the first 3 pictures gets a verdict.
    """
    if parallel < 1 or not 0 <= swap_share <= 1:
        raise UserError(
            f"parallel={parallel} and swap_share={swap_share}: pictures at a time, at least 1, and a share from 0 to 1. "
            "Try parallel=4, swap_share=0.05."
        )
    return _kept(judge, triples, Path(out), parallel, swap_share)


def _kept(
    judge: HallucinationJudge, triples: Iterable[Triple], out: Path, parallel: int, swap_share: float
) -> Iterator[Row]:
    rows, failures, asked = list[Row](), 0, 0
    try:
        for row, failure in _in_order(_named_once(triples), lambda t: _row(judge, t, swap_share), parallel):
            rows.append(row)
            failures += failure is not None
            asked += failure is not None or row.result is not None
            if failure is not None and failures == asked == HOPELESS:
                raise JudgeUnavailable(f"The judge gave no verdict on any of the first {HOPELESS} pictures. {failure}")
            if len(rows) % EVERY == 0:
                write_scores(out, rows)
            yield row
    finally:
        write_scores(out, rows)


def _named_once(triples: Iterable[Triple]) -> Iterator[Triple]:
    seen = set[str]()
    for triple in triples:
        if triple[0] in seen:
            raise UserError(
                f"Two pictures are named {triple[0]!r}, and rows are told apart by names. Rename one of them."
            )
        seen.add(triple[0])
        yield triple


def _in_order(
    triples: Iterator[Triple], work: Callable[[Triple], tuple[Row, JudgeFailed | None]], parallel: int
) -> Iterator[tuple[Row, JudgeFailed | None]]:
    """work(triple) of every triple, in their order, `parallel` at a time; no more are begun than that."""
    if parallel == 1:  # no thread, so that an interruption ends at once
        yield from map(work, triples)
        return
    waiting, pool = deque[Future](), ThreadPoolExecutor(parallel)
    try:
        waiting.extend(pool.submit(work, t) for t in itertools.islice(triples, parallel))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, t) for t in itertools.islice(triples, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _row(judge: HallucinationJudge, triple: Triple, swap_share: float) -> tuple[Row, JudgeFailed | None]:
    """A row, and the judge's failure where it gave no verdict. Raises JudgeUnavailable."""
    name, result = triple[0], None
    try:
        sr, gt, lr = (source() if callable(source) else source for source in triple[1:])
        assert sr is not None, name
        result = judge.score(sr, gt, lr)
        if not _is_swapped(name, swap_share):
            return Row(name, result), None
        return Row(name, result, judge.score(sr, gt, lr, swapped=True).score - result.score), None
    except JudgeUnavailable:
        raise
    except UserError as error:  # with a result, it is the other order that failed
        return Row(name, result, error=str(error)), error if isinstance(error, JudgeFailed) and not result else None


def _is_swapped(name: str, share: float) -> bool:
    """Whether a picture is among the share that is also shown in the other order; a matter of its name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


# ---------------------------------------------------------------------------------------------------- the table


def write_scores(file: str | Path, rows: Iterable[Row]) -> None:
    """A scores.csv of COLUMNS, whole or not at all. Lists are JSON; what is not known is left empty. Raises UserError."""
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(COLUMNS)
    table.writerows(_cells(row) for row in rows)
    write_table(file, stream.getvalue())


def write_table(file: str | Path, text: str) -> None:
    """Write a file whole or not at all, its folder too. Raises UserError."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(file), text)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}. Give a folder with room that is yours.") from error


def _cells(row: Row) -> list[str]:
    swap = "" if row.swap_difference is None else repr(float(row.swap_difference))
    if row.result is None:
        return [row.name, *[""] * (len(COLUMNS) - 3), swap, row.error]
    found = row.result
    items = json.dumps([dataclasses.asdict(item) for item in found.items])
    sd = "" if math.isnan(found.sd) else repr(found.sd)
    said = [found.mode, found.judge, found.prompt_version, json.dumps(found.higher_is_worse)]
    numbers = [repr(float(found.score)), json.dumps(found.per_repeat), sd, repr(float(found.omissions))]
    return [row.name, *numbers, items, *said, swap, row.error]


def read_scores(file: str | Path) -> list[Row]:
    """The rows of a scores.csv; their results hold no raw replies. Raises UserError for any other file."""
    try:
        with Path(file).open(encoding="utf-8", newline="") as stream:
            table = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (table.fieldnames or [])]:
                raise ValueError(f"it has no column {missing[0]}")
            return [_row_of(cells) for cells in table]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{file} is no table of scores: {error}. Give the scores.csv of a scoring.") from error


def _row_of(cells: dict[str, str]) -> Row:
    swap = float(cells["swap_difference"]) if cells["swap_difference"] else None
    if not cells["score"]:
        return Row(cells["name"], None, swap, cells["error"])
    found = {name: cells[name] for name in ("mode", "judge", "prompt_version")}
    lists = {name: json.loads(cells[name]) for name in ("per_repeat", "items", "higher_is_worse")}
    numbers = {name: float(cells[name]) for name in ("score", "omissions")}
    result = HSResult.from_json(json.dumps({**found, **lists, **numbers, "raw": [], "cache_keys": []}))
    return Row(cells["name"], result, swap, cells["error"])


def summary(rows: Iterable[Row], seed: int = 0, draws: int = 2000) -> Summary:
    """The mean over pictures of their scores, with an interval; failed pictures are only counted."""
    rows = list(rows)
    scores = [row.result.score for row in rows if row.result]
    swaps = [abs(row.swap_difference) for row in rows if row.swap_difference is not None]
    low, high = bootstrap(scores, seed, draws)
    mean = float(np.mean(scores)) if scores else math.nan
    swap = float(np.mean(swaps)) if swaps else math.nan
    return Summary(mean, low, high, len(scores), len(rows) - len(scores), len(swaps), swap)


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The ends of the 95 % bootstrap interval of a mean over pictures (restore.resampled). NaN below two values, which say nothing of a
    spread.
    """
    if len(values) < 2:
        return math.nan, math.nan
    x, counts = np.unique(np.asarray(values, float), return_counts=True)
    return intervals(lambda drawn: {"mean": drawn @ x / drawn.sum(1)}, counts, draws, seed)["mean"]
