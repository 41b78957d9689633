"""The commands before and after a run: doctor and export, and align on other families, as a user meets them."""

import re

import pytest
import torch
from command_line import called
from safetensors.torch import load_file
from tiny import tiny_pipeline
from tiny_families import SIZE, tiny_flux, tiny_sd3

from tropism import commands
from tropism.core import UserError
from tropism.models.latent import Latent
from tropism.run.checks import overrides

REWARDS = (
    "import torch\n"
    "def redness(images, batch):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
    "def rounded(images, batch):\n    return (images * 255).round().mean((1, 2, 3))\n"
    "def cut(images, batch):\n    return images.detach().mean((1, 2, 3))\n"
)
QUICK = {"updates": 1, "batch": 2, "evaluate_prompts": 2, "evaluate_every": 0, "height": SIZE, "width": SIZE}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("flux"), distilled=False)


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "reward.py").write_text(REWARDS)
    (tmp_path / "negative.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "blur"}\n{"prompt": "a dog"}\n')
    return tmp_path


@pytest.fixture(scope="module")
def run(flux, tmp_path_factory):
    """A finished run on FLUX.1-schnell's tiny pipeline; guidance, steps and prompts are its own and the bundled ones."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "reward.py").write_text(REWARDS)
    reward = f"{folder}/reward.py:redness"
    return commands.align(
        "alignprop",
        model=str(flux),
        reward=reward,
        prompts="animals",
        out=folder / "run",
        rank=3,
        alpha=7,
        lr=0.1,
        **QUICK,
    )


def test_another_family_is_the_same_command(run):
    assert run.reload_difference == 0
    assert "steps: 4\n" in (run.out / "config.yaml").read_text()
    assert "guidance: 1.0\n" in (run.out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"guidance": 3.5}}, "distilled and takes none. Use --guidance 1"),
        ({"evaluate_guidance": 2.0}, "distilled and takes none"),
        ({"prompts": "negative.jsonl"}, "no place for a negative prompt"),
        ({"height": 17}, "17x16 is not a multiple of 4"),
        ({"dtype": "float16"}, "dtype is float16 on the CPU"),
        ({"t5": False}, "needs all of its text encoders"),
        ({"scheduler": ["shift"]}, "not of the form KEY=VALUE"),
        ({"scheduler": ["shfit=3"]}, "Did you mean shift"),
        ({"quantize": "2bit"}, "quantize is '2bit'"),
        ({"quantize": "4bit"}, "bitsandbytes"),
        ({"reward": "reward.py:cut"}, "no graph back to the picture"),
        ({"reward": "reward.py:rounded"}, "zero"),
        ({"prompts": "animls"}, "Did you mean 'animals'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(flux, mine, options, message):
    files = {k: f"{mine}/{v}" for k, v in options.items() if k in ("prompts", "reward") and "." in v}
    settings = {"prompts": "animals", "reward": f"{mine}/reward.py:redness", **QUICK, **options, **files}
    with pytest.raises(UserError, match=message):
        commands.align("alignprop", model=str(flux), out=mine / "run", **settings)
    assert not (mine / "run").exists()


def test_the_doctor_can_be_left_out(flux, mine):
    """A rounded reward then fails where it did before: at update 0."""
    with pytest.raises(UserError, match="Update 0: the gradient of every trained parameter is exactly zero"):
        commands.align(
            "alignprop",
            model=str(flux),
            reward=f"{mine}/reward.py:rounded",
            prompts="animals",
            out=mine / "run",
            doctor=False,
            **QUICK,
        )


def test_doctor_on_the_command_line(monkeypatch, capsys, flux, mine):
    model = ("--model", flux, "--height", SIZE, "--width", SIZE)
    assert called(monkeypatch, "doctor", *model, "--reward", f"{mine}/reward.py:redness", "--gpu", 24) == 0
    said = capsys.readouterr().out
    assert "Everything in order" in said
    assert "24 GB card: 16 with, 16 without" in said
    assert called(monkeypatch, "doctor", *model, "--reward", f"{mine}/reward.py:cut") == 1
    assert "Fault" in capsys.readouterr().out
    assert called(monkeypatch, "doctor", *model) == 2
    assert "no reward to examine" in capsys.readouterr().err
    assert called(monkeypatch, "doctor") == 0
    assert "torch 2" in capsys.readouterr().out


def test_doctor_asks_for_sizes_that_are(flux):
    with pytest.raises(UserError, match="GPU size is 0"):
        commands.doctor(model=str(flux), reward="jpeg", gpu=[0.0], height=SIZE, width=SIZE)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"batch": -3}, "batch is -3"),
        ({"rank": 0}, "rank is 0"),
        ({"height": 0}, "height is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"gpu": [24.0, float("nan")]}, "GPU size is nan"),
    ],
)
def test_the_doctor_refuses_the_numbers_that_align_refuses(bad, says):
    with pytest.raises(UserError, match=says):
        commands.doctor(model="no/such-model", reward="jpeg", **bad)


def test_what_fits_with_the_text_encoders(capsys, flux, monkeypatch):
    """They are alone on the card, and the larger of embedding and update decides."""
    model = {"model": str(flux), "reward": "jpeg", "height": SIZE, "width": SIZE}
    commands.doctor(**model, gpu=[24.0, 2e-4])
    said = capsys.readouterr().out
    assert re.search(r"text encoders [\d.]+ [kM]B, there alone and freed", said)
    assert "0.0002 GB card: nothing with, nothing without" in said
    monkeypatch.setattr("tropism.doctor.memory._free", lambda device, own: own)
    commands.doctor(**model)
    assert "this machine (0.0 GiB free): nothing with" in capsys.readouterr().out


def test_export_on_the_command_line(monkeypatch, capsys, run):
    file = run.out.parent / "mine.safetensors"
    assert called(monkeypatch, "export", run.out, "--format", "kohya", "--out", file) == 0
    assert str(file) in capsys.readouterr().out
    assert any("double_blocks_0_img_attn_qkv" in key for key in load_file(file))
    assert called(monkeypatch, "export", run.out, "--format", "kohya", "--out", file) == 2
    assert "never writes over it" in capsys.readouterr().err
    fused = run.out.parent / "fused"
    assert called(monkeypatch, "export", run.out, "--format", "fused", "--out", fused) == 0
    assert (fused / "model_index.json").is_file()
    assert called(monkeypatch, "export", run.out) == 2
    assert "--out PLACE, or --push" in capsys.readouterr().err


def test_an_adapter_of_another_family_is_not_exported_with_this_base(run, tmp_path):
    with pytest.raises(UserError, match="single_transformer_blocks"):
        commands.export(run.out, format="kohya", out=tmp_path / "k.safetensors", model=str(tiny_sd3(tmp_path / "sd3")))


def test_an_adapter_is_mixed_with_its_own_family_only(run, tmp_path):
    mixed = commands.mix([f"{run.out}=0.5"], out=tmp_path / "half")
    mine, theirs = load_file(run.out / "lora" / mixed.name), load_file(mixed)
    key = next(k for k in mine if "lora_A" in k)
    down, up = (lambda tensors: (tensors[key], tensors[key.replace("lora_A", "lora_B")]))(mine), theirs
    expected = 0.5 * 7 / 3 * down[1] @ down[0]
    torch.testing.assert_close(up[key.replace("lora_A", "lora_B")] @ up[key], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="does not fit"):
        commands.mix([f"{run.out}=0.5"], out=tmp_path / "no", model=str(tiny_pipeline(tmp_path / "sd")))


def test_a_mixture_knows_its_base(run, flux, tmp_path):
    mixed = commands.mix([f"{run.out}=0.5"], out=tmp_path / "half").parent
    again = commands.mix([f"{mixed}=2", f"{run.out}=-1"], out=tmp_path / "nothing").parent
    assert all(not (p[1] @ p[0]).any() or (p[1] @ p[0]).abs().max() < 1e-6 for p in products(again))
    exported = commands.export(mixed, format="kohya", out=tmp_path / "half.safetensors")
    assert any("double_blocks_0_img_attn_qkv" in key for key in load_file(exported))
    with pytest.raises(UserError, match=r"There is no pytorch_lora_weights.safetensors in .*missing"):
        commands.mix([f"{tmp_path}/missing"], out=tmp_path / "no")
    (mixed / "config.yaml").write_text("model: other/base\n")
    with pytest.raises(UserError, match=r"several base models \(.*other/base.*--model"):
        commands.mix([str(run.out), str(mixed)], out=tmp_path / "no")
    (mixed / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"No run says .*--model"):
        commands.mix([str(mixed)], out=tmp_path / "no")


def test_a_mixture_beside_a_run(run, tmp_path, capsys, monkeypatch):
    """As RUN/lora it is found like a run's adapter; the command says where it is and how far off it was."""
    out = tmp_path / "other" / "lora"
    assert called(monkeypatch, "mix", "--adapter", f"{run.out}=0.5", "--out", out) == 0
    said = capsys.readouterr().out
    assert str(out) in said
    assert "largest pixel difference 0.0e+00" in said
    assert commands.export(out.parent, format="kohya", out=tmp_path / "k.safetensors")


def test_runs_without_t5_mix_without_it(tmp_path, mine):
    base, options = tiny_sd3(tmp_path / "sd3"), {"t5": False, "prompts": "animals", **QUICK}
    commands.align("alignprop", model=str(base), reward=f"{mine}/reward.py:redness", out=tmp_path / "run", **options)
    mixed = commands.mix([str(tmp_path / "run")], out=tmp_path / "mixed").parent
    fused = commands.export(mixed, format="fused", out=tmp_path / "fused")
    assert not (fused / "text_encoder_3").exists()


@pytest.mark.parametrize("command", ["align", "doctor"])
def test_the_text_encoders_are_gone_before_the_first_network_call(tmp_path, mine, monkeypatch, command):
    seen, original = [], Latent.counted

    def counted(model, *args):
        seen.append(model.texts._pipe is not None)
        return original(model, *args)

    monkeypatch.setattr(Latent, "counted", counted)
    base, reward = str(tiny_sd3(tmp_path / "sd3")), f"{mine}/reward.py:redness"
    if command == "align":
        commands.align("alignprop", model=base, reward=reward, prompts="animals", out=tmp_path / "run", **QUICK)
    else:
        commands.doctor(model=base, reward=reward, height=SIZE, width=SIZE)
    assert len(seen) > 10
    assert not any(seen)


def products(adapter):
    tensors = load_file(adapter / "pytorch_lora_weights.safetensors")
    return [(tensors[k], tensors[k.replace("lora_A", "lora_B")]) for k in tensors if "lora_A" in k]


def test_values_of_scheduler_keys():
    texts = ["a=1e-4", "b=3", "c=true", "d=null", "e=trailing", "f=[0.1, 0.2]", "g=-.5"]
    found = {"a": 1e-4, "b": 3, "c": True, "d": None, "e": "trailing", "f": [0.1, 0.2], "g": -0.5}
    assert overrides(texts) == found
    for odd in ("a", "a=", "=3", "a=["):
        with pytest.raises(UserError, match="not of the form KEY=VALUE"):
            overrides([odd])


def test_a_configuration_with_a_misspelt_setting(monkeypatch, capsys, tmp_path):
    for text, says in (
        ("updatse: 3\n", "does not know: updatse. Did you mean 'updates'?"),
        ("options:\n  guidence: 3\n", "does not know: guidence. Did you mean 'guidance'?"),
        ("zzz: 1\n", "does not know: zzz. Take it out."),
        ("- 1\n", "holds no settings"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert (
            called(monkeypatch, "align", "alignprop", "--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
            == 2
        )
        assert says in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
