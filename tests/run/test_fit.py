"""The optimiser loop: resume, kills, signals, full disks, runs that cannot learn, and the arithmetic of the step."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).parent))
import trainee

from tropism.core import Batch, Info, UserError, gather
from tropism.run import checkpoint
from tropism.run.fit import fit
from tropism.run.optimiser import Optimiser
from tropism.run.record import Recorder

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


def quiet(folder, **options) -> Recorder:
    return Recorder(folder, {}, console=Console(file=io.StringIO()), **options)


def run(folder, step, weights, updates=3, **options):
    with quiet(folder) as recorder:
        return fit(step, weights, trainee.batches, updates=updates, out=folder, recorder=recorder, **options)


# ---------------------------------------------------------------------------------------------------- resume


def test_resumed_run_is_bit_equal(tmp_path):
    whole, first = trainee.run(tmp_path / "whole", 6)
    trainee.run(tmp_path / "parts", 3)
    parts, second = trainee.run(tmp_path / "parts", 6, resume=True)
    assert trainee.fingerprint(tmp_path / "whole") == trainee.fingerprint(tmp_path / "parts")
    assert second.first == 3
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in whole)
    assert torch.equal(first.state["mean"], second.state["mean"])
    assert first.state["count"] == second.state["count"] == 6


def test_a_step_is_told_how_much_of_updates_or_budget_is_done(tmp_path):
    weights, told = trainee.parameters(), []
    step = trainee.quadratic(weights)  # 8 rows an update
    step.pace = told.append
    run(tmp_path / "run", step, weights, 16, budget={"forwards": 32})
    with quiet(tmp_path / "run", resume=True) as recorder:
        how = {"out": tmp_path / "run", "recorder": recorder, "resume": True, "budget": {"forwards": 800}}
        fit(step, weights, trainee.batches, updates=8, **how)
    assert told == [0, 0.25, 0.5, 0.75, 0.5, 0.625, 0.75, 0.875]


def test_twenty_kills_leave_the_same_bits(tmp_path):
    command = [sys.executable, trainee.__file__, "fuzz", str(tmp_path), "20"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["killed"] == answer["whole"]
    assert len(answer["kept"]) == 20
    assert answer["kept"] == sorted(answer["kept"])  # one run that only goes forward
    assert len(set(answer["kept"])) > 10, answer
    assert answer["heavy"] == []  # a run starts fast, and its loop knows nothing of a backbone


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(tmp_path, number, code):
    child = subprocess.Popen(
        [sys.executable, trainee.__file__, "run", str(tmp_path / "run")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == code, err
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved.update == len(metrics.read_text().splitlines())
    assert f"step-{saved.update:06d}" in out
    assert "--resume" in out


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"update": 1}\n')
    (tmp_path / "run" / "env.json").write_text("{}")
    _, result = trainee.run(tmp_path / "run", 2, resume=True)
    assert result.first == 0
    assert [r["update"] for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())] == [
        1,
        2,
    ]


def test_resume_with_other_shapes_names_them(tmp_path):
    trainee.run(tmp_path / "run", 3)
    weights = {"first": torch.zeros(2, 2, requires_grad=True)}
    with quiet(tmp_path / "run", resume=True) as recorder, pytest.raises(UserError, match=r"first.*\(2, 2\).*\(4, 4\)"):
        fit(
            trainee.quadratic(weights),
            weights,
            trainee.batches,
            updates=6,
            out=tmp_path / "run",
            recorder=recorder,
            resume=True,
        )


def test_metrics_are_cut_back_and_kept(tmp_path):
    trainee.run(tmp_path / "run", 3)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"update": 4, "reward": 9}\n{"update": 5, "rew')
    trainee.run(tmp_path / "run", 6, resume=True)
    assert [json.loads(line)["update"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "metrics.lost.jsonl").read_text().startswith('{"update": 4, "reward": 9}\n')


def test_micro_batch_reached_is_saved_and_used_again(tmp_path):
    seen, weights = [], trainee.parameters()

    def step(batch, *, state, update, seed, micro_batch):
        seen.append(micro_batch)
        yield from trainee.quadratic(weights, pieces=4)(
            batch, state=state, update=update, seed=seed, micro_batch=micro_batch
        )
        return {}

    run(tmp_path / "run", step, weights, updates=2, micro_batch=8)
    with quiet(tmp_path / "run", resume=True) as recorder:
        fit(
            step,
            weights,
            trainee.batches,
            updates=3,
            out=tmp_path / "run",
            recorder=recorder,
            micro_batch=8,
            resume=True,
        )
    assert seen == [8, 4, 4]


# ---------------------------------------------------------------------------------------------------- full disk


FULL = OSError(errno.ENOSPC, "No space left on device", "x")
FULL_IN_WORDS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("where", "full"), [("checkpoint", FULL), ("checkpoint", FULL_IN_WORDS), ("metrics", FULL)])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, where, full):
    original, rows = (checkpoint._write_tensors, Recorder.write)

    def tensors(path, group):
        if ".tmp-000006" in str(path):
            raise full
        original(path, group)

    def write(self, row):
        if row["update"] == 5:
            raise full
        rows(self, row)

    if where == "checkpoint":
        monkeypatch.setattr(checkpoint, "_write_tensors", tensors)
    else:
        monkeypatch.setattr(Recorder, "write", write)
    with pytest.raises(UserError, match=r"No space left.*step-000003.*--resume"):
        trainee.run(tmp_path / "run", 9)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    trainee.run(tmp_path / "run", 9, resume=True)
    trainee.run(tmp_path / "whole", 9)
    assert trainee.fingerprint(tmp_path / "run") == trainee.fingerprint(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------- cannot learn


def simple(function, scalars=None):
    """A step that yields function(weights, update) -> (loss, reward (8,))."""

    def step(batch, *, state, update, seed, micro_batch):
        loss, reward = function(update)
        yield loss, Info(len(batch), {"reward": reward, "sharpness": reward}, (scalars or (lambda u: {}))(update))
        return {}

    return step


def test_loss_without_a_graph(tmp_path):
    weights = trainee.parameters()
    with pytest.raises(UserError, match=r"no graph.*guide svdd"):
        run(tmp_path / "run", simple(lambda u: (torch.ones(()), torch.ones(8))), weights)


def test_constant_reward(tmp_path):
    weights = trainee.parameters()
    with pytest.raises(UserError, match=r"exactly zero.*0\.5 for every sample"):
        run(tmp_path / "run", simple(lambda u: ((weights["first"] * 0).sum(), torch.full((8,), 0.5))), weights)


def test_nan_reward_says_which_share(tmp_path):
    weights = trainee.parameters()
    reward = torch.tensor([1.0, float("nan")] * 4)
    with pytest.raises(UserError, match=r"Update 0.*4 of 8 samples \(50%\), in sharpness"):
        run(tmp_path / "run", simple(lambda u: ((weights["first"] * reward.sum()).sum(), reward)), weights)


def test_weights_that_overflow_are_not_saved(tmp_path):
    weights = trainee.parameters()
    with pytest.raises(UserError, match="no longer finite after the step"):
        run(tmp_path / "run", trainee.quadratic(weights), weights, 3, lr=float("inf"), checkpoint_every=1)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_later_infinite_gradient_keeps_the_last_checkpoint(tmp_path, bad):
    weights = trainee.parameters()
    scale = lambda u: bad if u == 5 else 1.0
    with pytest.raises(UserError, match=r"Update 5.*not finite.*step-000004 is kept"):
        run(
            tmp_path / "run",
            simple(lambda u: ((weights["first"] * scale(u)).sum(), torch.ones(8))),
            weights,
            9,
            checkpoint_every=2,
        )
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_an_empty_draw_does_not_trip_the_check_but_the_next_update_is_checked(tmp_path):
    weights = trainee.parameters()
    active = lambda u: {"active_steps": float(u > 0)}
    zero = lambda u: ((weights["first"] * 0).sum(), torch.ones(8))
    with pytest.raises(UserError, match="Update 1: the gradient"):
        run(tmp_path / "zero", simple(zero, active), weights)
    alive = lambda u: ((weights["first"] * float(u > 0)).sum(), torch.ones(8))
    assert run(tmp_path / "alive", simple(alive, active), weights).updates == 3


def test_a_run_resumed_before_it_ever_learned_is_still_checked(tmp_path):
    weights = trainee.parameters()
    zero = simple(lambda u: ((weights["first"] * 0).sum(), torch.ones(8)), lambda u: {"active_steps": float(u > 0)})
    run(tmp_path, zero, weights, 1)
    with quiet(tmp_path, resume=True) as recorder, pytest.raises(UserError, match="Update 1: the gradient"):
        fit(zero, weights, trainee.batches, updates=3, out=tmp_path, recorder=recorder, resume=True)


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_accumulation_and_mean_gradient():
    """1 x 8 = 4 x 2 rows, and the step sees the gradient of the mean."""
    gradients = []
    for pieces in (None, 2):
        weights = trainee.parameters(torch.float64)
        optimiser = Optimiser(weights, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=0.0, ema=0.0)
        loss, info = next(
            trainee.quadratic(weights, pieces)(trainee.batches(0), state={}, update=0, seed=1, micro_batch=None)
        )
        optimiser.backward(loss, [info.samples])
        gradients.append(weights["first"].grad)
        weights["first"].grad = None
        (mean,) = torch.autograd.grad(
            next(trainee.quadratic(weights)(trainee.batches(0), state={}, update=0, seed=1, micro_batch=None))[0] / 8,
            weights["first"],
        )
        torch.testing.assert_close(gradients[-1], mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),
    ],
)
def test_equals_a_plain_adamw_loop_with_clipping(tmp_path, schedule, factors):
    weights, twin = trainee.parameters(), trainee.parameters()
    run(
        tmp_path / "run",
        trainee.quadratic(weights),
        weights,
        5,
        lr=0.05,
        clip=0.5,
        seed=3,
        weight_decay=0.01,
        schedule=schedule,
    )
    adam = torch.optim.AdamW(list(twin.values()), lr=0.05, weight_decay=0.01)
    for update in range(5):
        adam.zero_grad()
        loss, _ = next(
            trainee.quadratic(twin)(trainee.batches(update), state={}, update=update, seed=3, micro_batch=None)
        )
        (loss / 8).backward()
        assert torch.nn.utils.clip_grad_norm_(list(twin.values()), 0.5) > 0.5
        adam.param_groups[0]["lr"] = 0.05 * factors[update]
        adam.step()
    for name in weights:
        torch.testing.assert_close(weights[name], twin[name], rtol=1e-6, atol=1e-7)


def test_ema_is_the_closed_form(tmp_path):
    weights, path = trainee.parameters(torch.float64), []
    start = weights["first"].detach().clone()
    held = []

    def evaluate(update):
        held.append(weights["first"].detach().clone())
        return {}

    result = run(
        tmp_path / "run",
        trainee.quadratic(weights),
        weights,
        4,
        ema=0.8,
        evaluate=evaluate,
        evaluate_every=1,
        callback=lambda update, info: path.append(weights["first"].detach().clone()),
    )
    average = 0.8**4 * start + sum(0.2 * 0.8 ** (3 - i) * p for i, p in enumerate(path))
    torch.testing.assert_close(weights["first"].detach(), average, rtol=1e-12, atol=1e-14)
    assert torch.equal(held[0], start)
    assert torch.equal(held[-1], weights["first"].detach())
    assert torch.equal(result.weights["first"], path[-1])
    assert not torch.equal(path[-1], held[-1])


def test_each_yield_is_one_step(tmp_path):
    weights = trainee.parameters()
    run(tmp_path / "run", trainee.quadratic(weights, yields=3), weights, 2)
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved.values["steps"] == 6
    assert saved.update == 2


def test_groups_with_their_own_rates(tmp_path):
    weights = trainee.parameters()
    start = {n: w.detach().clone() for n, w in weights.items()}
    run(
        tmp_path / "run",
        trainee.quadratic(weights),
        {"a": {"first": weights["first"]}, "b": {"second": weights["second"]}},
        1,
        lr={"a": 0.0, "b": 0.1},
        weight_decay=0.0,
    )
    assert torch.equal(weights["first"], start["first"])
    torch.testing.assert_close(
        (weights["second"] - start["second"]).abs(), torch.full((4, 4), 0.1), rtol=1e-3, atol=1e-4
    )


def test_unknown_schedule(tmp_path):
    with pytest.raises(UserError, match=r"no schedule 'cosinus'.*constant, linear, cosine"):
        run(tmp_path / "run", None, trainee.parameters(), schedule="cosinus")


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="bfloat16"):
        run(tmp_path / "run", None, {"a": torch.zeros(2, dtype=torch.bfloat16)})


def _rank(rank, folder, count):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    weights = trainee.parameters(torch.float64)
    share = slice(0, 5) if rank == 0 else slice(5, 8)
    with quiet(folder / "run") as recorder:
        fit(
            trainee.quadratic(weights),
            weights,
            lambda u: trainee.batches(u)[share],
            updates=3,
            out=folder / "run",
            recorder=recorder,
        )
    values, index = gather(10.0 * torch.arange(8)[share], range(share.start, share.stop))
    if rank == 1:
        (folder / "second.json").write_text(json.dumps([w.detach().tolist() for w in weights.values()]))
        (folder / "gathered.json").write_text(json.dumps([values.tolist(), index.tolist()]))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    multiprocessing.start_processes(_rank, (tmp_path, 2), nprocs=2, start_method="fork")
    weights = trainee.parameters(torch.float64)
    run(tmp_path / "one", trainee.quadratic(weights), weights)
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints").tensors["weights"]
    second = json.loads((tmp_path / "second.json").read_text())
    assert json.loads((tmp_path / "gathered.json").read_text()) == [[10.0 * i for i in range(8)], list(range(8))]
    for (name, w), other in zip(weights.items(), second, strict=True):
        torch.testing.assert_close(saved[name], w.detach(), rtol=1e-12, atol=1e-14)
        assert saved[name].tolist() == other
    lines = [[json.loads(x) for x in (tmp_path / f / "metrics.jsonl").read_text().splitlines()] for f in ("run", "one")]
    for two, one in zip(*lines, strict=True):
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-12)
        assert two["reward_std"] == pytest.approx(one["reward_std"], rel=1e-9)


# ---------------------------------------------------------------------------------------------------- record


def test_row_of_an_update(tmp_path):
    weights = trainee.parameters()
    run(
        tmp_path / "run",
        trainee.quadratic(weights),
        weights,
        2,
        evaluate=lambda u: {"held_out/reward": float(u)},
        finish=lambda: (tmp_path / "finished").touch(),
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"update": 0, "held_out/reward": 0.0}
    assert rows[1].keys() == {
        "update",
        "seconds",
        "reward",
        "reward_std",
        "error",
        "micro_batch",
        "gradient_norm",
        "calls",
        "spent",
    }
    assert rows[1]["calls"] == {"network": 8}
    assert [row["spent"]["forwards"] for row in rows[1:]] == [8, 16]
    assert rows[2]["held_out/reward"] == 2.0
    assert (tmp_path / "finished").exists()


def test_plain_lines_without_a_terminal(tmp_path):
    text = io.StringIO()
    weights = trainee.parameters()
    with Recorder(tmp_path / "run", {}, console=Console(file=text, soft_wrap=True)) as recorder:
        fit(
            trainee.quadratic(weights),
            weights,
            trainee.batches,
            updates=40,
            out=tmp_path / "run",
            recorder=recorder,
            evaluate=lambda u: {"held_out/reward": 0.5},
        )
    lines = text.getvalue().splitlines()
    assert 20 <= len(lines) <= 25
    assert "\x1b" not in text.getvalue()
    assert re.match(
        r"update 40/40  reward -?[\d.e-]+  held-out 0.5  gradient [\d.e-]+  [\d.]+ s/update  0:00:00 left", lines[-1]
    )


def test_batches_are_asked_by_number(tmp_path):
    asked, weights = [], trainee.parameters()

    def batches(update) -> Batch:
        asked.append(update)
        return trainee.batches(update)

    with quiet(tmp_path / "run") as recorder:
        fit(trainee.quadratic(weights), weights, batches, updates=3, out=tmp_path / "run", recorder=recorder)
    assert asked == [0, 1, 2]
