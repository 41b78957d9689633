"""What the doctor says of memory is what the loaded model holds."""

import re

import pytest
import torch
from tiny_families import SIZE, Folders

from tropism.doctor import memory
from tropism.doctor.footprint import peak
from tropism.models.load import load_model
from tropism.models.lora import LoraSettings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("memory"))


def held(network):
    return sum(t.nbytes for t in [*network.parameters(), *network.buffers()])


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "auraflow", "chroma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_parts_are_those_of_the_loaded_model(folders, name, dtype, full):
    lora = None if full else LoraSettings()
    model = load_model(folders[name], dtype=dtype, lora=lora, full=full, height=SIZE, width=SIZE)
    parts = memory.parts_of(model)
    assert parts.denoiser[True].parameter_bytes == held(model.network)
    assert parts.denoiser[True].trainable == sum(p.numel() for p in model.trainable().values())
    assert parts.decoder[True].parameter_bytes == held(model.vae)


def test_a_vae_that_stays_wide_is_counted_so(folders):
    model = load_model(folders["sdxl"], dtype=torch.float16, height=SIZE, width=SIZE)
    assert model.vae.dtype == torch.float32
    assert memory.parts_of(model).decoder[True].parameter_bytes == held(model.vae)


def test_the_text_encoders_decide_where_they_are_larger(folders, monkeypatch):
    """Alone on the device; on a quantised base beside denoiser and decoder, which cannot step aside."""
    model, updates = load_model(folders["sd3"], height=SIZE, width=SIZE), []
    encoders = memory.text_bytes(model)
    assert encoders == sum(
        p.nbytes
        for part in (1, 2, 3)
        for p in getattr(model.texts.encoders, f"text_encoder{f'_{part}' * (part > 1)}").parameters()
    )
    monkeypatch.setattr(memory, "peak", lambda update, m: updates.append(update) or peak(update, m))
    said = memory.lines(model, 10**9, batch=2, active=2, guidance=3.0, gpu=[0.5, 24])
    assert updates[0].text_bytes == 10**9
    assert re.search("0.5 GB card: nothing with, nothing without; 24 GB card: 2 with", said[-1])
    model.options["quantize"] = "8bit"
    memory.lines(model, encoders, batch=2, active=2, guidance=3.0)
    assert updates[-1].text_bytes == encoders + held(model.network) + held(model.vae)
