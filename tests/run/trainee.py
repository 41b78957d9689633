"""A toy run for the tests of `run`: a two-layer net regressed on keyed noise. Also a program, for tests that kill it.

`trainee.py fuzz FOLDER KILLS` runs it once undisturbed and once killed KILLS times in a row, and leaves both
fingerprints in answer.json;
`trainee.py run FOLDER` runs it slowly, for tests that send signals.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tropism.core import Batch, Info, Stream, noise
from tropism.run import checkpoint
from tropism.run.fit import Interrupted, fit
from tropism.run.record import Recorder


def parameters(dtype=torch.float32) -> dict[str, torch.Tensor]:
    first, second = noise(7, Stream.PRIOR, 0, range(2), 0, 0, (4, 4))[:, 0].to(dtype)
    return {"first": first.clone().requires_grad_(), "second": second.clone().requires_grad_()}


def batches(update: int, size: int = 8) -> Batch:
    return Batch([f"p{update}-{i}" for i in range(size)])


def quadratic(weights, pieces: int | None = None, pause: float = 0.0, yields: int = 1):
    """A step whose loss is the summed squared error of the net on keyed inputs; its state is a running mean and a
    count.
    """

    def step(batch, *, state, update, seed, micro_batch):
        mean, count = state.get("mean", torch.zeros(())), state.get("count", 0)
        for k in range(yields):
            x = noise(seed, Stream.PRIOR, update, batch.index, k, 0, (4,))[:, 0].to(weights["first"])
            size, total, errors = pieces or len(batch), 0.0, []
            for at in range(0, len(batch), size):
                error = (
                    (x[at : at + size] @ weights["first"].tanh() @ weights["second"] - x[at : at + size].flip(1))
                    .pow(2)
                    .sum(1)
                )
                total, errors = total + error.sum(), [*errors, error.detach()]
            reward = -torch.cat(errors)
            mean = 0.9 * mean + 0.1 * reward.mean().float()
            yield (
                total,
                Info(
                    len(batch),
                    {"reward": reward, "error": -reward},
                    {"micro_batch": float(size)},
                    {"network": len(batch)},
                ),
            )
        time.sleep(pause)
        return {"mean": mean, "count": count + 1}

    return step


def run(
    folder: Path,
    updates: int,
    *,
    resume: bool = False,
    pause: float = 0.0,
    every: int = 3,
    ema: float = 0.9,
    recorder: Recorder | None = None,
    **options,
):
    weights = parameters()
    with recorder or Recorder(folder, {"updates": updates}, resume=resume) as record:
        return weights, fit(
            quadratic(weights, pause=pause),
            weights,
            batches,
            updates=updates,
            out=folder,
            recorder=record,
            ema=ema,
            seed=3,
            checkpoint_every=every,
            resume=resume,
            **options,
        )


def fingerprint(folder: Path) -> str:
    """sha256 of everything in the newest checkpoint but its clocks: weights, Adam's moments, EMA, state and counts."""
    saved, digest = checkpoint.newest(folder / "checkpoints"), hashlib.sha256()
    for clock in ("seconds", "cpu_seconds"):
        assert saved.values["spent"].pop(clock) > 0
    digest.update(json.dumps([saved.update, saved.values], sort_keys=True).encode())
    for group in sorted(saved.tensors):
        for name, value in sorted(saved.tensors[group].items()):
            digest.update(f"{group}/{name}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _reached(folder: Path) -> int:
    """The update of the newest checkpoint that was begun, 0 without one."""
    return max((int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*")), default=0)


def fuzz(folder: Path, kills: int, updates: int = 600, pause: float = 0.004) -> dict:
    """One run, killed `kills` times in a row at random moments, and its undisturbed twin.

    A kill comes some updates after the last one's checkpoint, and then anywhere within two updates, however slow the machine is.
    Forking saves the time to import.
    """
    run(folder / "warm", 4, every=2)  # torch's lazy imports, before the first fork
    rng, kept = random.Random(1), [0]
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 the child ends with it
            often = 2 if kill < kills else 50  # the last one is not killed, and each checkpoint waits for the disk
            _, result = run(folder / "killed", updates, resume=True, pause=pause, every=often, schedule="cosine")
            os._exit(0 if result.updates == updates else 1)
        if kill < kills:
            wanted, deadline = kept[-1] + rng.randrange(12), time.monotonic() + 30
            while _reached(folder / "killed") < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 4 * pause))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if kill < kills:
            assert os.WIFSIGNALED(status), "the run came through between two kills"
            newest = checkpoint.newest(folder / "killed" / "checkpoints")
            kept.append(newest.update if newest else 0)
    assert status == 0
    run(folder / "whole", updates, every=updates, schedule="cosine")
    heavy = [m for m in ("diffusers", "transformers", "peft", "accelerate", "matplotlib") if m in sys.modules]
    return {
        "heavy": heavy,
        "whole": fingerprint(folder / "whole"),
        "killed": fingerprint(folder / "killed"),
        "kept": kept[1:],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, target = sys.argv[1], Path(sys.argv[2])
    if job == "fuzz":
        answer = fuzz(target, int(sys.argv[3]))
        (target / "answer.json").write_text(json.dumps(answer))
    else:
        try:
            run(target, 100_000, pause=0.02, every=1000)
        except Interrupted as stopped:
            sys.stdout.write(f"{stopped}\n")
            sys.exit(stopped.code)
