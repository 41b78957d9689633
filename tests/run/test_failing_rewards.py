"""Rewards that fail in the middle of a run: what cannot be scored is counted, exceptions keep their batch, hangs are ended."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from tropism import commands
from tropism.core import Batch, RewardFailed, UserError
from tropism.guide.lineages import setting
from tropism.guide.steps import rewarded
from tropism.models.load import load_model
from tropism.run.evaluate import Evaluation
from tropism.run.failed import failures_kept
from tropism.run.report import rows

REWARDS = """
import time
import torch

calls = 0

def at_times(images, batch):
    return [None if int(b * 1e5) % 4 == 0 else b for b in images.mean((1, 2, 3)).tolist()]

at_times.differentiable = False

def no_dogs(images, batch):
    return [None if "dog" in p else b for p, b in zip(batch.prompts, images.mean((1, 2, 3)))]

def breaks(images, batch):
    global calls
    calls += 1
    if calls > 2:
        raise ZeroDivisionError("the scorer is gone")
    return images.mean((1, 2, 3))

def breaks_on_tokens(tokens, batch):
    if (tokens[:, 0] == 3).any():
        raise ValueError("a T in front")
    return (tokens == 0).double().sum(1)

def rarely(tokens, batch):
    return torch.where(tokens[:, 0] == 3, torch.nan, (tokens == 0).double().sum(1))

def hangs(images, batch):
    if "dog" in batch.prompts[0]:
        time.sleep(60)
    return images.mean((1, 2, 3))
"""
SMALL = {
    "updates": 1,
    "batch": 6,
    "evaluate_prompts": 2,
    "checkpoint_every": 1,
    "eta": 1.0,
    "options": {"steps": 2, "guidance": 1.0, "minibatches": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    return tmp_path


def align(folder, mine, reward, **settings):
    given = {"model": str(folder), "reward": f"{mine}/mine.py:{reward}", "prompts": mine / "prompts.txt", **SMALL}
    commands.align("ddpo", out=mine / "run", **{**given, **settings})
    return [json.loads(line) for line in (mine / "run" / "metrics.jsonl").read_text().splitlines()]


def test_an_exception_leaves_its_batch_in_the_run_folder(folder, mine):
    with pytest.raises(
        UserError, match=r"'breaks' raised ZeroDivisionError.*mine.py, line 19.*prompt.*failed_batch\.$"
    ):
        align(folder, mine, "breaks", doctor=False)
    told = json.loads((mine / "run" / "failed_batch" / "prompts.json").read_text())
    assert "ZeroDivisionError" in told["error"]
    assert {s["prompt"] for s in told["samples"]} <= {"a cat", "a dog"} and told["samples"]
    for sample in told["samples"]:
        assert np.asarray(Image.open(mine / "run" / "failed_batch" / sample["picture"])).shape[2] == 3


def test_so_do_tokens_in_a_guided_run(mine):
    with pytest.raises(UserError, match=r"'breaks_on_tokens' raised ValueError: a T in front"):
        commands.guide(
            "best-of-n",
            model="utr",
            reward=f"{mine}/mine.py:breaks_on_tokens",
            out=mine / "run",
            samples=4,
            options={"m": 4, "steps": 2},
        )
    told = json.loads((mine / "run" / "failed_batch" / "prompts.json").read_text())
    assert any(s["sample"][0] == 3 for s in told["samples"])
    assert not list((mine / "run" / "failed_batch").glob("*.png"))


def test_the_batch_is_what_the_reward_was_given(tmp_path):
    samples = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    batch = Batch(["../../a", "b"], meta=[{"n": 1}, {"x": torch.ones(1)}])
    for _ in range(2):  # the second attempt takes the first one's place
        with pytest.raises(UserError, match=r"why\. The batch is in .*failed_batch\."), failures_kept(tmp_path):
            raise RewardFailed("why.", samples, batch)
    kept = np.stack([np.asarray(Image.open(tmp_path / "failed_batch" / f"{i:04d}.png")) for i in range(2)])
    assert np.array_equal(kept, (samples * 255).round().byte().permute(0, 2, 3, 1).numpy())
    assert {p.name for p in tmp_path.iterdir()} == {"failed_batch"}
    told = json.loads((tmp_path / "failed_batch" / "prompts.json").read_text())
    assert [(s["prompt"], s["meta"]) for s in told["samples"][:1]] == [("../../a", {"n": 1})]


def test_what_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardFailed, match=r"^why\.$"), failures_kept(tmp_path / "file"):
        raise RewardFailed("why.", torch.ones(1, 3, 2, 2), Batch(["a"]))


def test_rewards_that_are_none_at_times(folder, mine):
    lines = align(folder, mine, "at_times", batch=16, doctor=False)
    assert 0 < lines[-1]["reward/nonfinite"] <= 8
    assert 0 < lines[-1]["reward"] < 1
    assert (mine / "run" / "report.html").exists()


def test_the_doctor_warns_of_them_where_no_gradient_is_needed(folder, mine, capsys):
    assert align(folder, mine, "no_dogs")[-1]["reward/nonfinite"] == 3
    assert "where it is not finite a sample takes no part" in capsys.readouterr().out
    with pytest.raises(UserError, match="it must be finite"):
        commands.align(
            "alignprop",
            model=str(folder),
            reward=f"{mine}/mine.py:no_dogs",
            prompts=mine / "prompts.txt",
            out=mine / "other",
            options={"steps": 2},
        )


def test_nan_spoils_no_mean_over_completions():
    """The value of a state is the soft mean of its completions' rewards: one that cannot be scored is the worst, not NaN."""
    run = setting(
        load_model("utr"), lambda tokens, batch: [None, 1.0], Batch([""] * 2), 1, steps=2, guidance=1.0, seed=0
    )
    assert rewarded(run, torch.zeros(2, 50, dtype=torch.long), torch.arange(2)).tolist() == [-torch.inf, 1.0]
    assert (run.costs.unscored, run.costs.rewards_computed) == (1, 2)


def test_a_guided_run_tells_of_rewards_that_were_nan(mine, capsys):
    run = commands.guide(
        "best-of-n",
        model="utr",
        reward=f"{mine}/mine.py:rarely",
        out=mine / "run",
        samples=4,
        pool=2,
        options={"m": 4, "steps": 2},
    )
    assert all((p.samples[:, 0] != 3).all() for p in run.pieces)
    count = lambda name: sum(c[name] for p in run.pieces for c in (p.costs, p.plain_costs))
    assert 0 < count("unscored") < count("rewards_computed")
    assert f"{count('unscored')} of {count('rewards_computed')} rewards were NaN" in capsys.readouterr().out


def test_a_hanging_reward_in_workers_does_not_stop_training(folder, mine, forked):
    (mine / "prompts.txt").write_text("a cat\na cow\na dog\n")
    lines = align(folder, mine, "hangs", workers=1, timeout=1.0, doctor=False, batch=3, held_out=["a cat"])
    assert lines[-1]["reward/nonfinite"] == 1


def test_workers_are_for_one_named_reward(folder, mine):
    how = {"model": str(folder), "out": mine / "run", "workers": 1}
    with pytest.raises(UserError, match="give one --reward"):
        commands.align("ddpo", reward=["jpeg-bytes", "jpeg"], **how)
    with pytest.raises(UserError, match="follows the reward's gradient"):
        commands.align("alignprop", reward="jpeg-bytes", **how)


def test_held_out_numbers_are_of_what_could_be_scored():
    nan, images = float("nan"), torch.zeros(3, 3, 2, 2)
    before = Evaluation(images, {"reward": torch.tensor([1.0, nan, 3.0])}, ["a"] * 3)
    after = Evaluation(images, {"reward": torch.tensor([2.0, 5.0, nan])}, ["a"] * 3)
    assert before.numbers() == {"held_out/reward": 2.0, "held_out/nonfinite": 1.0}
    (row,) = rows(before, after)
    assert (row.name, row.before, row.after, row.change) == ("reward (1 of 3 samples)", 1.0, 2.0, 1.0)
