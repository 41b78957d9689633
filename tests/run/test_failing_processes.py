"""Two processes, one of whose rewards hangs or raises: the other waits in a gather, and must neither hang nor go on alone."""

import json
import time
from functools import partial

import torch
from torch import multiprocessing
from toy import ToyModel, batch

from tropism.align.ddpo import ddpo
from tropism.core import UserError
from tropism.rewards.workers import InWorkers, ended
from tropism.run.fit import fit
from tropism.run.record import Recorder

HANGS = """
import time

def bright(images, batch):
    if batch.prompts[0].startswith("x" * 8):
        time.sleep(600)
    return images.mean((1, 2, 3))
"""


def train(rank, folder, reward):
    """One update of DDPO on four samples a process, two optimiser steps; its weights and how it ended are left in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, said = ToyModel(eta=1.0), ""
    own = batch(8)[slice(0, 4) if rank == 0 else slice(4, 8)]
    step = partial(ddpo, model, reward, steps=3, guidance=2.0, advantage="batch")
    try:
        with Recorder(folder / "run", {}) as recorder:
            fit(step, model.trainable(), lambda update: own, updates=1, out=folder / "run", recorder=recorder)
    except (UserError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    weights = [p.detach().tolist() for p in model.trainable().values()]
    (folder / f"{rank}.json").write_text(json.dumps([weights, said, time.monotonic()]))


def bright(images, b):
    return images.mean((1, 2, 3))


def hanging(rank, folder):
    """The second process's last sample never ends; its workers are begun and warm before the limit is a short one."""
    if rank == 0:
        return train(rank, folder, bright)
    reward = InWorkers(f"{folder}/mine.py:bright", workers=1, timeout=120)
    reward.name = "bright"
    with ended(reward):
        reward(torch.rand(1, 3, 4, 4), batch(1))
        reward.timeout = 2.0
        train(rank, folder, reward)


def raising(rank, folder):
    def lost(images, b):
        if rank == 1:
            raise ConnectionError("the judge is gone")
        return bright(images, b)

    train(rank, folder, lost)


def both(function, folder, limit):
    """[(weights, what was said, when)] of two processes that must end by themselves within `limit` seconds."""
    running = multiprocessing.start_processes(function, (folder,), nprocs=2, join=False, start_method="fork")
    until = time.monotonic() + limit
    try:
        for process in running.processes:
            process.join(max(0.0, until - time.monotonic()))
        assert [p.is_alive() for p in running.processes] == [False, False], "a process hangs"
    finally:
        for process in running.processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_a_reward_that_hangs_in_one_process_stops_neither(tmp_path):
    """Its worker is ended, the sample left out and counted, and both processes take the same step."""
    (tmp_path / "mine.py").write_text(HANGS)
    (first, said, _), (second, other, _) = both(hanging, tmp_path, 120)
    assert said == other == ""
    assert first == second != [p.tolist() for p in ToyModel(eta=1.0).trainable().values()]
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward/nonfinite"] == 1


def test_a_reward_that_raises_in_one_process_ends_both(tmp_path):
    """The one says what failed and keeps its batch; the other, which waits for it, ends soon after and takes no step."""
    (first, said, when), (second, other, then) = both(raising, tmp_path, 60)
    assert "RewardFailed" in other or "raised ConnectionError: the judge is gone" in other
    assert said and when - then < 20
    assert first == second == [p.tolist() for p in ToyModel(eta=1.0).trainable().values()]
    assert (tmp_path / "run" / "failed_batch" / "prompts.json").exists()
