"""Ctrl-C and pre-emption: the first signal lets the update finish and be saved, a second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A run that was asked to stop, and has saved. `code` is the exit status: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Stop:
    """The number of the signal received so far, 0 for none."""

    number = 0


@contextmanager
def stopping(word: str = "update") -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM while a run goes on. Only the main thread can; elsewhere nothing is caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def received(number, _frame):
        if stop.number:
            os._exit(128 + number)
        stop.number = number
        # written by hand: print is not safe inside a handler
        os.write(2, f"\nStopping after this {word}; it will be saved. Again to stop at once.\n".encode())

    before = {s: signal.signal(s, received) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
