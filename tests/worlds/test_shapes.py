"""The shapes world: prompts, pictures, and a parser that is right or says nothing."""

import io
from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image

from tropism.worlds import shapes, taste
from tropism.worlds.shapes import BACKGROUNDS, COLOURS, Scene


def test_two_thousand_prompts_and_a_held_out_tenth():
    every = shapes.scenes()
    prompts = {s.prompt for s in every}
    train, held = shapes.scenes(False), shapes.scenes(True)
    assert len(prompts) == len(every) == 2000
    assert len(train) + len(held) == 2000
    assert 150 < len(held) < 250
    for attribute in ("count", "shape", "colour", "background"):
        assert {getattr(s, attribute) for s in train} == {getattr(s, attribute) for s in every}


def test_prompts_read_back():
    assert all(shapes.parse_prompt(s.prompt) == s for s in shapes.scenes())
    assert Scene(2, "cross", "red", "sand").prompt == "two red crosses on sand"


def test_neighbours_differ_in_one_attribute():
    own = astuple(shapes.parse_prompt("three red circles on sand"))
    groups = shapes.neighbours("three red circles on sand")
    assert [len(set(g)) for g in groups] == [4, 4, 7, 9]
    for i, group in enumerate(groups):
        for other in map(astuple, map(shapes.parse_prompt, group)):
            assert [k for k in range(4) if other[k] != own[k]] == [i]


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "three red circles on mars", "six red circles on sand", "two pink stars on sky"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="three red circles on sand"):
        shapes.parse_prompt(prompt)


@pytest.mark.parametrize("texture", [*shapes.TEXTURES, "flat"])
def test_the_parser_reads_every_clean_render(texture):
    chosen = shapes.scenes()[::7]
    right = shapes.accuracy(shapes.pictures(chosen, 5, texture), [s.prompt for s in chosen])
    assert {k: v.mean().item() for k, v in right.items()} == dict.fromkeys(right, 1.0)


def test_a_wrong_prompt_is_wrong():
    right = shapes.accuracy(shapes.pictures([Scene(3, "circle", "red", "sand")], 0), ["two blue circles on sky"])
    assert {k: v.item() for k, v in right.items()} == {"count": 0, "shape": 1, "colour": 0, "background": 0, "all": 0}


def test_unreadable_rather_than_a_guess():
    ground = torch.tensor(BACKGROUNDS["sand"]).float().reshape(3, 1, 1).expand(3, 64, 64) / 255
    assert shapes.read(ground[None])[0] == Scene(None, None, None, "sand")
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert shapes.read(noise)[0].shape is None
    blob = ground.clone()
    blob[:, 20:28, 8:56] = torch.tensor(COLOURS["blue"]).float().reshape(3, 1, 1) / 255  # a bar is none of the shapes
    assert shapes.read(blob[None])[0] == Scene(1, None, "blue", "sand")
    blob[:, 40:52, 10:22] = torch.tensor(COLOURS["red"]).float().reshape(3, 1, 1) / 255
    assert shapes.read(blob[None])[0].colour is None


def test_a_grey_background_is_unreadable():
    assert shapes.read(torch.full((1, 3, 64, 64), 0.95))[0].background is None


def size(picture):
    buffer = io.BytesIO()
    Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue())


def test_texture_is_at_least_half_of_the_bytes_above_flat():
    chosen = shapes.scenes()[::40]
    textured, flat = (np.mean([size(p) for p in shapes.pictures(chosen, 1, t)]) for t in (None, "flat"))
    empty = size(torch.full((3, 64, 64), 0.5))
    assert empty == pytest.approx(690, abs=30)
    assert (textured - flat) / (textured - empty) >= 0.49


def test_centres_lie_inside_their_objects():
    chosen = shapes.scenes()[::200]
    for picture, where, scene in zip(shapes.pictures(chosen, 2, None), shapes.centres(chosen, 2), chosen, strict=True):
        assert len(where) == scene.count
        for x, y in where.tolist():
            assert (picture[:, int(y), int(x)] * 255 - torch.tensor(COLOURS[scene.colour])).abs().max() < 40


def test_the_hidden_taste_peaks_where_it_says():
    """Closed form: 0 at warmth 0.20 and brightness 0.66, -1/2 one width away, falling on both sides."""

    def flat(warmth, brightness):
        green = brightness - (0.299 - 0.114) * warmth / 2  # red = g + w/2, blue = g - w/2
        return torch.tensor([green + warmth / 2, green, green - warmth / 2]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)

    assert taste.gold(flat(0.20, 0.66)).item() == pytest.approx(0, abs=1e-6)
    assert taste.gold(flat(0.42, 0.66)).item() == pytest.approx(-0.5, abs=1e-5)
    assert taste.gold(flat(0.20, 0.50)).item() == pytest.approx(-0.5, abs=1e-5)


def test_votes_follow_the_rule_with_noise():
    pictures = shapes.pictures(shapes.scenes()[::7], 3)
    rng = np.random.default_rng(0)
    pairs = torch.from_numpy(rng.integers(len(pictures), size=(4000, 2)))
    gold, chosen = taste.gold(pictures), taste.votes(pictures, pairs, rng)
    agree = (chosen == (gold[pairs[:, 0]] > gold[pairs[:, 1]])).float().mean()
    assert 0.6 < agree < 0.95
