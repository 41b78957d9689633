"""Peak memory of the engine on the bundled model: fresh processes, the kernel's own high-water mark."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")


@pytest.fixture(scope="module")
def peak():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fresh


def test_the_sweep_needs_no_more_than_step_checkpointing_and_far_less_than_autograd(peak):
    sweep, checkpoint, plain = (peak(engine, 8, 8) for engine in ("sweep", "checkpoint", "plain"))
    assert sweep <= 1.02 * checkpoint
    assert sweep < 0.5 * plain


def test_depth_costs_latents_only(peak):
    """8 samples x 4 KiB of latents a step: 18 steps instead of 6, all active, add 12 x 32 KiB = 0.4 MiB, here with room for noise."""
    short, long = peak("sweep", 6, 6), peak("sweep", 18, 18)
    assert long < short + 5
    assert peak("sweep", 18, 1) < short + 5
