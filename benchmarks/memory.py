"""Peak memory of one AlignProp gradient above the loaded model, one fresh process a point.

    python benchmarks/memory.py                 the table: N = 10, 50, 200 and K = 1, 10, N, and the three engines at N = K = 10
    python benchmarks/memory.py ENGINE N K      one point, MiB
    python benchmarks/memory.py 4 ENGINE N K ENGINE N K ...     batch 4, points one after another in one process, after a warm-up

Bundled model, batch 8, guidance 3, float32, CPU; peak resident memory by the kernel's own high-water mark, reset after loading.
"""

import ctypes
import gc
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

REPEATS = 3


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )
        / 1024
    )


def loaded(batch_size: int):
    """The model, a batch, its noise and its prompts' embeddings."""
    from tropism.core import Batch, Draw
    from tropism.models.load import load_model
    from tropism.worlds import shapes

    torch.set_num_threads(1)
    model = load_model("shapes")
    batch = Batch([s.prompt for s in shapes.scenes(True)[:batch_size]])
    draw = Draw(0, 0, batch.index)
    return model, batch, draw, model.encode(batch, draw)


def point(case, engine: str, steps: int, active: int) -> float:
    """MiB above what `case` (see `loaded`) holds."""
    from tropism.align.rollout import Chain, plain, sweep
    from tropism.rewards.jpeg import compressibility

    model, batch, draw, cond = case
    times = model.process.times(steps, cond.shape)
    x, _ = model.start(cond, draw, times)
    predict = model.predict
    if engine == "checkpoint":
        model.predict = partial(checkpoint, model.predict, use_reentrant=False)
    mask = tuple(i >= steps - active for i in range(steps))
    chain = Chain(model, compressibility(), batch, cond, draw, tuple(times.tolist()), 3.0, mask)
    run = sweep if engine == "sweep" else plain
    with torch.no_grad():
        predict(x, times[0].item(), cond, 3.0)  # the libraries' own workspaces are not the engine's
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(chain, x, lambda r: -r, list(model.trainable().values()))
    model.predict = predict
    return resident("VmHWM") - before


def in_a_row(batch_size: int, points: list[tuple[str, int, int]]) -> list[float]:
    """`point` of each, in this process; what only a first run takes is taken by a warm-up."""
    case, found = loaded(batch_size), []
    for engine, steps, active in [("sweep", 2, 2), *points]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        found.append(point(case, engine, steps, active))
    return found[1:]


def fresh(*words: object) -> list[float]:
    """MiB a point, from a process of its own whose allocator gives memory back. words: of the command line."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=True, env=environment
    )
    return [float(line) for line in done.stdout.split()]


def main():
    print(
        f"Peak above the loaded model, MiB, least and most of {REPEATS} processes\n\n| engine | N | K | MiB |\n|---|---:|---:|---:|"
    )
    points = [("sweep", n, k) for n in (10, 50, 200) for k in (1, 10, n)] + [
        ("checkpoint", 10, 10),
        ("plain", 10, 10),
        ("checkpoint", 50, 50),
    ]
    for engine, n, k in dict.fromkeys(points):
        found = [fresh(engine, n, k)[0] for _ in range(REPEATS)]
        print(f"| {engine} | {n} | {k} | {min(found):.0f}-{max(found):.0f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(point(loaded(8), sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    elif len(sys.argv) > 1:
        words = sys.argv[2:]
        named = list(zip(words[::3], map(int, words[1::3]), map(int, words[2::3]), strict=True))
        print(*in_a_row(int(sys.argv[1]), named), sep="\n")
    else:
        main()
