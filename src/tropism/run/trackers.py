"""TensorBoard and Weights & Biases through accelerate's own tracker classes. One that fails or is slow never stops or delays a run."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tropism.core import UserError

NAMES = ("tensorboard", "wandb")
BEHIND = 1000
"""Rows that a tracker may be behind before it is switched off."""
WAIT = 30.0
"""Seconds that a run waits at its end for a tracker to send what is left."""


def check(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is unknown or not installed."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"Unknown tracker '{name}'; there are {', '.join(NAMES)}. Try --trackers tensorboard.")
        if find_spec(name) is None:
            raise UserError(f"Tracker '{name}' is not installed. Install it: pip install {name}")


class Trackers:
    """The trackers asked for by name, checked before."""

    def __init__(self, names: Sequence[str], out: Path, config: Mapping[str, Any], say: Callable[[str], None]):
        self.live = [_Apart(name, lambda name=name: _started(name, out, config), say) for name in names]

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "update"}
        for tracker in self.live:
            tracker.log(numbers, row["update"])

    def close(self) -> None:
        for tracker in self.live:
            tracker.close()
        self.live = []


class _Apart:
    """One tracker in a thread of its own: whatever it raises is said once, and however long it takes, nobody waits but `close`."""

    def __init__(self, name: str, start: Callable[[], Any], say: Callable[[str], None]):
        self.name, self.start, self.say, self.is_off, self.wait = name, start, say, False, WAIT
        self.rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(BEHIND)
        self.thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            tracker = self.start()
            while not self.is_off and (row := self.rows.get()) is not None:
                tracker.log(row[0], step=row[1])
            tracker.finish()
        except Exception as error:  # whatever a tracker raises, the run goes on
            self._off(f"failed and is switched off ({type(error).__name__}: {error})")

    def log(self, numbers: dict[str, Any], update: int) -> None:
        self._put((numbers, update))

    def _put(self, row: tuple[dict[str, Any], int] | None) -> None:
        if self.is_off:
            return
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            self.wait = 0.0  # it has had its time
            self._off(f"is {BEHIND} rows behind and is switched off")

    def close(self) -> None:
        self._put(None)
        self.thread.join(self.wait)
        if self.thread.is_alive():
            self._off(f"did not end within {self.wait:g} s and is left behind")

    def _off(self, why: str) -> None:
        if not self.is_off:
            self.is_off = True
            self.say(f"Tracker {self.name} {why}. metrics.jsonl goes on.")


def _started(name: str, out: Path, config: Mapping[str, Any]):
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()
    tracker = TensorBoardTracker(out.name, out / "logs") if name == "tensorboard" else WandBTracker(out.name)
    if hasattr(tracker, "start"):  # accelerate before 1.8 starts in the constructor
        tracker.start()
    plain = {k: v if isinstance(v, int | float | str) else json.dumps(v, default=str) for k, v in config.items()}
    tracker.store_init_configuration(plain)
    return tracker
