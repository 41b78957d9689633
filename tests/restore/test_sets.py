"""Pictures as what an upscaler is asked for: cut, made worse, paired, trained on from the command line's function."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_upscalers import tiny_pixel

from tropism.commands import align, dial
from tropism.core import Batch, UserError
from tropism.prompts.batches import as_batch, batch_of, read_prompts
from tropism.restore.options import preset
from tropism.restore.sets import Pictures, prompts_of
from tropism.run.sources import prompts_for, with_pictures

PRESET = preset("bsrgan-lite")


class Enlarges:
    scale = 4


def saved(folder, names, size=(40, 28), seed=0):
    """Pictures of random 4 x 4 blocks (width, height) under these names."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in names:
        blocks = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(folder / name)
    return folder


def shrunk(folder, to):
    """The same pictures, a pixel a block."""
    to.mkdir()
    for file in folder.iterdir():
        Image.fromarray(np.asarray(Image.open(file))[::4, ::4]).save(to / file.name)
    return to


@pytest.fixture
def originals(tmp_path):
    return saved(tmp_path / "hr", [f"{i}.png" for i in range(6)])


def asked(prompts, crop=0, seed=0, scale=4):
    model = Enlarges()
    model.scale = scale
    return with_pictures(prompts, model, "bsrgan-lite", crop, seed)


def blocks(pictures):
    return pictures[..., ::4, ::4]


def test_parts_are_cut_at_one_place_from_both(originals, tmp_path):
    prompts = asked(prompts_of(originals, shrunk(originals, tmp_path / "lr")), crop=16)
    batch = batch_of(prompts, 6, seed=3, update=5)
    assert batch.reference.shape == (6, 3, 16, 16) and torch.equal(blocks(batch.reference), batch.low_res)
    files = [torch.tensor(np.asarray(Image.open(m["reference"]))).permute(2, 0, 1) / 255 for m in batch.meta]
    places = [
        [
            (y, x)
            for y in range(4)
            for x in range(7)
            if torch.equal(part, whole[:, 4 * y : 4 * y + 16, 4 * x : 4 * x + 16])
        ]
        for part, whole in zip(batch.reference, files, strict=True)
    ]
    assert all(len(p) == 1 for p in places) and len(set(map(tuple, places))) > 2


def test_held_out_pictures_are_cut_in_the_middle(originals, tmp_path):
    batch = as_batch(asked(prompts_of(originals, shrunk(originals, tmp_path / "lr")), crop=16))
    whole = torch.tensor(np.asarray(Image.open(batch.meta[2]["reference"]))).permute(2, 0, 1) / 255
    assert torch.equal(batch.reference[2], whole[:, 4:20, 12:28])


def test_what_comes_again_is_cut_and_made_worse_anew(originals):
    prompts = asked(prompts_of(originals), crop=8)
    first, again, later = (batch_of(prompts, 6, seed=3, update=u) for u in (0, 0, 1))
    assert torch.equal(first.low_res, again.low_res) and torch.equal(first.reference, again.reference)
    order = [[b.meta.index(m) for m in sorted(b.meta, key=lambda m: m["name"])] for b in (first, later)]
    assert (first.low_res[order[0]] != later.low_res[order[1]]).flatten(1).any(1).all()
    other = batch_of(asked(prompts_of(originals), crop=8, seed=1), 6, seed=3, update=0)
    assert (other.low_res != first.low_res).any()


def test_a_held_out_picture_is_the_same_whatever_is_beside_it(originals):
    prompts = asked(prompts_of(originals))
    every, some = as_batch(prompts), as_batch([prompts[4], prompts[1]])
    assert torch.equal(every.low_res[[4, 1]], some.low_res)
    assert torch.equal(every.low_res, as_batch(asked(prompts_of(originals), seed=7)).low_res)  # nor of which run asks
    assert (every.low_res[1] - blocks(every.reference)[1]).abs().max() > 0.05  # it was made worse


def test_rows_that_do_not_divide_are_left_out(tmp_path):
    Image.fromarray(np.arange(18 * 10 * 3, dtype=np.uint8).reshape(10, 18, 3)).save(tmp_path / "a.png")
    batch = as_batch(asked(prompts_of(tmp_path)))
    assert batch.reference.shape == (1, 3, 8, 16) and batch.low_res.shape == (1, 3, 2, 4)


def test_without_originals(originals, tmp_path):
    batch = as_batch(asked(prompts_of(None, shrunk(originals, tmp_path / "lr"))))
    assert batch.reference is None and batch.low_res.shape == (6, 3, 7, 10)


def test_a_prompt_file_names_pictures(originals, tmp_path):
    shrunk(originals, tmp_path / "lr")
    row = {"prompt": "a photo", "reference": "hr/3.png", "low_res": "lr/3.png"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    batch = as_batch(asked(read_prompts(tmp_path / "p.jsonl")))
    assert batch.prompts == ["a photo"] and batch.meta[0]["name"] == "3.png"
    assert torch.equal(blocks(batch.reference), batch.low_res)
    (tmp_path / "q.jsonl").write_text(json.dumps({**row, "low_res": "none.png"}))
    with pytest.raises(UserError, match=r"low_res picture 'none\.png'"):
        read_prompts(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("crop", "says"), [(14, "must divide by the model's scale, 4. Try --crop 16"), (32, r"40 x 28 .*less than the 32")]
)
def test_crops_that_cannot_be(originals, crop, says):
    with pytest.raises(UserError, match=says):
        as_batch(asked(prompts_of(originals), crop=crop))


def test_several_sizes_are_to_be_cut_alike(originals):
    saved(originals, ["other.png"], size=(24, 24))
    with pytest.raises(UserError, match=r"24 x 24 and 40 x 28 pixels.*--crop"):
        as_batch(asked(prompts_of(originals)))


def test_models_and_pictures_that_do_not_go_together(originals, tmp_path):
    with pytest.raises(UserError, match="draws from words"):
        with_pictures(prompts_of(None, originals), object())
    words = [replace(p, meta=()) for p in prompts_of(originals)]
    with pytest.raises(UserError, match="there are none to enlarge"):
        with_pictures(words, Enlarges())
    with pytest.raises(UserError, match="two ways"):
        align(
            "draft", model=str(tiny_pixel(tmp_path / "m")), reward=likeness, prompts=["a"], pictures=originals, out="x"
        )


def likeness(images, batch):
    return -((images - batch.reference) ** 2).flatten(1).mean(1)


def test_an_upscaler_is_trained_on_a_folder(tmp_path):
    pictures = saved(tmp_path / "hr", [f"p{i}.png" for i in range(10)], size=(16, 16))
    settings = {
        "updates": 2,
        "batch": 3,
        "evaluate_every": 0,
        "crop": 16,
        "degrade": "bicubic",
        "options": {"steps": 2},
    }
    run = align(
        "draft",
        model=str(tiny_pixel(tmp_path / "m", 3)),
        reward=likeness,
        pictures=pictures,
        out=tmp_path / "r",
        **settings,
    )
    assert run.after.prompts == ["p9.png"] and run.after.images.shape == (1, 3, 16, 16)
    assert run.reload_difference < 1e-5
    assert "tropism upscale photo.png --adapter ." in (tmp_path / "r/README.md").read_text()
    page = (tmp_path / "r/report.html").read_text()
    assert "Pictures: before, after, low resolution and original" in page
    shown = re.search(r'alt="original" src="data:image/png;base64,([^"]+)"', page)
    assert shown and page.count('alt="low resolution"') == 1
    original = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[1]))), dtype=float)
    whole = np.asarray(Image.open(pictures / "p9.png").convert("RGB"), dtype=float)  # 16 x 16, so the crop is all of it
    assert np.abs(original - whole).max() <= 1
    dialled = dial([str(tmp_path / "r")], out=tmp_path / "dial", reward=likeness, quick=True, at=(0.0, 1.0))
    assert dialled is not None
    config = (tmp_path / "r/config.yaml").read_text()
    assert "crop: 16" in config and "degrade: bicubic" in config


@pytest.mark.parametrize("crop", [0, 16])
def test_low_resolution_pictures_of_another_scale_are_named(tmp_path, crop):
    large, small = saved(tmp_path / "hr", ["a.png"], (64, 32)), saved(tmp_path / "lr", ["a.png"], (32, 16))
    prompts = with_pictures(prompts_of(large, small), Enlarges(), crop=crop)
    with pytest.raises(
        UserError, match=r"has 32 x 16 pixels and its original a\.png 64 x 32.*so 16 x 8 pixels belong to it"
    ):
        as_batch(prompts)


def test_held_out_pictures_are_enlarged_from_what_training_is(originals, tmp_path):
    given = {
        "pictures": originals,
        "low_res": shrunk(originals, tmp_path / "lr"),
        "prompts": None,
        "held_out": originals,
        "seed": 0,
    }
    with pytest.raises(UserError, match="made by --degrade: they would not compare"):
        prompts_for(given, "a model", Enlarges())


def test_a_batch_is_filled_by_meta_alone(originals):
    file = str(next(originals.iterdir()))
    one = Pictures(4, replace(PRESET, scale=4))(Batch(["a"], meta=[{"reference": file}], index=(7,)))
    two = Pictures(4, replace(PRESET, scale=4))(Batch(["b"], meta=[{"reference": file}], index=(9,)))
    assert torch.equal(one.low_res, two.low_res)
