"""20 random SIGKILLs in a row: a run that is killed and resumed each time ends with the same adapter, bit for bit.

Hardware: 2 CPU cores, about 5 minutes. Expected: 20 kills, one hash.
Run: python recipes/kill_and_resume.py [--kills 20] [--seed 0]
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = [
    "align",
    "alignprop",
    "--model",
    "shapes",
    "--reward",
    "shapes-count",
    "--reward",
    "jpeg=0.3",
    "--updates",
    "60",
    "--batch",
    "4",
    "--steps",
    "6",
    "--checkpoint-every",
    "1",
    "--evaluate-every",
    "0",
    "--evaluate-prompts",
    "2",
    "--ema",
    "0.9",
    "--threads",
    "1",
    "--truncation",
    "bernoulli",
    "--eta",
    "0.5",
]


def start(out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tropism.cli", *SETTINGS, "--out", str(out), *more], stdout=subprocess.DEVNULL
    )


def finished(out: Path) -> str:
    return hashlib.sha256((out / "lora" / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()


def reached(out: Path, update: int) -> bool:
    """Whether the run has written the record of this update."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") > update


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    began, run = time.time(), start(folder / "whole")
    while not reached(folder / "whole", 3):
        assert run.poll() is None, "the run failed"
        time.sleep(0.05)
    window = time.time() - began  # the start of Python, the first evaluation, three updates
    assert run.wait() == 0
    whole = finished(folder / "whole")
    print(f"never killed: {whole}; kills come within {window:.0f} s of a start", flush=True)
    rng = random.Random(options.seed)
    for kill in range(options.kills):
        run = start(folder / "killed", "--resume")
        time.sleep(rng.uniform(0, window))
        assert run.poll() is None, "the run came through between two kills: give it more updates"
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        steps = sorted(p.name for p in (folder / "killed" / "checkpoints").glob("step-*"))
        print(f"kill {kill + 1}: newest checkpoint {steps[-1] if steps else 'none yet'}", flush=True)
    assert start(folder / "killed", "--resume").wait() == 0
    assert finished(folder / "killed") == whole, "the resumed run ended with other bits"
    print(f"{options.kills} kills in a row, same hash: {whole}")


if __name__ == "__main__":
    main()
