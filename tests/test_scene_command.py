"""`tropism scene`: an object from text on a tiny exact denoiser, what it leaves, how it goes on, and what it refuses."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import trimesh
from command_line import called
from PIL import Image
from safetensors.torch import load_file
from tiny_visual import tiny_adapter, tiny_text_pixel

from tropism.commands import scene
from tropism.commands.scene import _of_solids
from tropism.core import UserError
from tropism.models.load import load_model
from tropism.run import scene_products
from tropism.run.scene_request import terms_of
from tropism.scene.gaussians import GaussianField, read_ply
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


def shortened(monkeypatch):
    for name, value in {"FRAMES": 4, "SIZE": 16, "LARGER": 16, "FINE_MESH": 24}.items():
        monkeypatch.setattr(scene_products, name, value)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shortened(monkeypatch)


def killed_after(updates, monkeypatch):
    """Break off every later update; the updates that are left, as the one item of a list."""
    step, left = Stage.__call__, [updates]

    def killed(self, *args, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args, **named)

    monkeypatch.setattr(Stage, "__call__", killed)
    return left


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


def test_what_the_words_can_mean_is_the_truth(model, tmp_path):
    """ "a red cube" is one scene here, and is measured against; "a cube" could be two."""
    run = scene(
        "a red cube",
        out=tmp_path,
        model=model,
        **{**SHORT, "reward": ["none"], "consistency": "none", "watch": [redness], "fine": "none"},
    )
    assert 0 < run.numbers["truth/iou"] <= 1 and run.numbers["truth/chamfer"] > 0 and "judge/accuracy" in run.numbers
    settings = {"model": model, "prompt": "a cube", "watch": [], "reference": None}
    assert not any(name.startswith("truth") for name in _of_solids(run.field, model, settings))
    assert any(name.startswith("truth") for name in _of_solids(run.field, model, settings | {"prompt": "a blue cube"}))


def test_a_killed_scene_goes_on_to_the_bit(model, tmp_path, monkeypatch):
    """Killed in the coarse stage, and again in the fine one."""
    whole = made(model, tmp_path / "whole").field.state_dict()
    left = killed_after(3, monkeypatch)
    for resume, more in ((False, 4), (True, 0)):
        with pytest.raises(KeyboardInterrupt):
            made(model, tmp_path / "parts", resume=resume)
        left[0] = more
    assert (tmp_path / "parts" / "fine").exists()
    monkeypatch.undo()
    shortened(monkeypatch)
    again = made(model, tmp_path / "parts", resume=True).field.state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_resumed_scene_keeps_its_settings(model, tmp_path):
    made(model, tmp_path, fine="none")
    with pytest.raises(UserError, match=r"begun with resolution 10, now 12"):
        made(model, tmp_path, fine="none", resolution=12, resume=True)
    (tmp_path / "mesh.glb").unlink()
    made(model, tmp_path, fine="none", resume=True, checkpoint_every=2)
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
    (tmp_path / "photo.png").unlink()  # what was made of it is kept
    made(model, tmp_path / "out", reference=tmp_path / "photo.png", reward=["none"], fine="none", resume=True)
    Image.new("RGBA", (9, 9), (3, 4, 5, 0)).save(tmp_path / "blank.png")
    with pytest.raises(UserError, match="of one colour"):
        made(model, tmp_path / "blank", reference=tmp_path / "blank.png")


def test_a_reward_without_a_gradient_weighs_the_noise(model, tmp_path):
    blind = lambda images, batch: redness(images, batch).detach()
    blind.name, blind.differentiable = "blind", False
    run = made(model, tmp_path, reward=[blind], consistency="none", noises=3, fine="none")
    rows = [json.loads(row) for row in (tmp_path / "coarse" / "metrics.jsonl").read_text().splitlines()]
    told = [r.get("blind") is not None for r in rows[1:]]
    assert "blind" in run.numbers and told == [update / 6 > 0.3 for update in range(6)]  # from --start on


def test_gaussians_as_the_fine_stage(model, tmp_path):
    """Their file opens again as what was trained, a killed stage goes on, and the mesh is of them."""
    run = made(model, tmp_path, fine="gaussian", gaussians=24)
    assert isinstance(run.field, GaussianField) and len(run.field) == 24 and run.mesh.volume() > 0
    again = read_ply(tmp_path / "scene.ply")
    assert torch.equal(again.means, run.field.means) and torch.equal(again.dc, run.field.dc)
    assert 'href="scene.ply"' in (tmp_path / "report.html").read_text()
    rows = [json.loads(row) for row in (tmp_path / "fine" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["update"] == 3
    (tmp_path / "fine" / "checkpoints" / "step-000003" / "COMPLETE").unlink()
    resumed = made(model, tmp_path, fine="gaussian", gaussians=24, resume=True).field.state_dict()
    assert all(torch.equal(v, resumed[n]) for n, v in run.field.state_dict().items())


OTHER = {
    "fine": "voxel",
    "gaussians": 3,
    "distillation": "csd",
    "weight": "uniform",
    "anneal": "constant",
    "schedule": "linear",
}
OTHER |= {
    "pixels": 5,
    "noises": 2,
    "eikonal": 0.5,
    "smoothness": 9.0,
    "rho": 5.0,
    "rho_visual": 3.0,
    "hinge": 0.1,
    "start": 0.9,
}
OTHER |= {
    "temperature": 3.0,
    "fine_lr": 0.5,
    "guidance": 1.0,
    "samples": 9,
    "opacity": 1.0,
    "decided": 1.0,
    "dtype": "float64",
}
OTHER |= {
    "strength": 0.1,
    "views": 3,
    "negative": "a blue solid",
    "updates": 7,
    "fine_updates": 9,
    "seed": 5,
    "steps": 3,
}


def test_every_setting_that_counts_is_kept(model, tmp_path):
    made(model, tmp_path, fine="none", updates=1)
    for name, value in OTHER.items():
        with pytest.raises(UserError, match=rf"begun with {name} "):
            made(model, tmp_path, **{"fine": "none", "updates": 1, name: value}, resume=True)
    free = {"out", "checkpoint_every", "watch", "device", "threads", "resume", "overwrite", "command"}
    named = {
        "model",
        "adapter",
        "reference",
        "reward",
        "consistency",
        "candidates",
        "lr",
        "resolution",
        "fine_resolution",
        "prompt",
    }
    assert set(inspect.signature(scene).parameters) == free | named | set(OTHER)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of diffusers' classes with random weights, and its image adapter."""
    folder = tiny_text_pixel(tmp_path_factory.mktemp("pixel"))
    return str(folder), str(tiny_adapter(tmp_path_factory.mktemp("adapter"), load_model(folder, lora=None).network))


def test_a_folder_of_diffusers_with_an_adapter(pipeline, tmp_path, monkeypatch):
    """Through the same loader as every other command; its score network (vsd) learns beside the scene, and a killed run goes on."""
    folder, adapter = pipeline
    more = {
        "adapter": adapter,
        "distillation": "vsd",
        "fine": "none",
        "reward": [redness],
        "guidance": 3.0,
        "updates": 4,
    }
    whole = made(folder, tmp_path / "whole", **more)
    kept = load_file(tmp_path / "whole" / "visual.safetensors")
    assert kept["picture"].shape == (3, 16, 16) and len(kept["candidates"]) == 3
    last = load_file(max((tmp_path / "whole" / "coarse").rglob("weights.safetensors")))
    up = {n: v for n, v in last.items() if "lora_B" in n}
    assert up and all(v.abs().max() > 0 for v in up.values())
    without = made(folder, tmp_path / "without", **{**more, "adapter": None, "candidates": 0, "consistency": "none"})
    assert not torch.equal(whole.field.grid, without.field.grid) and not (without.out / "visual_prompt.png").exists()
    killed_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path / "parts", **more)
    monkeypatch.undo()
    shortened(monkeypatch)
    again = made(folder, tmp_path / "parts", resume=True, **more)
    assert torch.equal(again.field.grid, whole.field.grid)


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
        ({"fine": "gaussian", "gaussians": 0}, "gaussians"),
        ({"start": 1.0}, "share of the run"),
        ({"rho": -1.0}, "rho"),
        ({"reward": ["jpeg-bytes"]}, "--noises 4"),
        ({"reward": ["none"], "noises": 4}, "weigh 4 noises"),
        ({"noises": 1}, "one noise"),
        ({"candidates": 0, "consistency": "solids-visual"}, "leaves none"),
        ({"model": "dna"}, "token sequences"),
        ({"noises": 2, "distillation": "perp-neg"}, "view words, not noises"),
        ({"temperature": float("nan")}, "temperature"),
        ({"schedule": "step"}, "step"),
        ({"negative": "ugly"}, "ugly"),
        ({"distillation": "isd", "candidates": 0}, "isd compares with a visual prompt"),
        ({"reference": "nothere.png"}, r"nothere\.png"),
    ],
)
def test_what_cannot_be_asked(model, tmp_path, more, says):
    with pytest.raises(UserError, match=says):
        made(more.get("model", model), tmp_path / "out", **{n: v for n, v in more.items() if n != "model"})


def test_a_scene_without_a_fine_stage_runs_to_the_end(model, tmp_path, monkeypatch):
    """Its times and its rewards' shares are those of a whole run, whatever --fine-updates says."""
    seen, pace = [], Stage.pace
    monkeypatch.setattr(Stage, "pace", lambda self, done: (pace(self, done), seen.append(self.progress)))
    fields = [made(model, tmp_path / str(n), fine="none", fine_updates=n).field.grid for n in (3, 70)]
    assert torch.equal(*fields) and seen[:6] == pytest.approx([i / 6 for i in range(6)])


def test_an_overwritten_scene_links_to_nothing_of_the_last_one(model, tmp_path):
    made(model, tmp_path, fine="gaussian", gaussians=24, updates=2, fine_updates=1)
    made(model, tmp_path, fine="none", updates=2, overwrite=True)
    assert not (tmp_path / "scene.ply").exists() and "scene.ply" not in (tmp_path / "report.html").read_text()


def test_two_solids_have_no_reward_of_their_own():
    asked = {
        "prompt": "a red cube left of a blue sphere",
        "reward": [],
        "consistency": None,
        "watch": [],
        "candidates": 8,
        "reference": None,
    }
    assert terms_of({**asked, "noises": 0}, True) == {"reward": None, "consistency": None, "watch": []}
    with pytest.raises(UserError, match="no reward to weigh 2 noises"):
        terms_of({**asked, "noises": 2}, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([" "], "The prompt is empty"),
        (["a red teapot"], "Its words are a, small"),
        (["a red cube left of a blue solid"], "name two different shapes"),
        (["a red cube", "--adapter", "somewhere"], "no image adapter"),
        (["a red cube, back view"], "names a view, back"),
        (["a red cube", "--model", "solid-exact"], "'solids-exact'"),
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
