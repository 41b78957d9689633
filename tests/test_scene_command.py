"""`tropism scene`: an object from text on a tiny exact denoiser, what it leaves, how it goes on, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import trimesh
from command_line import called
from PIL import Image
from safetensors.torch import load_file

from tropism.commands import scene
from tropism.core import UserError
from tropism.run import scene_products
from tropism.scene.vp3d import Stage
from tropism.worlds.solids import scenes
from tropism.worlds.solids_library import library
from tropism.worlds.solids_oracle import OracleModel, exact

RED = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
SHORT = {"updates": 6, "fine_updates": 3, "resolution": 10, "fine_resolution": 14, "samples": 12, "lr": 0.3, "steps": 4}
SHORT |= {"watch": ["none"], "candidates": 3, "checkpoint_every": 1, "threads": 1}


@pytest.fixture(scope="module")
def model():
    known = [s for s in scenes(size="large") if s.prompt in ("a large red cube", "a large blue cube")]
    return OracleModel(library(known, azimuths=4, elevations=(0.0, 45.0, 70.0), size=12))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"FRAMES": 4, "SIZE": 16, "LARGER": 16, "FINE_MESH": 24}.items():
        monkeypatch.setattr(scene_products, name, value)


def redness(images, batch):
    return (images * RED.to(images)).mean((1, 2, 3))


def likeness(images, batch):
    return -(images - batch.reference).square().mean((1, 2, 3))


redness.name, likeness.name = "redness", "likeness"


def made(model, out, **more):
    return scene("a cube", out=out, model=model, **{"reward": [redness], "consistency": likeness, **SHORT, **more})


def test_what_a_scene_leaves(model, tmp_path):
    run = made(model, tmp_path)
    for name in ("turntable.gif", "views.png", "mesh.glb", "viewer.html", "visual_prompt.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 100, name
    opened = trimesh.load(tmp_path / "mesh.glb", force="mesh")
    assert opened.is_watertight and opened.volume == pytest.approx(run.mesh.volume(), rel=1e-4)
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert told["redness"] == run.numbers["redness"] and told["redness/worst"] <= told["redness"]
    assert told["trained on"] == ["redness", "likeness"] and "8 views" in told["protocol"]
    kept = load_file(tmp_path / "visual.safetensors")
    assert torch.equal(kept["picture"], kept["candidates"][int(kept["rewards"].argmax())])
    page = (tmp_path / "report.html").read_text()
    assert "a cube" in page and "Read redness with care" in page and page.count('alt="candidate"') == 3
    rows = [json.loads(row) for row in (tmp_path / "coarse" / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in rows] == list(range(7)) and all("held_out/redness" in r for r in (rows[0], rows[-1]))


def test_a_killed_scene_goes_on_to_the_bit(model, tmp_path, monkeypatch):
    """Killed in the coarse stage, and again in the fine one."""
    whole = made(model, tmp_path / "whole").field.state_dict()
    step, left = Stage.__call__, [3]

    def killed(self, *args, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args, **named)

    monkeypatch.setattr(Stage, "__call__", killed)
    for resume, more in ((False, 4), (True, 0)):
        with pytest.raises(KeyboardInterrupt):
            made(model, tmp_path / "parts", resume=resume)
        left[0] = more
    assert (tmp_path / "parts" / "fine").exists()
    monkeypatch.setattr(Stage, "__call__", step)
    again = made(model, tmp_path / "parts", resume=True).field.state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_resumed_scene_keeps_its_settings(model, tmp_path):
    made(model, tmp_path, fine="none")
    with pytest.raises(UserError, match=r"begun with resolution 10, now 12"):
        made(model, tmp_path, fine="none", resolution=12, resume=True)
    (tmp_path / "mesh.glb").unlink()
    made(model, tmp_path, fine="none", resume=True)
    assert (tmp_path / "mesh.glb").exists()


def test_a_reference_gives_the_looks(model, tmp_path):
    """A wide picture with alpha: laid on white, made square, and followed in place of one that is drawn."""
    photo = Image.new("RGBA", (31, 17), (0, 0, 0, 0))
    photo.paste((20, 40, 230, 255), (8, 3, 22, 14))
    photo.save(tmp_path / "photo.png")
    run = made(model, tmp_path / "out", reference=tmp_path / "photo.png", reward=["none"], fine="none")
    kept = load_file(run.out / "visual.safetensors")["picture"]
    assert kept.shape == (3, 12, 12) and torch.allclose(kept[:, 0], torch.ones(3, 12), atol=1e-3)
    assert kept[2, 6, 6] - kept[0, 6, 6] > 0.5
    assert "gives the looks" in (run.out / "report.html").read_text()


def test_a_reward_without_a_gradient_weighs_the_noise(model, tmp_path):
    blind = lambda images, batch: redness(images, batch).detach()
    blind.name, blind.differentiable = "blind", False
    run = made(model, tmp_path, reward=[blind], consistency="none", noises=3, fine="none")
    rows = [json.loads(row) for row in (tmp_path / "coarse" / "metrics.jsonl").read_text().splitlines()]
    assert "blind" in run.numbers and all(r["blind"] is not None for r in rows[1:])


def test_a_scene_that_collapses_is_said_so(model, tmp_path):
    with pytest.raises(UserError, match="The scene is empty"):
        made(model, tmp_path, opacity=1e4, lr=3.0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"fine": "mesh"}, "mesh"),
        ({"distillation": "dreamfusion"}, "dreamfusion"),
        ({"updates": 0}, "updates"),
        ({"resolution": 1}, "at least 2 nodes"),
        ({"start": 1.0}, "share of the run"),
        ({"rho": -1.0}, "rho"),
        ({"reward": ["jpeg-bytes"]}, "--noises 4"),
        ({"reward": ["none"], "noises": 4}, "weigh 4 noises"),
        ({"distillation": "isd", "candidates": 0}, "isd compares with a visual prompt"),
        ({"reference": "nothere.png"}, r"nothere\.png"),
    ],
)
def test_what_cannot_be_asked(model, tmp_path, more, says):
    with pytest.raises(UserError, match=says):
        made(model, tmp_path / "out", **more)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([" "], "The prompt is empty"),
        (["a red teapot"], "Its words are a, small"),
        (["a red cube left of a blue solid"], "name two different shapes"),
        (["a red cube", "--adapter", "somewhere"], "no image adapter"),
        (["a cube", "--model", "shapes", "--reward", "none"], "--candidates 0"),
    ],
)
def test_what_the_command_line_refuses(monkeypatch, tmp_path, capsys, words, says):
    assert called(monkeypatch, "scene", *words, "--out", tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_exact_denoiser_knows_what_the_words_could_have_been(tmp_path, monkeypatch):
    """One size where none is named, two where it is; of two solids all colours of the shapes, both ways round."""
    from tropism.worlds import solids_oracle

    asked = {}
    monkeypatch.setattr(solids_oracle, "library", lambda pool, folder: asked.update(pool=pool, folder=folder))
    monkeypatch.setattr(solids_oracle, "OracleModel", lambda found, **_: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for prompt, count in (("a red cube", 36), ("a small cube", 72), ("a red cube left of a blue sphere", 60)):
        exact(prompt)
        assert len(asked["pool"]) == count and asked["folder"] == Path(tmp_path) / "tropism"
