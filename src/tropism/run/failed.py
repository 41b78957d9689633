"""What a reward failed on is kept, so that its author can try it alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tropism.core import RewardFailed, UserError
from tropism.rewards.protocol import as_png

FOLDER = "failed_batch"


@contextmanager
def failures_kept(out: Path) -> Iterator[None]:
    """Where a reward raises an exception inside, the batch is written to OUT/failed_batch. Raises UserError that says so."""
    try:
        yield
    except RewardFailed as error:
        if error.samples is None or error.batch is None:
            raise
        folder = out / FOLDER
        try:
            _write(folder, error)
        except OSError:  # a full disk must not hide what went wrong
            raise error from None
        raise UserError(f"{error} The batch is in {folder}.") from error


def _write(folder: Path, error: RewardFailed) -> None:
    """prompts.json, one entry a sample, beside a PNG of each picture; tokens stand in prompts.json itself."""
    samples, batch = error.samples, error.batch
    assert samples is not None and batch is not None
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    folder.mkdir(parents=True)
    pictures, rows = samples.ndim == 4 and samples.shape[1] == 3, []
    for i, sample in enumerate(samples):
        name = f"{i:04d}.png"
        if pictures:
            (folder / name).write_bytes(as_png(sample))
        what = {"picture": name} if pictures else {"sample": sample.tolist()}
        rows.append({"prompt": batch.prompts[i], "meta": batch.meta[i] if batch.meta else {}, **what})
    text = json.dumps({"error": str(error), "samples": rows}, indent=1, ensure_ascii=False, default=str)
    (folder / "prompts.json").write_text(text + "\n", encoding="utf-8")
