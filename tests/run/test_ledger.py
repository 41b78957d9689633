"""Every cost of a run is counted where it arises, a budget ends the run, and a resumed run knows what it has spent."""

import json

import pytest
from tiny import tiny_pipeline
from toy import ToyModel

from tropism import commands
from tropism.align.drtune import drtune
from tropism.align.refl import refl
from tropism.core import Batch, Stream, UserError, generator
from tropism.run import ledger
from tropism.run.signals import Interrupted

B, N, ROWS = 4, 4, 2
"""Samples, steps, and rows of the network a sample under guidance."""
OWN = {
    "alignprop": ({"truncation": "2"}, {"forwards": B * ROWS * (N + 2), "backwards": B * ROWS * 2}),
    "draft": ({"k": 1}, {"forwards": B * ROWS * (N + 1), "backwards": B * ROWS}),
    "draft-lv": ({"noised": 2}, {"forwards": B * ROWS * (N + 1 + 2 * 2), "backwards": 3 * B * ROWS}),
    "ddpo": ({"minibatches": 2}, {"forwards": B * ROWS * 2 * N, "backwards": B * ROWS * N}),
}
"""method -> (options, what an update of it costs by hand)."""
REWARDS = {"alignprop": (B, B), "draft": (B, B), "draft-lv": (3 * B, 3 * B), "ddpo": (B, 0)}
"""method -> (queries, gradients)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("model")))


def align(method, folder, out, **more):
    how = {"batch": B, "evaluate_prompts": 2, "evaluate_every": 0, "doctor": False, "prompts": ["a cat", "a dog"]}
    eta = {"eta": 1.0} if method == "ddpo" else {}
    options = {"steps": N, "guidance": 2.0, **OWN[method][0]}
    return commands.align(method, model=folder, out=out, **{"reward": "jpeg", **how, **eta, **more}, options=options)


def spent(out):
    return [row["spent"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "spent" in row]


@pytest.mark.parametrize("method", OWN)
def test_an_update_costs_what_it_costs_by_hand(method, folder, tmp_path):
    align(method, folder, tmp_path / "run", updates=2)
    queries, gradients = REWARDS[method]
    by_hand = {**OWN[method][1], "reward_queries": queries, "reward_gradients": gradients, "decodes": queries}
    first, second = spent(tmp_path / "run")
    assert {axis: first[axis] for axis in by_hand} == by_hand
    assert {axis: second[axis] for axis in by_hand} == {axis: 2 * n for axis, n in by_hand.items()}
    assert 0 < first["seconds"] < second["seconds"] and 0 < first["cpu_seconds"] < second["cpu_seconds"]


@pytest.mark.parametrize(
    ("method", "options", "late", "active"), [(refl, {"earliest": 0.5}, 0, 1), (drtune, {"stop_share": 0.5}, 1, 2)]
)
def test_a_chain_that_stops_early_costs_the_steps_it_ran(method, options, late, active):
    """The third of four steps is the last at these seeds: for refl the first it may stop at, for drtune one before the end."""
    seed = next(s for s in range(9) if generator(s, Stream.TIMESTEP, 0).integers(0, 2) == late)
    own = {"steps": N, "guidance": 1.0, **options, **({"train_steps": active} if method is drtune else {})}
    mean = lambda images, batch: images.flatten(1).mean(1)
    model, batch = ToyModel(), Batch(["a", "b"])
    _, info = next(method(model, mean, batch, state={}, update=0, seed=seed, **own))
    found = ledger.cost(info.calls, 0.0, 0.0)
    assert (found["forwards"], found["backwards"]) == (2 * (N - 1 + active), 2 * active)
    assert found["reward_queries"] == found["reward_gradients"] == found["decodes"] == 2


def test_scales_of_the_base_and_gradients_apart_are_counted(folder, tmp_path):
    align("draft", folder, tmp_path / "run", updates=2, reward=["jpeg", "incompressibility=0.5"], normalise="base")
    first, second = spent(tmp_path / "run")
    assert first["reward_queries"] == 2 * B and second["reward_queries"] == 3 * B
    assert first["reward_gradients"] == 3 * B and second["reward_gradients"] == 4 * B
    assert first["forwards"] == B * ROWS * (N + N + 1)


def test_the_update_that_reaches_the_budget_is_the_last(folder, tmp_path):
    run = align("draft", folder, tmp_path / "run", updates=9, budget=["reward_queries=10", "seconds=1e6"])
    assert run.result.updates == 3
    assert [s["reward_queries"] for s in spent(run.out)] == [B, 2 * B, 3 * B]
    again = align("draft", folder, tmp_path / "run", updates=9, budget=["reward_queries=10"], resume=True)
    assert again.result.first == again.result.updates == 3


def test_a_resumed_run_knows_what_it_has_spent(folder, tmp_path):
    def stop(update, info):
        if update == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        align("draft", folder, tmp_path / "run", updates=3, callback=stop, checkpoint_every=1)
    align("draft", folder, tmp_path / "run", updates=9, budget=["reward_queries=16"], resume=True)
    assert [s["reward_queries"] for s in spent(tmp_path / "run")] == [B, 2 * B, 3 * B, 4 * B]


@pytest.mark.parametrize("text", ["second=3", "priced=3", "seconds", "seconds=0", "seconds=nan", "=3", "seconds=x"])
def test_a_budget_that_cannot_be_is_named(text, folder, tmp_path):
    with pytest.raises(UserError, match="--budget seconds=600"):
        align("draft", folder, tmp_path / "run", budget=[text])
    assert not (tmp_path / "run").exists()


def test_the_share_of_a_budget_is_that_of_the_scarcest_axis():
    assert ledger.share({"seconds": 3, "forwards": 50}, {"seconds": 10, "forwards": 100}) == 0.5
    assert ledger.share({"seconds": 3}, {}) == ledger.share({}, {"seconds": 1}) == 0


def test_priced_seconds_are_counts_times_prices():
    calls = {"forward": 10, "recompute": 5, "backward": 4, "reward": 3}
    found = ledger.cost(calls, 1.0, 2.0, {"forwards": 0.1, "backwards": 0.5, "reward_queries": 1.0})
    assert found["priced"] == pytest.approx(1.5 + 2.0 + 3.0)
    assert (found["seconds"], found["cpu_seconds"]) == (1.0, 2.0) and ledger.cost(calls, 1.0, 2.0)["priced"] == 0
