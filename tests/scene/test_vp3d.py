"""VP3D on the exact denoiser: what an update asks for, that its terms do what they say, and that a scene takes the prompt's shape."""

from dataclasses import replace

import pytest
import torch

from tropism.core import Draw, Stream, UserError
from tropism.scene.distill import noised
from tropism.scene.field import VoxelField
from tropism.scene.measures import measured
from tropism.scene.views import gate
from tropism.scene.vp3d import METHODS, Asked, _compared, prompt_batch, vp3d
from tropism.space.cameras import cameras
from tropism.space.volume import render
from tropism.worlds.solids import field as solid
from tropism.worlds.solids import parse, scenes
from tropism.worlds.solids_library import library
from tropism.worlds.solids_oracle import OracleModel, exact

SIZE = 12
RED = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)


@pytest.fixture(scope="module")
def model():
    known = [
        s for s in scenes(size="large") if s.prompt in ("a large red cube", "a large blue cube", "a large red sphere")
    ]
    return OracleModel(library(known, azimuths=8, elevations=(0.0, 15.0, 40.0, 70.0), size=SIZE))


def redness(images, batch):
    return (images * RED.to(images)).mean((1, 2, 3))


redness.name = "redness"


def moved(model, asked, seed=0, updates=1, lr=0.1, field=None, **more):
    """A field after some updates, and the last Info."""
    field = field or VoxelField(16)
    optimiser = torch.optim.Adam(field.parameters(), lr=lr)
    for update in range(updates):
        how = {"state": {}, "update": update, "seed": seed, "progress": update / updates, "samples": 16, **more}
        ((loss, info),) = vp3d(model, field, asked.batch(seed, update), **how)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return field, info


def seen(field):
    return render(field, cameras([0.0, 90.0, 200.0], 15.0), SIZE, samples=32).over(1.0).detach()


def test_a_batch_is_a_function_of_seed_and_update():
    asked = Asked("a red cube", visual=torch.rand(3, 8, 8), strength=0.8)
    one, same, other = asked.batch(1, 5), asked.batch(1, 5), asked.batch(1, 6)
    assert one.prompts == same.prompts and torch.equal(one.cameras.azimuth, same.cameras.azimuth)
    assert one.meta == same.meta and one.meta != other.meta
    assert [p.rpartition(", ")[2] for p in one.prompts] == [f"{v} view" for v in one.cameras.views()]
    assert torch.equal(one.visual_scale, gate(one.cameras.azimuth, 0.0, 0.8))
    assert replace(asked, view_words=False).batch(1, 5).prompts == ["a red cube"] * 4
    assert prompt_batch("a red cube", 2).prompts == ["a red cube, front view"] * 2


@pytest.mark.parametrize("method", [m for m in METHODS if m != "vsd"])
def test_every_method_moves_the_scene_and_nothing_else(model, method):
    field, info = moved(model, Asked("a red cube", visual=torch.rand(3, SIZE, SIZE)), method=method)
    assert field.grid.abs().max() > 0.01 and info.samples == 1 and info.scalars["distillation_norm"] > 0


@pytest.mark.parametrize("method", METHODS[:3] + METHODS[4:])
def test_a_view_is_gated_by_its_own_camera_alone(model, method):
    """Turning another row of the batch to the back changes nothing of the front view's prediction; turning itself does."""
    v = model.library.over((1.0, 1.0, 1.0))[0]

    def front(other, strength=0.01):
        places = cameras([other, 0.0], 15.0)
        batch = replace(
            Asked("a cube", visual=v, views=2, background=(1, 1, 1)).batch(0, 0),
            prompts=[f"a cube, {word} view" for word in places.views()],
            cameras=places,
            visual_scale=gate(places.azimuth, 0.0, strength),
        )
        cond, compare = _compared(method, model, batch)
        noise = Draw(0, 0, (0, 0))(Stream.RENOISE, 0, cond.shape)
        at = noised(model.process, torch.zeros_like(noise), torch.tensor([900, 900]), noise)
        return compare(model, at, cond, 7.5)[1][1]

    assert torch.equal(front(180.0), front(0.0))
    assert not torch.allclose(front(180.0), front(180.0, strength=0.001), atol=1e-4)


def test_an_update_repeats_to_the_bit(model):
    one, other = (moved(model, Asked("a cube"), updates=2)[0].grid for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, moved(model, Asked("a cube"), seed=1, updates=2)[0].grid)


def test_a_scene_takes_the_shape_and_colour_of_its_prompt(model):
    before = VoxelField(16)
    after, _ = moved(model, Asked("a red cube", background=(1, 1, 1)), updates=40)
    truth = seen(solid(parse("a large red cube")))
    error = lambda field: float((seen(field) - truth).square().mean())
    assert error(after) < 0.5 * error(before)


def decibels(field, truth):
    return -10 * (seen(field) - truth).square().mean().log10().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_visual_prompt_decides_what_the_text_leaves_open(model, seed):
    """ "a cube" is red or blue here; given a picture of the red one from the front, that is what comes, by more than 2 dB."""
    wanted = next(i for i, s in enumerate(model.library.scenes) if s.prompt == "a large red cube")
    sides = len(model.library) // len(model.library.scenes)
    v = model.library.over((1.0, 1.0, 1.0))[wanted * sides]
    truth = seen(solid(parse("a large red cube")))
    without, given = (
        decibels(moved(model, Asked("a cube", visual=picture), seed=seed, updates=60, guidance=7.5)[0], truth)
        for picture in (None, v)
    )
    assert given - without > 2, (given, without)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_visual_prompt_decides_among_all_solids(seed):
    """The same among all 36 solids of a size at 32 pixels, 180 updates of a 32^3 grid: some 10 seconds a scene."""
    known = exact("a cube")
    sides = known.library.cameras
    off = sides.azimuth.deg2rad().cos().neg() + (sides.elevation - 15).abs() / 90
    red = [
        known.library.scenes[int(i)].solids[0].said.items() >= {"shape": "cube", "colour": "red"}.items()
        for i in known.library.which
    ]
    at = int(off.masked_fill(~torch.tensor(red), torch.inf).argmin())
    v, truth = known.library.over((1.0, 1.0, 1.0))[at], known.library.scenes[int(known.library.which[at])]
    found = []
    for picture in (None, v):
        how = {"guidance": 7.5, "smoothness": 3.0, "samples": 32, "lr": 0.06, "updates": 180}
        field, _ = moved(known, Asked("a cube", visual=picture), seed=seed, field=VoxelField(32), **how)
        found.append(measured(field, truth, truth=truth)["psnr"])
    assert found[1] - found[0] > 2, found


def test_rewards_wait_and_then_pull_at_their_share(model):
    """Before `start` of the run a reward changes nothing; afterwards it raises itself, at most at its share of the distillation."""
    asked = Asked("a cube", background=(1, 1, 1))
    without = moved(model, asked)[0].grid
    early = moved(model, asked, reward=redness, progress=0.2)[0].grid
    assert torch.equal(moved(model, asked, progress=0.2)[0].grid, early)
    late, info = moved(model, asked, reward=redness, progress=0.9, rho=5.0)
    plain, _ = moved(model, asked, progress=0.9)
    batch = asked.batch(0, 0)
    score = lambda field: redness(render(field, batch.cameras, SIZE, samples=16).over(1.0), batch).mean().item()
    assert score(late) > score(plain) and info.columns["redness"].shape == (4,)
    assert not torch.equal(without, late.grid)


def test_regularisers_are_asked_for(model):
    asked = Asked("a cube")
    thin, thick = (moved(model, asked, updates=3, opacity=w)[1].scalars["opacity"] for w in (50.0, 0.0))
    assert thin < thick
    rough, smooth = (moved(model, asked, updates=5, smoothness=w)[0].smoothness().item() for w in (0.0, 10.0))
    assert smooth < rough


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"method": "sdss"}, "method is 'sdss'"),
        ({"anneal": "slow"}, "anneal is 'slow'"),
        ({"method": "isd"}, "isd compares with a visual prompt"),
        ({"consistency": redness}, "'redness' compares with a visual prompt"),
        ({"weight": "heavy"}, "weight of times is 'heavy'"),
    ],
)
def test_what_cannot_be_asked(model, more, says):
    with pytest.raises(UserError, match=says):
        moved(model, Asked("a cube"), **more)
