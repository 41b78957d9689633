"""A slow reward in processes of its own: docking, folding, a simulator. Each sample has a time limit; who exceeds it scores -inf.

A sample that takes minutes, or a program that never ends, must not stop a run: its process is ended, the sample counted, and the run
goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import TimeoutError as TimedOut
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch, Reward, UserError, name_of, scored
from tropism.rewards.combine import unrouted
from tropism.rewards.docking import PATIENCE
from tropism.rewards.identity import served
from tropism.rewards.load import load_rewards


@cache
def _loaded(text: str) -> Reward:
    torch.set_num_threads(1)
    reward: Any = load_rewards([text])
    if hasattr(reward, "patience"):  # a worker sees a few samples and may be ended; whoever sees all of them judges
        reward.patience = math.inf
    return reward


def _begin(text: str) -> None:
    """In a new worker, before the clock of any sample runs."""
    with suppress(Exception):  # the first sample says it again, where it is heard
        _loaded(text)


def _one(text: str, sample: Any, prompt: str, meta: dict) -> tuple[float, str]:
    """In a worker: one sample's score by the reward that `text` names, and why it was refused, if it was."""
    reward: Any = _loaded(text)
    if getattr(reward, "refusal", ""):
        reward.refusal = ""
    score = scored(reward, torch.from_numpy(sample)[None], unrouted(reward, Batch([prompt], meta=[meta])))[0].item()
    return score, getattr(reward, "refusal", "")


class InWorkers:
    """`--reward TEXT` in worker processes, a sample at a time. It has no gradient.

    `timed_out` counts samples over the limit, `refused` those that a program would not take.
    workers: processes. timeout: seconds a sample, from when its worker has loaded the reward. It is loaded anew in every worker, by its
    name or file.py:function, so it must not need anything that only this process has, where it is loaded once for its name.
    Raises UserError for numbers that cannot be, a reward that cannot be loaded, and an exception of the reward's.
    """

    differentiable = False

    def __init__(self, text: str, *, workers: int, timeout: float):
        if workers < 1 or not timeout > 0:
            raise UserError(
                f"workers is {workers} and timeout is {timeout}; they must be at least 1 and above 0 seconds."
            )
        loaded = load_rewards([text])
        self.text, self.name, self.served = text, name_of(loaded), served(loaded)
        self.workers, self.timeout = workers, timeout
        self.timed_out, self.refused, self.answered = 0, 0, 0
        self._pool: Any = None

    def _running(self) -> Any:
        if self._pool is None:
            try:
                from pebble import ProcessPool
            except ImportError as error:
                raise UserError(
                    'Rewards in workers need pebble, which is not installed: pip install "tropism[workers]".'
                ) from error
            import multiprocessing

            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, initializer=_begin, initargs=(self.text,), context=context)
        return self._pool

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        rows, meta = samples.detach().cpu().numpy(), batch.meta or [{}] * len(batch)
        asked = [
            self._running().schedule(_one, args=(self.text, row, batch.prompts[i], meta[i]), timeout=self.timeout)
            for i, row in enumerate(rows)
        ]
        return torch.tensor([self._answer(future) for future in asked], dtype=torch.float64)

    def _answer(self, future: Any) -> float:
        try:
            score, refusal = future.result()
        except TimedOut:
            self.timed_out += 1
            return -torch.inf
        except UserError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise UserError(
                f"Reward '{self.name}' failed in a worker: {type(error).__name__}: {error}. Mend it, or leave --workers out."
            ) from error
        self.refused += bool(refusal)
        self.answered += score > -torch.inf
        if self.refused >= PATIENCE and not self.answered:
            self.close()
            raise UserError(f"{refusal} Run it by hand on one molecule.")
        return score

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


def end(reward: Reward) -> None:
    """End the workers of a reward that has some."""
    if isinstance(reward, InWorkers):
        reward.close()


@contextmanager
def ended(reward: Reward) -> Iterator[None]:
    """End the workers of a reward that has some, however the block ends."""
    try:
        yield
    finally:
        end(reward)
