"""Photographs through an upscaler: tiles, places of noise, and what several samples tell."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from tiny_upscalers import tiny_pixel, tiny_x4

from tropism.commands import align, upscale
from tropism.core import Stream, UserError
from tropism.models.one_step import OneStep
from tropism.models.upscale_pixel import PixelUpscale
from tropism.restore.pictures import made_by
from tropism.run.upscaling import PlacedDraw, Upscaler, differences, upscaled
from tropism.worlds import glyphs_posterior


class Grainy(OneStep):
    """Enlarges by repetition and adds grain: what it makes of a place hangs on that place and its noise alone."""

    def __init__(self, grain=0.05):
        super().__init__(torch.nn.Linear(1, 1), 2)
        self.grain = grain

    def upscale(self, low_res, noise, run):
        return F.interpolate(low_res, scale_factor=2.0) + self.grain * noise


def bright(images, batch):
    return images.mean((1, 2, 3))


SMALL = {"tile": 50, "context": 4, "blend": 5}


def photo(file, width=90, height=70, seed=0):
    pixels = np.random.default_rng(seed).integers(60, 190, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_noise_belongs_to_its_place():
    """A part drawn at one corner is the same part of any larger one; blocks of the field are independent standard normals."""
    whole = PlacedDraw(3, 0, (0, 1), (0, 0), 300)(Stream.PRIOR, 0, (2, 300, 280))
    part = PlacedDraw(3, 0, (0, 1), (45, 130), 90)(Stream.PRIOR, 0, (2, 90, 100))
    assert torch.equal(part, whole[:, :, 45:135, 130:230])
    finer = PlacedDraw(3, 0, (0, 1), (11, 32), 20)(Stream.PRIOR, 0, (2, 80, 64))  # four states a pixel
    assert torch.equal(finer, whole[:, :, 44:124, 128:192])
    n = whole.numel()
    assert abs(whole.mean()) < 4 / n**0.5 and abs(whole.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((whole[..., :64, :64] * whole[..., 64:128, :64]).mean()) < 4 / (4 * 64**2) ** 0.5
    for other in (PlacedDraw(4, 0, (0,), (0, 0), 8), PlacedDraw(3, 0, (2,), (0, 0), 8)):
        assert not torch.equal(other(Stream.PRIOR, 0, (2, 8, 8))[0], whole[0, :, :8, :8])
    assert not torch.equal(PlacedDraw(3, 0, (0,), (0, 0), 300)(Stream.TRANSITION, 0, (2, 8, 8))[0], whole[0, :, :8, :8])


def test_tiles_of_a_local_model_have_no_seams(tmp_path):
    file = photo(tmp_path / "a.png")
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    upscale(file, model=Grainy(), out=small, tile=40, context=4, blend=5)
    upscale(file, model=Grainy(), out=large, tile=400)
    assert pixels(small).shape == (140, 180, 3)
    assert abs(pixels(small) - pixels(large)).max() <= 1  # mixing two equal numbers rounds
    again = tmp_path / "again.png"
    upscale(file, model=Grainy(), out=again, tile=40, context=4, blend=5)
    assert again.read_bytes() == small.read_bytes()
    upscale(file, model=Grainy(), out=again, seed=1, overwrite=True)
    assert abs(pixels(again) - pixels(large)).mean() > 5


def test_samples_tell_the_grain(tmp_path):
    """Two draws of independent grain s differ by 2 s / sqrt(pi) in the mean and by 2 s^2 in the mean of squares."""
    done = upscale(photo(tmp_path / "a.png"), model=Grainy(), out=tmp_path / "b.png", samples=4, **SMALL)[0]
    assert abs(done.doubt - 0.1 / math.pi**0.5) < 5e-4 and abs(done.psnr + 10 * math.log10(2 * 0.05**2)) < 0.05
    one = upscale(tmp_path / "a.png", model=Grainy(), out=tmp_path / "c.png", **SMALL)[0]
    assert one.doubt is None and (tmp_path / "c.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert pixels(done.heat).shape == (70, 90, 3)


class Nervous(Grainy):
    """Wrong by the noise within 8 pixels of a part's upper left edges, which is context and thrown away but at the picture's own edge."""

    def upscale(self, low_res, noise, run):
        made = torch.full_like(noise, 0.5)
        made[..., :16, :] += 0.3 * noise[..., :16, :]
        made[..., :16] += 0.3 * noise[..., :16]
        return made


def test_what_is_thrown_away_of_a_part_is_no_doubt(tmp_path):
    done = upscale(
        photo(tmp_path / "a.png"), model=Nervous(), out=tmp_path / "b.png", samples=3, tile=50, context=9, blend=5
    )[0]
    inside, heat = pixels(tmp_path / "b.png")[16:, 16:], pixels(done.heat)[8:, 8:]
    assert (inside == inside[0, 0]).all()
    assert (heat[..., 0] == heat[..., 1]).all() and done.doubt > 0.01  # grey inside, and red at the picture's edges


def test_a_map_that_is_missing_is_made(tmp_path):
    file, out = photo(tmp_path / "a.png"), tmp_path / "b.png"
    upscale(file, model=Grainy(), out=out, **SMALL)
    assert upscale(file, model=Grainy(), out=out, **SMALL) == []
    assert upscale(file, model=Grainy(), out=out, samples=2, **SMALL)[0].heat.exists()  # as if it had been interrupted
    assert upscale(file, model=Grainy(), out=out, samples=2, **SMALL) == []


def test_one_damaged_picture_stops_no_folder(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ac":
        photo(folder / f"{name}.png", 40, 40)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"1 of 3 pictures cannot be enlarged.*b\.png\. The others are done"):
        upscale(folder, model=Grainy(), out=tmp_path / "out", **SMALL)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    assert "b.png is damaged or cut short" in capsys.readouterr().out
    with pytest.raises(UserError, match="damaged or cut short"):
        upscale(folder / "b.png", model=Grainy(), out=tmp_path / "b.png", **SMALL)


def test_what_is_there_says_in_what_it_is_another(tmp_path, capsys):
    file, out = photo(tmp_path / "a.png", 40, 40), tmp_path / "b.png"
    upscale(file, model=Grainy(), out=out, **SMALL)
    for more, says in (({}, "already; "), ({"seed": 5}, "already, made with seed 0 instead of 5; ")):
        assert upscale(file, model=Grainy(), out=out, **SMALL, **more) == []
        assert says in capsys.readouterr().out


@pytest.mark.parametrize("k", [1, 4])
def test_tiles_start_on_the_grid_of_the_state(tmp_path, k):
    """Noise belongs to whole cells of the state, so a part that began between two would see it shifted."""
    seen = []

    class Cells(Grainy):
        scale = k

    class Watching(Upscaler):
        multiple = 8 // k

        def __call__(self, part):
            seen.append(self.corner)
            return part.repeat_interleave(k, -1).repeat_interleave(k, -2)

    upscaled(
        Watching(Cells(), 1, 1.0), photo(tmp_path / "a.png", 121, 85), tmp_path / "b.png", tile=50, context=4, blend=4
    )
    assert len(seen) > 4 and all(y % (8 // k) == 0 and x % (8 // k) == 0 for y, x in seen)


def test_a_fair_sampler_is_as_far_from_the_truth_as_from_itself():
    """On the glyphs world, whose posterior can be sampled: squared error and difference of two samples agree within 4 standard errors."""
    batch = glyphs_posterior.batch(range(600), 0)
    draws = torch.stack([glyphs_posterior.sampled(batch, k=k) for k in (0, 1)])
    error = ((draws[0] - batch.reference) ** 2).flatten(1).mean(1)
    apart = torch.stack([differences(draws[:, i], 4)[1].mean() for i in range(len(error))])
    gap = (apart - error).double()
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5
    assert apart.mean() > 20 * gap.std() / len(gap) ** 0.5  # the interval could have told


def test_every_size_is_taken(tmp_path, capsys):
    """The tiny upscaler takes even sides alone; odd ones are filled up and cut again. A folder, tones, and what is there already."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, size in enumerate([(9, 7), (21, 6)]):
        photo(folder / f"{i}.png", *size, seed=i)
    Image.fromarray(np.full((5, 5, 4), 120, np.uint8)).save(folder / "grey.png")
    model, out = str(tiny_pixel(tmp_path / "m", 3)), tmp_path / "out"
    done = upscale(folder, model=model, out=out, steps=2, samples=2, colour="adain", tile=12, context=2, blend=1)
    assert [(d.width, d.height) for d in done] == [(36, 28), (84, 24), (20, 20)]
    rows = list(csv.DictReader((out / "upscale.csv").open()))
    assert [r["file"] for r in rows] == ["0.png", "1.png", "grey.png"] and all(float(r["doubt"]) > 0 for r in rows)
    (out / "grey.png").unlink()  # as if it had been interrupted before the last
    assert [d.source.name for d in upscale(folder, model=model, out=out, steps=2, samples=2)] == ["grey.png"]
    again = list(csv.DictReader((out / "upscale.csv").open()))
    assert again[:2] == rows[:2] and again[2]["file"] == "grey.png"
    before, source = pixels(out / "0.png"), pixels(folder / "0.png")
    assert abs(before.mean((0, 1)) - source.mean((0, 1))).max() < 12
    assert upscale(folder, model=model, out=out, steps=2) == []
    assert "is there already" in capsys.readouterr().out


def test_an_adapter_and_how_much_of_it(tmp_path, monkeypatch):
    from tropism.models import lora

    model, photo_file = str(tiny_pixel(tmp_path / "m", 3)), photo(tmp_path / "a.png", 8, 8)
    trained = PixelUpscale.load(model, lora=lora.LoraSettings(rank=2))
    with torch.no_grad():
        for p in trained.trainable().values():
            p.add_(0.2)
    lora.save(trained, tmp_path / "lora")
    (tmp_path / "config.yaml").write_text(f"model: {model}\n")
    made = {}
    assert "strength" not in made_by(photo_file)
    for name, more in {"base": {"model": model}, "off": {"strength": 0.0}, "on": {}, "half": {"strength": 0.5}}.items():
        adapter = {} if name == "base" else {"adapter": tmp_path}
        upscale(photo_file, out=tmp_path / f"{name}.png", steps=2, **adapter, **more)
        made[name] = pixels(tmp_path / f"{name}.png")
    assert (made["base"] == made["off"]).all()
    told = made_by(tmp_path / "half.png")  # pictures are passed on, and no folder of this machine with them
    assert '"strength": 0.5' in told and tmp_path.name in told and str(tmp_path) not in told
    away = {n: abs(made[n] - made["base"]).mean() for n in ("half", "on")}
    assert 0 < away["half"] < away["on"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "Say which model enlarges"),
        ({"model": "shapes"}, "draws from words"),
        ({"model": Grainy(), "colour": "sepia"}, "no correction of colours 'sepia'. Give one of none, adain, wavelet"),
        ({"model": Grainy(), "out": "b.jpg"}, "Pictures are written as PNG"),
        ({"model": Grainy(), "samples": 0}, "samples"),
        ({"model": Grainy(), "tile": 20}, "Tiles of 20 px are too small"),
    ],
)
def test_mistakes(tmp_path, more, says):
    file = photo(tmp_path / "a.png")
    asked = {"out": tmp_path / "b.png", **more}
    if isinstance(asked["out"], str):
        asked["out"] = tmp_path / asked["out"]
    with pytest.raises(UserError, match=says):
        upscale(file, **asked)
    assert not (tmp_path / "b.png").exists()


def test_a_scale_that_is_no_whole_number(tmp_path):
    model = Grainy()
    model.scale = 1.5
    with pytest.raises(UserError, match="whole number"):
        Upscaler(model, 1, 1.0)(torch.rand(1, 3, 4, 4))


def test_what_a_family_alone_can_be_told_reaches_it_and_stays_with_the_adapter(tmp_path, monkeypatch):
    model = str(tiny_x4(tmp_path / "m"))
    (tmp_path / "hr").mkdir()
    for i in range(3):
        photo(tmp_path / "hr" / f"{i}.png", 32, 32, seed=i)
    how = {"pictures": tmp_path / "hr", "crop": 32, "degrade": "bicubic", "reward": bright, "updates": 1, "batch": 1}
    how |= {"options": {"steps": 2}, "evaluate_every": 0, "doctor": False}
    for wrong, says in (
        ("noise=5", "Did you mean noise_level"),
        ("noise_level", "--setting 'noise_level' is not of the form"),
    ):
        with pytest.raises(UserError, match=says):
            align("draft", model=model, out=tmp_path / "run", setting=[wrong], **how)
    done = align("draft", model=model, out=tmp_path / "run", setting=["noise_level=50"], **how)
    assert {"restored/psnr", "restored/sharpness"} <= set(done.after.columns)  # a reward that blurs is seen to
    read = []

    def stopped(*_, **given):
        read.append(given.get("settings"))
        raise InterruptedError

    monkeypatch.setattr(sys.modules["tropism.commands.upscale"], "load_model", stopped)
    for asked in ({}, {"setting": ["noise_level=7"]}):
        with pytest.raises(InterruptedError):
            upscale(photo(tmp_path / "small.png", 8, 8), adapter=tmp_path / "run", out=tmp_path / "large.png", **asked)
    assert read == [{"noise_level": 50}, {"noise_level": 7}]


def test_an_adapters_chain_is_that_of_its_run(tmp_path, monkeypatch):
    from tropism.models import lora

    model = str(tiny_pixel(tmp_path / "m", 3))
    lora.save(PixelUpscale.load(model, lora=lora.LoraSettings(rank=2)), tmp_path / "lora")
    run = {"model": model, "eta": 1.0, "scheduler": ["timestep_spacing=trailing"], "evaluate_steps": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**run, "options": {"steps": 3, "guidance": 1.0}}))
    drawn = []

    def stopped(upscaler, *_, **__):
        process = upscaler.model.process
        drawn.append((upscaler.steps, upscaler.guidance, process.eta, process.times(upscaler.steps).tolist()[0]))
        raise InterruptedError

    monkeypatch.setattr(sys.modules["tropism.commands.upscale"], "upscaled", stopped)
    for more in ({}, {"steps": 5}):
        with pytest.raises(InterruptedError):
            upscale(photo(tmp_path / "a.png", 8, 8), adapter=tmp_path, out=tmp_path / "b.png", **more)
    assert [d[0] for d in drawn] == [3, 5] and {d[1:] for d in drawn} == {(1.0, 1.0, 999)}


def test_what_would_be_lost_is_refused_and_what_was_changed_is_said(tmp_path, capsys):
    file = photo(tmp_path / "a.png", 40, 40)
    with pytest.raises(UserError, match="would be written over itself"):
        upscale(file, model=Grainy(), out=file, overwrite=True)
    for more in ({"adapter": "nowhere"}, {"strength": 0.3}, {"setting": ["noise_level=7"]}):
        with pytest.raises(UserError, match="are for a model that is named"):
            upscale(file, model=Grainy(), out=tmp_path / "b.png", **more)
    clear = Image.open(file).convert("RGBA")
    clear.putalpha(128)
    clear.save(tmp_path / "clear.png")
    upscale(tmp_path / "clear.png", model=Grainy(), out=tmp_path / "c.png", steps=1)
    assert "clear.png: " in capsys.readouterr().out
