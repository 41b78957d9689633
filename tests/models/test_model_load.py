"""Finding a model by its name, folder, hub id or file, and helpful refusals."""

import pytest
import torch
from diffusers import DiffusionPipeline

from tropism.core import Batch, UserError
from tropism.models import load
from tropism.models.lora import LoraSettings
from tropism.models.stable_diffusion import StableDiffusion

OWN = """
class Whole:
    dtype = device = process = None
    def encode(self): ...
    start = predict = x0 = decode = latents = kernel = base = trainable = encode

class Blind:
    dtype, device, process, shape = None, None, None, (3, 4, 4)
    def predict(self): ...
    start = x0 = decode = latents = kernel = base = trainable = predict

class Part:
    def predict(self): ...

class Needy(Whole):
    def __init__(self, size): ...
"""


def test_a_folder(folders):
    model = load.load_model(folders["sd1"], dtype=torch.float64, lora=LoraSettings(2), eta=0.5, height=8, width=24)
    assert isinstance(model, StableDiffusion)
    assert (model.dtype, model.lora.rank, model.process.eta, model.shape) == (torch.float64, 2, 0.5, (4, 4, 12))


def test_a_bundled_name(folders, monkeypatch):
    monkeypatch.setattr(load.weights, "path", lambda name: {"shapes/model": folders["sd1"]}[name])
    assert load.load_model("shapes").source == str(folders["sd1"])


def test_an_unknown_name():
    with pytest.raises(UserError, match="Did you mean 'shapes'"):
        load.load_model("shape")
    with pytest.raises(UserError, match="Bundled: shapes"):
        load.load_model("dall-e")


def test_a_hub_id_that_cannot_be_read(monkeypatch):
    def refuse(source):
        raise OSError(f"{source} is not cached")

    monkeypatch.setattr(DiffusionPipeline, "load_config", refuse)
    with pytest.raises(UserError, match="'org/name' could not be read: org/name is not cached"):
        load.load_model("org/name")


def test_ones_own_class(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    whole = load.load_model(f"{tmp_path}/own.py:Whole")
    assert type(whole._model).__name__ == "Whole"
    with pytest.raises(UserError, match="lacks process, x0, decode, shape"):
        load.load_model(f"{tmp_path}/own.py:Part")
    with pytest.raises(UserError, match=r"without arguments.*size"):
        load.load_model(f"{tmp_path}/own.py:Needy")
    blind = load.load_model(f"{tmp_path}/own.py:Blind")
    assert blind.encode(Batch(["a cat"])).shape == (3, 4, 4)
    with pytest.raises(UserError, match="Blind has no `encode` of its own, so it reads no picture"):
        blind.encode(Batch(["a cat"], visual=torch.zeros(1, 3, 4, 4)))
