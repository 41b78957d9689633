"""The command that scores a folder of restored pictures for invented detail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tropism.core import UserError
from tropism.judged import cases, page
from tropism.judged.work import DEFAULTS, Features, Judge, Work, check_compared, kind_of, kinds_with
from tropism.restore.distances import Measured
from tropism.restore.judge import Backend
from tropism.restore.judge_reply import JudgeUnavailable
from tropism.restore.loading import Sources
from tropism.restore.pairs import Pair, Pairs, paired
from tropism.restore.scoring import Row, write_table
from tropism.run.checks import at_least_one, set_up
from tropism.run.progress import clock
from tropism.run.record import environment
from tropism.run.signals import Interrupted, Stop, stopping

SCORES, PAGE, SETTINGS, LEDGER = "scores.csv", "report.html", "settings.yaml", "ledger.json"
SAME = (
    "sr",
    "gt",
    "lr",
    "judge",
    "model",
    "repeats",
    "tiles",
    "swap_share",
    "temperature",
    "seed",
    "max_tokens",
    "logprobs",
)
"""Settings that a scoring which goes on must share."""


def score(
    sr: str | Path,
    *,
    judge: str,
    out: str | Path,
    gt: str | Path | None = None,
    lr: str | Path | None = None,
    model: str | None = None,
    repeats: int | None = None,
    tiles: int | None = None,
    parallel: int | None = None,
    swap_share: float | None = None,
    cache: str | Path | None = None,
    cache_only: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    logprobs: bool = False,
    timeout: float | None = None,
    limit: float | None = None,
    key_file: str | Path | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    worst: int = 12,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    command: str = "",
) -> page.Scored:
    """Score restored pictures for invented detail, from 1 (none) to 5: a table, and a page with the worst ones.

    sr, gt, lr: results, references and low-resolution pictures, folders paired by name or single files; of gt and lr at least one.
    judge: a server's http://HOST:PORT/v1, local:FOLDER (or hub id), or features[:SOURCE][?OPTIONS], the distance of deep features to
    gt, by the reward feature-distance. model: the server's name for it. repeats, tiles, cache, cache_only: as HallucinationJudge has
    them; the cache is OUT/cache unless told. parallel, swap_share: as score_folder has them. temperature, max_tokens, logprobs,
    timeout, limit, key_file: as Endpoint has them. price_in, price_out: of a million tokens. worst: pictures shown on the page. The
    same call goes on with what is in `out`.
    Raises UserError for pictures that do not belong together, settings that cannot be, a judge that cannot be asked, an `out` that holds
    another scoring, and where no picture could be scored; Interrupted after a signal.
    """
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if k not in ("command", "overwrite")
    }
    kind = kind_of(settings)
    at_least_one(parallel=parallel, repeats=repeats, tiles=tiles)
    settings |= {k: v for k, v in DEFAULTS.items() if settings[k] is None and kind in kinds_with(k)}
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    pairs, place = paired(sr, gt, lr), set_up(device, dtype or "float32", threads)[0]
    check_compared(kind, gt, lr)
    folder = Path(out)
    work: Work = Features(settings, place) if kind == "features" else Judge(kind, settings, place, folder)
    _take(folder, settings, overwrite)
    say(f"{len(pairs.pairs)} pictures, judged by {work.name}. Results go to {folder}.")
    sources = Sources(work.pixels)
    rows, stopped = _done(work, pairs.pairs, sources, folder, say)
    runs = _counted(folder, work.backend)
    told = _told(work, rows, pairs, sources, runs, settings, worst, command)
    where = page.write(folder / PAGE, told)
    if stopped:
        raise Interrupted(
            128 + stopped,
            f"Stopped after {len(rows)} of {len(pairs.pairs)} pictures, all kept in {folder}. The same command goes on.",
        )
    if not told.summary.scored:
        raise UserError(f"None of the {len(rows)} pictures could be scored. {told.lines[0].error}")
    say(page.headline(told))
    say(f"See {where}; the table is {folder / SCORES}.")
    return told


def _take(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make the folder this scoring's. Raises UserError if it holds something else."""
    file = folder / SETTINGS
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not file.exists()
        and not ({p.name for p in folder.iterdir()} <= {"cache"})
    ):
        raise UserError(f"{folder} is not empty and holds no scoring. Choose another --out.")
    if file.exists() and not overwrite:
        try:
            before = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            before = None
        if not isinstance(before, dict):
            raise UserError(
                f"{file} cannot be read, so nothing tells whose scores are there. Choose another --out, or say --overwrite."
            )
        changed = [
            f"--{n.replace('_', '-')} {before.get(n)}, now {settings[n]}" for n in SAME if before.get(n) != settings[n]
        ]
        if changed:
            raise UserError(
                f"{folder} holds a scoring with other settings: {'; '.join(changed)}. Choose another --out, or say --overwrite; "
                "replies in its cache are kept."
            )
    if overwrite:
        for name in (SCORES, PAGE, LEDGER):
            (folder / name).unlink(missing_ok=True)
    write_table(file, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def _done(
    work: Work, pairs: Sequence[Pair], sources: Sources, folder: Path, say: Callable[[str], None]
) -> tuple[list[Any], int]:
    """(rows, the signal that ended the work before its end or 0); says how far it is now and then. Raises UserError."""
    rows, began = list[Any](), time.monotonic()
    every = max(1, len(pairs) // 20)
    with stopping("picture") as stop, _kept(work, rows, folder, len(pairs)):
        for row in _until(stop, work.rows(sources.triples(pairs), folder / SCORES)):
            rows.append(row)
            if len(rows) % every == 0 or len(rows) == len(pairs):
                left = (time.monotonic() - began) / len(rows) * (len(pairs) - len(rows))
                say(f"picture {len(rows)}/{len(pairs)}  {row.name}  {_in_words(row)}  {clock(left)} left")
        return rows, stop.number if len(rows) < len(pairs) else 0


def _until(stop: Stop, rows: Iterator[Any]) -> Iterator[Any]:
    for row in rows:
        yield row
        if stop.number:
            rows.close()  # type: ignore[attr-defined]
            return


@contextmanager
def _kept(work: Work, rows: Sequence[Any], folder: Path, count: int) -> Iterator[None]:
    """Adds to a judge's failure what is kept."""
    try:
        yield
    except JudgeUnavailable as error:
        _counted(folder, work.backend)
        scored = sum(row.result is not None for row in rows)
        kept = f" {scored} of {count} pictures are scored, and every reply is kept: the same command goes on."
        raise UserError(f"{error}{kept if scored else ''}") from error


def _in_words(row: Any) -> str:
    value = row.score if isinstance(row, Measured) else row.result and row.result.score
    return f"not scored: {row.error}" if value is None else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------- the page


def _told(
    work: Work,
    rows: list[Any],
    pairs: Pairs,
    sources: Sources,
    runs: list[Any],
    settings: Mapping[str, Any],
    worst: int,
    command: str,
) -> page.Scored:
    lines, found = page.measured(rows) if isinstance(work, Features) else page.judged(rows)
    by_name = {pair.name: pair for pair in pairs.pairs}
    items = {row.name: row.result.items for row in rows if isinstance(row, Row) and row.result}
    highest = sorted((n for n in lines if n.score is not None), key=lambda n: -(n.score or 0))[: max(worst, 0)]
    notes = [f"{file.name}: {'; '.join(said)}." for file, said in sorted(sources.notes.items())]
    proxy = work.distance if isinstance(work, Features) else None
    shown = [
        cases.case(by_name[n.name], Sources(work.pixels), n.score or 0, n.per_repeat, items.get(n.name, []), proxy)
        for n in highest
    ]
    given = (
        "gt_only"
        if isinstance(work, Features) or settings["lr"] is None
        else "lr_only"
        if settings["gt"] is None
        else "full"
    )
    if pairs.unused:
        notes.append(
            f"{len(pairs.unused)} files belong to no result and were not used, the first {pairs.unused[0].name}."
        )
    return page.Scored(
        "/".join(Path(settings["sr"]).resolve().parts[-2:]),
        work.name,
        given,
        isinstance(work, Judge),
        lines,
        found,
        [c for c in shown if c],
        notes,
        runs,
        settings,
        environment(),
        command,
    )


def _counted(folder: Path, backend: Backend | None) -> list[dict[str, Any]]:
    """The ledgers of all runs of the command in this folder, with this one's; empty for features."""
    if backend is None:
        return []
    try:
        before = json.loads((folder / LEDGER).read_text("utf-8"))
    except (OSError, ValueError):
        before = []
    runs = [*before, backend.ledger.as_json()]
    write_table(folder / LEDGER, json.dumps(runs, indent=1) + "\n")
    return runs
