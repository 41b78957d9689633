"""Peak memory of the engine on the bundled model: the kernel's own high-water mark."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
A_STEP = 0.125
"""MiB that a step more may cost: four samples' latents are 0.016; three runs of 6 and 18 steps were at most 0.6 apart."""


def fresh(*points):
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(zip(points, module.fresh(4, *(word for p in points for word in p)), strict=True))


@pytest.fixture(scope="module")
def peak():
    """MiB of each point; one process, since starting one takes longer than a point."""
    sweeps = [("sweep", 4, 4), ("sweep", 8, 8)]
    return fresh(*sweeps, ("checkpoint", 4, 4), ("plain", 4, 4))


def test_the_sweep_needs_no_more_than_step_checkpointing_and_far_less_than_autograd(peak):
    sweep, checkpoint, plain = (peak[engine, 4, 4] for engine in ("sweep", "checkpoint", "plain"))
    assert sweep <= 1.02 * checkpoint
    assert sweep < 0.5 * plain


def test_depth_costs_latents_only(peak):
    """8 steps instead of 4, all active, add 4 x 16 KiB of latents."""
    assert peak["sweep", 8, 8] < peak["sweep", 4, 4] + 4 * A_STEP


@pytest.mark.slow
def test_more_depth_costs_latents_only():
    found = fresh(("sweep", 10, 10), ("sweep", 40, 40), ("sweep", 40, 1))
    assert found["sweep", 40, 40] < found["sweep", 10, 10] + 30 * A_STEP
    assert found["sweep", 40, 1] < found["sweep", 10, 10] + 30 * A_STEP
