"""20 random SIGKILLs in a row: a run that is killed and resumed each time ends with the same adapter, bit for bit.

Hardware: 2 CPU cores, about 15 minutes. Expected: 20 kills, one hash.
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
    "12",
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    began = time.time()
    assert start(folder / "whole").wait() == 0
    whole, seconds = finished(folder / "whole"), time.time() - began
    print(f"never killed: {whole}  {seconds:.0f} s", flush=True)
    rng, kills, moments = random.Random(options.seed), 0, []
    while kills < options.kills:
        run = start(folder / "killed", "--resume")
        try:
            run.wait(timeout=rng.uniform(0.2, 1.0) * seconds)
            # it came through: the next kills start from a fresh run
            assert finished(folder / "killed") == whole, "the resumed run ended with other bits"
            subprocess.run(["rm", "-rf", folder / "killed"], check=True)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
            steps = sorted(p.name for p in (folder / "killed" / "checkpoints").glob("step-*"))
            moments.append(steps[-1] if steps else "before the first checkpoint")
            print(f"kill {kills}: newest checkpoint {moments[-1]}", flush=True)
    assert start(folder / "killed", "--resume").wait() == 0
    assert finished(folder / "killed") == whole, "the resumed run ended with other bits"
    print(f"{kills} kills, same hash: {whole}")


if __name__ == "__main__":
    main()
