"""Every method of `align` from a user's side, rewards on scales of their own, and prompts with rewards of their own."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_pipeline

from tropism import commands
from tropism.core import UserError
from tropism.run.signals import Interrupted

SMALL = {
    "batch": 4,
    "evaluate_prompts": 2,
    "evaluate_every": 0,
    "checkpoint_every": 1,
    "prompts": ["a cat", "a dog", "an owl"],
}
METHODS = {
    "draft": {"k": 2},
    "draft-lv": {"noised": 1},
    "refl": {"earliest": 0.5},
    "drtune": {"train_steps": 2},
    "ddpo": {"minibatches": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("model")))


def align(method, folder, out, **more):
    own = {"steps": 4, "guidance": 2.0, **METHODS.get(method, {}), **more.pop("options", {})}
    how = {"model": folder, "out": out, "updates": 2, "reward": "jpeg", **SMALL, **more}
    if method == "ddpo":
        how = {"eta": 1.0, **how, "reward": more.get("reward", "jpeg-bytes")}
    return commands.align(method, options=own, **how)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_saves_an_adapter(method, folder, tmp_path):
    run = align(method, folder, tmp_path / "run", doctor=method == "ddpo")
    assert run.reload_difference == 0
    assert lines(run.out)[-1]["gradient_norm"] > 0
    assert lines(run.out)[-1]["calls"]["reward"] == (8 if method == "draft-lv" else 4)
    assert f"# {method} adapter" in (run.out / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path):
    """What surrounds the weights (rewards by prompt, scales of two rewards, a weight on its way) is in the checkpoint."""
    more = {"reward": ["jpeg", "incompressibility=0.5"], "normalise": "running", "ramp": ["incompressibility=1"]}
    whole = align("ddpo", folder, tmp_path / "whole", updates=3, doctor=False, **more)

    def stop(update, info):
        if update == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        align("ddpo", folder, tmp_path / "broken", updates=3, doctor=False, callback=stop, **more)
    rest = align("ddpo", folder, tmp_path / "broken", updates=3, doctor=False, resume=True, **more)
    ours, theirs = (load_file(r.out / "lora" / "pytorch_lora_weights.safetensors") for r in (whole, rest))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_prompts_meant_for_one_reward(folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a cat", "reward": "jpeg"}\n{"prompt": "a dog", "reward": "incompressibility"}\n{"prompt": "an owl"}\n'
    )
    both = {"reward": ["jpeg", "incompressibility"], "prompts": str(file), "held_out": str(file), "evaluate_prompts": 3}
    run = align("draft", folder, tmp_path / "run", doctor=False, **both)
    columns = run.before.columns
    meant = {name: columns[name].isfinite().tolist() for name in ("jpeg", "incompressibility")}
    assert meant == {"jpeg": [True, False, True], "incompressibility": [False, True, True]}
    assert columns["reward"][0] == columns["jpeg"][0] and columns["reward"][1] == columns["incompressibility"][1]
    assert all(torch.tensor(v).isfinite() for k, v in lines(run.out)[-1].items() if isinstance(v, float))
    with pytest.raises(UserError, match="meant for the reward 'jpeg', but the rewards are incompressibility"):
        align("draft", folder, tmp_path / "no", **{**both, "reward": "incompressibility"})


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("ddpo", {"eta": 0.0}, "deterministic.*--eta 1"),
        ("ddpo", {"options": {"minibatches": 5}}, "minibatches is 5 for 4 samples"),
        ("ddpo", {"options": {"advantage": "best"}}, "no advantage 'best'"),
        ("ddpo", {"options": {"clip": 1}}, "no option of ddpo 'clip'"),
        ("draft", {"options": {"k": 9}}, "K = 9, but 4 steps run"),
        ("draft", {"reward": "jpeg-bytes"}, "jpeg-bytes has none"),
        ("draft-lv", {"options": {"noised": 0}}, "noised is 0"),
        ("refl", {"options": {"earliest": -0.1}}, "earliest is -0.1"),
        ("drtune", {"options": {"stop_share": 2.0}}, "stop_share is 2.0"),
        ("draft", {"normalise": "mean"}, "no normalisation 'mean'"),
        ("draft", {"ramp": ["jpeg=1"]}, "for a sum of rewards"),
        ("draft", {"ramp": ["jpeg"]}, "not of the form NAME=NUMBER"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(method, more, says, folder, tmp_path):
    with pytest.raises(UserError, match=says):
        align(method, folder, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
