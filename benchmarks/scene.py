"""How long one object takes with the default settings, and what four times the updates would have added.

    python benchmarks/scene.py                  three prompts a model, on all cores: some 20 minutes; --models, --times

Whole processes, as a user starts them. Accuracy is the judge's, which rewards nothing, over 16 sides: shape and colour both right.
Where a prompt leaves the colour open only the shape counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = ("a red cube", "a blue l-block", "a torus")
LIMIT = 90.0
"""Seconds that an object may take on two cores, at LEAST of the long setting's accuracy."""
LEAST = 0.9
UPDATES, FINE = 150, 75
"""The defaults of `tropism scene`."""


def made(model: str, prompt: str, times: int, out: Path) -> tuple[float, dict[str, float]]:
    """Wall seconds of the whole command, and its metrics."""
    folder = out / f"{model}-{prompt.replace(' ', '-')}-{times}"
    words = ["scene", prompt, "--model", model, "--out", str(folder)]
    words += ["--updates", str(times * UPDATES), "--fine-updates", str(times * FINE)]
    began = time.time()
    subprocess.run([sys.executable, "-m", "tropism.cli", *words], check=True, capture_output=True)
    return time.time() - began, json.loads((folder / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["solids-exact", "solids"])
    parser.add_argument("--times", type=int, default=4)
    run = parser.parse_args()
    print(
        f"{'model':13s} {'prompt':16s} {'seconds':>8s} {'long':>8s} {'ratio':>6s} {'accuracy':>9s} {'long':>6s} {'share':>6s}"
    )
    missed = False
    with tempfile.TemporaryDirectory() as out:
        for model in run.models:
            for prompt in PROMPTS:
                (short, one), (long, other) = (made(model, prompt, n, Path(out)) for n in (1, run.times))
                reached, best = (found["judge/accuracy"] for found in (one, other))
                share = reached / best if best else 0.0
                print(
                    f"{model:13s} {prompt:16s} {short:8.1f} {long:8.1f} {long / short:6.2f} {reached:9.3f} {best:6.3f} {share:6.2f}",
                    flush=True,
                )
                missed |= short > LIMIT or share < LEAST
    sys.exit(
        f"An object took more than {LIMIT:g} s, or reached less than {LEAST:.0%} of the long setting." if missed else 0
    )


if __name__ == "__main__":
    main()
