"""The main job from a user's side: their model folder, their reward, their prompts; and every bad input explained."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from command_line import called
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny import tiny_pipeline
from torch import multiprocessing

from tropism import commands
from tropism.commands import train
from tropism.core import UserError
from tropism.flags import flags
from tropism.models import lora
from tropism.rewards.jpeg import true_bytes
from tropism.run import products
from tropism.run.evaluate import evaluate
from tropism.run.request import BOUND
from tropism.worlds import shapes, taste

SMALL = {
    "updates": 2,
    "batch": 2,
    "options": {"steps": 3, "guidance": 2.0, "truncation": "2"},
    "evaluate_prompts": 2,
    "evaluate_every": 0,
    "checkpoint_every": 1,
    "doctor": False,
}
"""Runs without the doctor: tests/doctor examines, and here a run by the command line and the rewards that cannot teach."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mine(tmp_path):
    """A user's files: prompts and a reward."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "reward.py").write_text(
        "import torch\n"
        "def redness(images, batch):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
        "def by_numpy(images, batch):\n    return torch.tensor(images.detach().numpy().mean((1, 2, 3)))\n"
        "def nan(images, batch):\n    return images.mean((1, 2, 3)) * float('nan')\n"
        "def constant(images, batch):\n    return 0 * images.mean((1, 2, 3)) + 1\n"
        "def alone(images):\n    return images.mean((1, 2, 3))\n"
        "def mean(images, batch):\n    return images.mean()\n"
    )
    return tmp_path


def align(model, mine, reward="redness", **settings):
    return commands.align(
        "alignprop",
        model=str(model),
        reward=f"{mine}/reward.py:{reward}",
        prompts=mine / "prompts.txt",
        out=mine / "run",
        **{**SMALL, **settings},
    )


def test_a_folder_a_function_and_a_file_give_a_run_folder(folder, mine):
    run = align(folder, mine, updates=3, lr=3e-2, evaluate_every=1)
    names = {p.name for p in (mine / "run").iterdir()}
    assert names >= {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
        "lora",
        "before.png",
        "after.png",
        "reward.png",
        "report.html",
        "README.md",
    }
    assert run.reload_difference < 1e-5
    rows = [json.loads(line) for line in (mine / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in rows] == [0, 1, 2, 3]
    assert rows[1]["calls"] == {
        "forward": 12,
        "recompute": 8,
        "backward": 8,
        "decode": 2,
        "reward": 2,
        "reward_gradient": 2,
    }
    assert rows[-1]["held_out/reward"] > rows[0]["held_out/reward"]
    assert torch.equal(run.after.columns["jpeg_kB"], true_bytes(run.after.images) / 1000)
    page = (mine / "run" / "report.html").read_text()
    assert "<script" not in page
    assert "a cat" in page


def test_every_setting_of_the_loop_reaches_it(folder, mine, monkeypatch):
    given = {
        "updates": 7,
        "lr": 0.02,
        "weight_decay": 0.3,
        "clip": 0.4,
        "ema": 0.5,
        "schedule": "cosine",
        "seed": 6,
        "micro_batch": 1,
        "checkpoint_every": 8,
        "evaluate_every": 9,
    }
    reached = {}

    def stopped(*_, **settings):
        reached.update(settings)
        raise InterruptedError

    monkeypatch.setattr(train, "fit", stopped)
    with pytest.raises(InterruptedError):
        align(folder, mine, **given)
    assert {name: reached[name] for name in given} == given


def test_an_adapter_that_draws_something_else_is_no_success(folder, mine, monkeypatch):
    save = lora.save

    def damaged(model, out):
        with torch.no_grad():
            next(iter(model.trainable().values())).mul_(3)
            file = save(model, out)
            next(iter(model.trainable().values())).div_(3)
        return file

    monkeypatch.setattr(lora, "save", damaged)
    with pytest.raises(UserError, match="does not draw what the model in memory draws"):
        align(folder, mine, lr=0.3)


def test_the_bundled_world_is_judged_by_its_parser_and_its_hidden_rule(mine, monkeypatch):
    few = {"updates": 1, "batch": 2, "evaluate_prompts": 3, "options": {**train.DEMO["options"], "steps": 3}}
    monkeypatch.setattr(train, "DEMO", {**train.DEMO, **few})
    found = commands.demo(mine / "demo", threads=1).after
    assert torch.equal(found.columns["parser/all"], shapes.accuracy(found.images, found.prompts)["all"])
    torch.testing.assert_close(found.columns["gold_taste"], taste.gold(found.images))


def test_a_dry_run_says_what_it_found_and_writes_nothing(folder, mine, capsys):
    assert align(folder, mine, dry_run=True) is None
    assert "2 prompts to train on, 2 held out" in capsys.readouterr().out
    assert not (mine / "run").exists()


@pytest.mark.parametrize("reward", ["shapes-count", "shapes-alignment", "jpeg=0.3"])
def test_prompts_a_reward_cannot_score_are_found_before_anything_is_written(mine, reward):
    rewards = [reward, "shapes-count=2"] if reward.startswith("jpeg") else [reward]
    with pytest.raises(UserError, match="'a cat' is not a prompt of the shapes world"):
        commands.align(
            "alignprop", model="shapes", reward=rewards, prompts=mine / "prompts.txt", out=mine / "run", **SMALL
        )
    assert not (mine / "run").exists()


def test_a_run_is_resumed_with_the_prompts_it_was_begun_with(folder, mine):
    align(folder, mine, updates=1)
    begun = (mine / "run" / "config.yaml").read_text()
    for change, says in (
        ({"evaluate_prompts": 1}, "another held-out prompts"),
        ({"reward": "constant"}, "another reward"),
        ({"seed": 1}, "another seed"),
        ({"evaluate_guidance": 1.0}, "another evaluation"),
        ({"rank": 8}, "Resume with the settings"),
    ):
        with pytest.raises(UserError, match=says):
            align(folder, mine, **change, resume=True)
        assert (mine / "run" / "config.yaml").read_text() == begun
    (mine / "run" / "samples" / "before.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        align(folder, mine, resume=True)


def test_prompts_that_are_trained_on_are_not_called_held_out(folder, mine, capsys):
    align(folder, mine)
    assert "2 of 2 prompts for evaluation are trained on as well" in capsys.readouterr().out
    assert "2 of them trained on" in (mine / "run" / "README.md").read_text()
    apart = {"prompts": ["a cat"], "held_out": ["a dog"]}
    commands.align("alignprop", model=str(folder), reward="jpeg", out=mine / "apart", **apart, **SMALL)
    assert "evaluated on 1 held-out prompts" in (mine / "apart" / "README.md").read_text()


def test_the_adapter_loads_in_a_plain_pipeline(folder, mine):
    from diffusers import StableDiffusionPipeline

    align(folder, mine, lr=3e-2, rank=2, alpha=5)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    draw = lambda: (
        pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    )
    before = draw()
    pipe.load_lora_weights(str(mine / "run" / "lora"))
    assert abs(draw() - before).max() > 1e-3


def test_resume_is_bit_exact_through_the_whole_stack(folder, mine):
    """2 + 2 updates equal 4, with eta, EMA, drift and a random policy: the adapter's file is the same, byte for byte."""
    settings = {
        "eta": 0.5,
        "ema": 0.9,
        "options": {"steps": 4, "guidance": 2.0, "truncation": "bernoulli", "drift": 0.1},
    }
    align(folder, mine, updates=4, **settings)
    whole = (mine / "run" / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    (mine / "run").rename(mine / "whole")
    align(folder, mine, updates=2, **settings)
    align(folder, mine, updates=4, resume=True, **settings)
    assert (mine / "run" / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == whole


def _rank(rank, model, mine):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{mine}/meet", rank=rank, world_size=2)
    align(model, mine, batch=4, lr=3e-2, clip=0.0)
    torch.distributed.destroy_process_group()


def test_two_processes_align_as_one_does(folder, mine):
    """Each takes half of every batch; one of them writes the run folder, and the adapter is that of one process."""
    multiprocessing.start_processes(_rank, (folder, mine), nprocs=2, start_method="fork")
    (mine / "run").rename(mine / "two")
    align(folder, mine, batch=4, lr=3e-2, clip=0.0)
    two, one = (load_file(mine / d / "lora" / "pytorch_lora_weights.safetensors") for d in ("two", "run"))
    assert all(torch.allclose(two[name], one[name], atol=1e-4) for name in one)
    assert {p.name for p in (mine / "two").iterdir()} == {p.name for p in (mine / "run").iterdir()}
    rows = [(mine / d / "metrics.jsonl").read_text().splitlines() for d in ("two", "run")]
    assert len(rows[0]) == len(rows[1]) == 3
    assert json.loads(rows[0][2])["reward"] == pytest.approx(json.loads(rows[1][2])["reward"], abs=1e-4)


def test_evaluation_has_its_own_steps_and_guidance(folder, mine, monkeypatch):
    """Guidance 0 and 1 are settings like any other: every evaluation draws with them, training with its own."""
    drawn = []
    monkeypatch.setattr(
        products,
        "measured",
        lambda *a, steps, guidance, **k: (
            drawn.append((steps, guidance)) or evaluate(*a, steps=steps, guidance=guidance, **k)
        ),
    )
    align(folder, mine, evaluate_steps=5, evaluate_guidance=0.0)
    assert set(drawn) == {(5, 0.0)}
    drawn.clear()
    align(folder, mine, overwrite=True)
    assert set(drawn) == {(3, 2.0)}


def test_full_fine_tuning_and_bfloat16(folder, mine):
    align(folder, mine, full=True)
    weights, card = (
        load_file(mine / "run" / "weights" / "trained.safetensors"),
        (mine / "run" / "README.md").read_text(),
    )
    assert "Full weights" in card and "load_lora_weights" not in card
    StableDiffusionPipeline.from_pretrained(folder).unet.load_state_dict(weights)  # as the card says
    align(folder, mine, dtype="bfloat16", overwrite=True)
    assert {t.dtype for t in load_file(mine / "run" / "lora" / "pytorch_lora_weights.safetensors").values()} == {
        torch.float32
    }


def test_two_rewards_and_a_python_callable(folder, mine):
    run = commands.align(
        "alignprop",
        model=str(folder),
        reward=["jpeg=0.3", lambda images, batch: images[:, 0].mean((1, 2))],
        prompts=["a cat", "a dog"],
        out=mine / "run",
        **SMALL,
    )
    assert {"jpeg", "<lambda>"} <= set(run.after.columns)


def test_mixing_two_runs(folder, mine):
    align(folder, mine, lr=3e-2)
    (mine / "run").rename(mine / "one")
    align(folder, mine, lr=3e-2, seed=1)
    file = commands.mix([f"{mine}/one=0.5", f"{mine}/run=0.5"], out=mine / "mixed", model=str(folder))
    ranks = {t.shape[0] for n, t in load_file(file).items() if "lora_A" in n}
    assert ranks == {8}


def test_mixing_writes_over_nothing(mine):
    with pytest.raises(UserError, match="is a file"):
        commands.mix([f"{mine}/one"], out=mine / "prompts.txt")
    (mine / "mixed").mkdir()
    (mine / "mixed" / "lora.safetensors").write_text("finished")
    for adapters, says in ((["one=nan"], "not finite"), (["one=x"], "not a number"), (["one"], "not empty")):
        with pytest.raises(UserError, match=says):
            commands.mix(adapters, out=mine / "mixed")


def test_mixing_into_what_is_no_pipeline(mine):
    (mine / "own.py").write_text("from toy import ToyModel\nclass Own(ToyModel):\n    latents = None\n")
    with pytest.raises(UserError, match="not a diffusers pipeline"):
        commands.mix([f"{mine}/one"], out=mine / "mixed", model=f"{mine}/own.py:Own")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("by_numpy", "has no graph back to the picture"),
        ("nan", "is nan, nan on this model's own pictures; it must be finite"),
        ("constant", "zero"),
        ("mean", "one number per sample"),
        ("rednes", "Did you mean"),
        ("alone", "cannot be called with"),
    ],
)
def test_rewards_that_cannot_teach(folder, mine, reward, says):
    with pytest.raises(UserError, match=says):
        align(folder, mine, reward, doctor=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"per_prompt": 0}, "per_prompt is 0; it must be at least 1"),
        ({"batch": 6, "per_prompt": 4}, "no multiple of 4 pictures a prompt. Try --batch 8"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": -1}, "threads is -1"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"evaluate_steps": 5000}, "steps is 5000"),
        ({"options": {"steps": 3, "drift": -1.0}}, "drift is -1.0"),
        ({"options": {"steps": 3, "truncation": "\u00b2"}}, "Unknown truncation"),
        ({"options": {"steps": 3, "truncation": lambda n, rng: [False] * n}}, "no step active"),
        ({"trackers": ["foo"]}, "Unknown tracker"),
        ({"options": {"steps": 3, "truncation": "4"}}, "3 steps"),
        ({"options": {"stepz": 3}}, "Did you mean 'steps'"),
        ({"dtype": "float8"}, "float32"),
        ({"device": "cuda"}, "no GPU"),
        ({"device": "meta"}, "no device 'meta'"),
        ({"updates": 0}, "at least 1"),
        ({"ema": 2.0}, "ema is 2.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"evaluate_guidance": float("nan")}, "evaluate_guidance is nan"),
        ({"options": {"steps": 3, "guidance": float("nan")}}, "guidance is nan"),
        ({"options": {"steps": 3, "hinge": float("nan")}}, "hinge is nan"),
        ({"options": {"hinge": 1.0, "target": 1.0}}, "one loss"),
    ],
)
def test_options_that_cannot_be(folder, mine, settings, says):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=says):
        align(folder, mine, **settings)
    assert not (mine / "run").exists(), "nothing is written before everything is checked"


def test_names_that_do_not_exist(mine):
    for change, says in (
        ({"model": "shape"}, "Did you mean 'shapes'"),
        ({"reward": "jpg"}, "Did you mean jpeg"),
        ({"reward": "jpeg-bytes"}, "--reward jpeg"),
        ({"prompts": mine / "none.txt"}, "no prompt file"),
    ):
        given = {"model": "shapes", "reward": "jpeg", "prompts": mine / "prompts.txt", **change}
        with pytest.raises(UserError, match=says):
            commands.align("alignprop", out=mine / "run", **given, **SMALL)


def test_an_existing_folder_is_left_alone(folder, mine):
    (mine / "run").mkdir()
    (mine / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        align(folder, mine)
    assert (mine / "run" / "thesis.txt").read_text() == "years of work"


def test_a_prompt_over_the_token_limit_is_said(folder, mine, capsys):
    (mine / "prompts.txt").write_text("word " * 400)
    align(folder, mine)
    assert "longer than the text encoder reads" in capsys.readouterr().out


def test_hostile_prompts_stay_text(folder, mine):
    (mine / "prompts.txt").write_text("<script>alert(1)</script>\n../../etc/passwd\n")
    align(folder, mine)
    page = (mine / "run" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    written = [p.relative_to(mine / "run") for p in (mine / "run").rglob("*")]
    assert not [p for p in written if "passwd" in str(p) or "script" in str(p)]  # a prompt never becomes a file's name


def tropism(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tropism.cli", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_the_command_line(folder, mine, monkeypatch, capsys):
    """Once as a process of its own, then inside this one."""
    done = tropism(
        "align",
        "alignprop",
        "--model",
        folder,
        "--reward",
        f"{mine}/reward.py:redness=2",
        "--prompts",
        mine / "prompts.txt",
        "--out",
        mine / "run",
        "--updates",
        1,
        "--batch",
        2,
        "--steps",
        3,
        "--truncation",
        1,
        "--threads",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert "reload difference" in done.stdout
    again = ["--config", mine / "run" / "config.yaml", "--out", mine / "again", "--updates", 1]
    assert called(monkeypatch, "align", "alignprop", *again) == 0
    one, two = ((mine / d / "lora" / "pytorch_lora_weights.safetensors").read_bytes() for d in ("run", "again"))
    assert one == two
    words = ["--model", folder, "--reward", "jpg", "--prompts", mine / "prompts.txt", "--out", mine / "x"]
    assert called(monkeypatch, "align", "alignprop", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("tropism: There is no reward 'jpg'. Did you mean jpeg?")
    assert "Traceback" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(folder, mine, number, code, monkeypatch, capfd):
    """The signal comes in the third update. (tests/run/test_fit.py sends them to a process of their own.)"""
    one_update = train.Scaled.__call__

    def signalled(self, batch, *, update, **rest):
        if update == 2:  # where no handler can stand a signal would end all tests
            assert threading.current_thread() is threading.main_thread()
            os.kill(os.getpid(), number)
        return one_update(self, batch, update=update, **rest)

    monkeypatch.setattr(train.Scaled, "__call__", signalled)
    files = ["--model", folder, "--reward", "jpeg", "--prompts", mine / "prompts.txt", "--out", mine / "run"]
    small = ["--updates", 500, "--batch", 2, "--steps", 3, "--threads", 1, "--no-doctor"]
    assert called(monkeypatch, "align", "alignprop", *files, *small) == code
    said = capfd.readouterr().err
    assert "Stopping after this update" in said and "Stopped after update 3 of 500" in said
    assert [p.parent.name for p in (mine / "run" / "checkpoints").glob("step-*/COMPLETE")] == ["step-000003"]


def test_every_method_option_is_a_flag():
    found = {p.name for p in flags(commands.METHODS["alignprop"], BOUND, {})}
    assert found == {
        "steps",
        "guidance",
        "truncation",
        "detach_input",
        "hinge",
        "target",
        "drift",
        "drift_detach",
    }
