"""Every tower sees what transformers' own forward passes see."""

import json

import pytest
import torch
from tiny_detector import tiny_dino
from tiny_towers import MODELS
from transformers import CLIPModel, SiglipModel

from tropism.core import UserError
from tropism.rewards import pixels
from tropism.rewards.towers import HALF, IMAGENET, Tower, layer_of, tower_of


@pytest.fixture
def seen():
    return torch.randn(2, 3, 56, 112, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_layers_are_those_of_transformers(family, seen):
    """A size that is not the model's own, and not square: position embeddings are interpolated."""
    model = MODELS[family]()
    options = {"interpolate_pos_encoding": True} if family in ("clip", "siglip") else {}
    theirs = model(pixel_values=seen, output_hidden_states=True, **options)
    raw, ours = Tower(model, raw=True)(seen), Tower(model)(seen)
    leading = {"dinov2": 1, "registers": 5, "clip": 1, "siglip": 0}[family]
    grid = tuple(n // model.config.patch_size for n in (56, 112))
    as_tokens = lambda layer: layer.map.flatten(2).transpose(1, 2)
    assert len(raw) == len(ours) == 2
    assert ours[1].map.shape == (2, 32, *grid)
    torch.testing.assert_close(as_tokens(raw[0]), theirs.hidden_states[1][:, leading:], rtol=0, atol=0)
    if family == "clip":  # its last_hidden_state is not normalised, its pooler_output is
        torch.testing.assert_close(as_tokens(raw[1]), theirs.last_hidden_state[:, leading:], rtol=0, atol=0)
    else:
        torch.testing.assert_close(as_tokens(ours[1]), theirs.last_hidden_state[:, leading:], rtol=0, atol=0)
    torch.testing.assert_close(ours[1].summary, theirs.pooler_output, rtol=0, atol=0)
    assert (ours[0].summary is None) == (family == "siglip")
    assert (as_tokens(raw[1]) - as_tokens(ours[1])).abs().max() > 0.1, "the norm does something"
    fresh = MODELS[family]()
    Tower(fresh)(seen)
    assert not any(m._forward_hooks for m in fresh.modules()), "nothing is left behind"


@torch.no_grad()
@pytest.mark.parametrize(("family", "whole"), [("clip", CLIPModel), ("siglip", SiglipModel)])
def test_the_tower_of_a_whole_model(family, whole, clip, seen, tmp_path):
    """A folder of a CLIP or SigLIP with its text half gives the tower that its vision half alone gives."""
    from tiny_siglip import tiny_siglip

    model = clip.frozen.module if family == "clip" else tiny_siglip()[0]
    model.save_pretrained(tmp_path)
    tower = tower_of(str(tmp_path))
    assert tower.size == 448 and tower.patch == 8
    assert (tower.mean, tower.std) == ((pixels.MEAN, pixels.STD) if family == "clip" else HALF)
    theirs = model.vision_model(pixel_values=seen, interpolate_pos_encoding=True)
    torch.testing.assert_close(tower(seen)[1].summary, theirs.pooler_output, rtol=0, atol=0)


def test_a_preprocessor_file_has_the_last_word(tmp_path):
    tiny_dino().save_pretrained(tmp_path)
    assert (tower_of(str(tmp_path)).mean, tower_of(str(tmp_path)).std) == IMAGENET
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "size": 224}))
    tower = tower_of(str(tmp_path), size=518)
    assert (tower.mean, tower.std, tower.size) == ((0.1, 0.2, 0.3), (1, 2, 3), 518)
    file.write_text(json.dumps({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}))
    assert (tower_of(str(tmp_path)).mean, tower_of(str(tmp_path)).std) == ((0.0,) * 3, (1.0,) * 3)


def test_what_is_no_tower(tmp_path):
    tiny_dino().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"size of 450 is no multiple of the 14 pixels.*Take 448 or 462"):
        tower_of(str(tmp_path), size=450)
    with pytest.raises(UserError, match=r"size of 0 is no multiple.*Take 14 or 28"):
        tower_of(str(tmp_path), size=0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"holds no vision tower: its model_type is 'bert'.*dinov2 or"):
        tower_of(str(tmp_path))
    with pytest.raises(UserError, match=r"shapes \[\(2, 5, 8\)\]; it must be a map \(B, C, height, width\)"):
        layer_of(torch.zeros(2, 5, 8))
