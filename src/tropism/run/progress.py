"""Progress for a person: one live bar on a terminal, plain lines now and then everywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console


class Progress:
    """Shows reward, held-out reward, gradient norm, seconds an update and the time left. `done` updates are behind us; word: what they
    are."""

    def __init__(self, console: Console, updates: int, done: int = 0, word: str = "update"):
        self.console, self.updates, self.first, self.word = console, updates, done, word
        self.every = max(1, updates // 20)
        self.held_out: float | None = None
        self.began, self.bar = time.monotonic(), None
        if console.is_terminal:
            self.bar = bars.Progress(
                bars.TextColumn(word),
                bars.MofNCompleteColumn(),
                bars.BarColumn(bar_width=24),
                bars.TextColumn("{task.description}", markup=False),
                console=console,
            )
            self.task = self.bar.add_task("", total=updates, completed=done)
            self.bar.start()

    def show(self, row: Mapping[str, Any]) -> None:
        """Take in one row of the record."""
        self.held_out = row.get("held_out/reward", self.held_out)
        update, text = row["update"], self.summary(row)
        if self.bar:
            self.bar.update(self.task, completed=update, description=text)
        elif update % self.every == 0 or update in (self.first + 1, self.updates):
            self.console.print(
                f"{self.word} {update}/{self.updates}  {text}", markup=False, highlight=False, soft_wrap=True
            )

    def summary(self, row: Mapping[str, Any]) -> str:
        """ "reward 0.312  held-out 0.300  gradient 0.021  1.23 s/update  0:03:50 left", as far as it is known."""
        done, known = (
            row["update"] - self.first,
            {"reward": row.get("reward"), "held-out": self.held_out, "gradient": row.get("gradient_norm")},
        )
        words = [f"{k} {v:.4g}" for k, v in known.items() if v is not None]
        if done > 0:
            each = (time.monotonic() - self.began) / done
            words += [f"{each:.2f} s/{self.word}", f"{clock(each * (self.updates - row['update']))} left"]
        return "  ".join([*words, *([f"! {row['alarm']}"] if row.get("alarm") else [])])

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
