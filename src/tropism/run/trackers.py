"""TensorBoard and Weights & Biases through accelerate's own tracker classes. A tracker that fails never stops a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tropism.core import UserError

NAMES = ("tensorboard", "wandb")


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
        self.say, self.live = say, {}
        for name in names:
            self._guard(name, lambda name=name: self.live.update({name: _started(name, out, config)}))

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "update"}
        for name, tracker in list(self.live.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(numbers, step=row["update"]))

    def close(self) -> None:
        for name, tracker in list(self.live.items()):
            self._guard(name, tracker.finish)
        self.live = {}

    def _guard(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, the run goes on
            self.live.pop(name, None)
            self.say(
                f"Tracker {name} failed and is switched off ({type(error).__name__}: {error}). metrics.jsonl goes on."
            )


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
