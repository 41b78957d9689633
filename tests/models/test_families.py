"""Each family against its own diffusers pipeline, its adapters in that pipeline, and what it cannot do."""

import json
import shutil
from itertools import pairwise

import diffusers
import pytest
import torch
from tiny_families import BUILDERS, SIZE

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, UserError
from tropism.models import lora
from tropism.models.load import load_model
from tropism.models.lora import LoraSettings

PROMPTS = ["red cat", "a cat on mars"]
FAMILIES = [name for name in BUILDERS if name not in ("sd1", "sd2")]  # these two in test_stable_diffusion.py
DISTILLED = ("flux", "schnell")
SIZED = {"height": SIZE, "width": SIZE}
ADAPTER = LoraSettings(rank=3, alpha=7)


def pipeline(folder, name):
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_without_t5" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **left_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, x, guidance, output="latent", negative=None, size=(SIZE, SIZE)):
    """The pipeline's own latents (B, C, h, w) or pictures (B, H, W, 3)."""
    packed = isinstance(pipe, diffusers.FluxPipeline | diffusers.ChromaPipeline)
    start = pipe._pack_latents(x.clone(), len(x), *x.shape[1:]) if packed else x.clone()
    own = {"negative_prompt": negative} if negative else {}
    own |= dict(zip(("height", "width"), size, strict=True))
    call = {"num_inference_steps": 10, "guidance_scale": guidance, "output_type": output, **own}
    out = pipe(PROMPTS, latents=start, **call).images
    return pipe._unpack_latents(out, *size, 2) if packed and output == "latent" else out


def noise(model):
    return Draw(1, 0, (0, 1))(0, 0, model.shape)


@torch.no_grad()
def chain(model, x, guidance, negative=None):
    cond = model.encode(Batch(PROMPTS, negative_prompts=negative))
    times = model.process.times(10, model.shape).tolist()
    for t, s in pairwise(times):
        x = model.kernel(x, t, s, cond, guidance)[0].mean
    return x


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equals_the_pipeline_with_its_own_scheduler(folders, name, guidance):
    if name == "schnell" and guidance != 1:
        return
    model, pipe = load_model(folders[name], **SIZED), pipeline(folders[name], name)
    ours = chain(model, noise(model), guidance)
    torch.testing.assert_close(ours, drawn(pipe, noise(model), guidance), rtol=1e-4, atol=1e-4)
    pictures = torch.from_numpy(drawn(pipe, noise(model), guidance, "np")).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.decode(ours).detach(), pictures, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_portrait_is_the_pipelines(folders, name):
    model, pipe = load_model(folders[name], height=24, width=SIZE), pipeline(folders[name], name)
    guidance = 1.0 if name == "schnell" else 4.0
    theirs = drawn(pipe, noise(model), guidance, size=(24, SIZE))
    torch.testing.assert_close(chain(model, noise(model), guidance), theirs, rtol=1e-4, atol=1e-4)


def test_a_missing_negative_prompt_is_what_the_pipeline_says_it_is(folders, tmp_path):
    folder = tmp_path / "sdxl"
    shutil.copytree(folders["sdxl"], folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    model, pipe = load_model(folder, **SIZED), pipeline(folder, "sdxl")
    ours = chain(model, noise(model), 4.0)
    torch.testing.assert_close(ours, drawn(pipe, noise(model), 4.0), rtol=1e-4, atol=1e-4)
    assert (ours - chain(load_model(folders["sdxl"], **SIZED), noise(model), 4.0)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DISTILLED])
def test_negative_prompts_are_the_pipelines(folders, name):
    model, pipe = load_model(folders[name], **SIZED), pipeline(folders[name], name)
    ours = chain(model, noise(model), 4.0, ["mars", "on"])
    torch.testing.assert_close(ours, drawn(pipe, noise(model), 4.0, negative=["mars", "on"]), rtol=1e-4, atol=1e-4)
    assert (ours - chain(model, noise(model), 4.0)).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_reloads_in_the_plain_pipeline_exactly(folders, name, tmp_path):
    """The file as diffusers itself reads it gives the very same latents; and `verify` finds a difference of 0."""
    model = load_model(folders[name], lora=ADAPTER, **SIZED)
    base = chain(model, noise(model), 1.0)
    with torch.no_grad():
        for i, p in enumerate(model.trainable().values()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    lora.save(model, tmp_path)
    assert lora.verify(model, tmp_path, prompts=PROMPTS, guidance=1.0) == 0
    pipe = pipeline(folders[name], name)
    plain = drawn(pipe, noise(model), 1.0)
    pipe.load_lora_weights(tmp_path)
    adapted = drawn(pipe, noise(model), 1.0)
    mine = chain(model, noise(model), 1.0)
    torch.testing.assert_close(mine, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01
    assert (mine - base).abs().max() > 0.01
    fresh = load_model(folders[name], lora=ADAPTER, **SIZED)
    lora.load(fresh, tmp_path)
    assert torch.equal(chain(fresh, noise(model), 1.0), mine)


def test_an_adapter_of_another_family(folders, tmp_path):
    flux = load_model(folders["flux"], lora=ADAPTER, **SIZED)
    lora.save(flux, tmp_path)
    with pytest.raises(UserError, match=r"does not fit.*missing.*unexpected"):
        lora.load(load_model(folders["sd3"], lora=ADAPTER), tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_odd_sizes(folders, name):
    with pytest.raises(UserError, match=r"18x17 is not a multiple of \d.*--height 1[68] --width"):
        load_model(folders[name], height=18, width=17)
    model = load_model(folders[name], height=24, width=SIZE)
    out = sample(model, Batch(PROMPTS[:1]), Draw(0, 0, (0,)), steps=2, guidance=1.0)
    assert out.shape == (1, 3, 24, SIZE)


@pytest.mark.parametrize("name", ["sd3", "auraflow"])
def test_a_size_beyond_the_table_of_places(folders, name):
    with pytest.raises(UserError, match=r"512x16 is beyond.*limit is 64 pixels a side. Try --height 64 --width 16"):
        load_model(folders[name], height=512, width=16)
    model = load_model(folders[name], height=64, width=16)
    assert sample(model, Batch(PROMPTS[:1]), Draw(0, 0, (0,)), steps=1, guidance=1.0).shape == (1, 3, 64, 16)


def test_guidance_and_negatives_on_distilled_models(folders):
    dev, schnell = (load_model(folders[name], **SIZED) for name in ("flux", "schnell"))
    dev.check_request(3.5)
    schnell.check_request(1)
    assert (schnell.steps, schnell.guidance, dev.guidance) == (4, 1.0, 3.5)
    with pytest.raises(UserError, match=r"guidance is 3\.5.*distilled.*--guidance 1"):
        schnell.check_request(3.5)
    with pytest.raises(UserError, match="no place for a negative prompt"):
        dev.check_request(3.5, ["", "blur"])


def test_t5_is_optional_where_the_pipeline_allows(folders):
    without, never_had = load_model(folders["sd3"], t5=False), load_model(folders["sd3_without_t5"])
    assert without.texts.encoders.text_encoder_3 is None
    text = without.encode(Batch(PROMPTS)).positive["text"]
    assert torch.equal(text, never_had.encode(Batch(PROMPTS)).positive["text"])
    assert not torch.equal(text, load_model(folders["sd3"]).encode(Batch(PROMPTS)).positive["text"])
    with pytest.raises(UserError, match="FluxPipeline needs all of its text encoders"):
        load_model(folders["flux"], t5=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_are_freed_and_read_again(folders, name):
    model, other = load_model(folders[name], **SIZED), load_model(folders[name], **SIZED)
    assert model.prepare(PROMPTS)
    assert model.texts._pipe is None
    mine, theirs = model.encode(Batch(PROMPTS)), other.encode(Batch(PROMPTS))
    assert all(torch.equal(mine.positive[k], v) for k, v in theirs.positive.items())
    assert model.texts._pipe is None
    model.encode(Batch(["a dog"]))
    read = model.texts.encoders
    model.encode(Batch(["a fox"]))
    assert model.texts.encoders is read  # once, not at every text


def test_the_text_encoders_have_the_device_to_themselves(folders, monkeypatch):
    """cpu:0 stands for an accelerator: the same memory, another name."""
    model, moved = load_model(folders["sd3"], lora=ADAPTER), []
    model.device = model._where = torch.device("cpu:0")
    original = torch.nn.Module.to
    parts = {id(model.network): "denoiser", id(model.vae): "decoder"}

    def to(module, device, *rest):
        moved.append((parts.get(id(module), "encoder"), str(device)))
        return original(module, device, *rest)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    weights = {n: id(p) for n, p in model.trainable().items()}
    cond = model.encode(Batch(PROMPTS))
    assert moved[:2] == [("denoiser", "cpu"), ("decoder", "cpu")]
    assert {what for what, _ in moved[2:]} == {"encoder"}
    moved.clear()
    model.predict(noise(model), 0.5, cond, 1.0)
    assert moved == [("denoiser", "cpu:0"), ("decoder", "cpu:0")]
    moved.clear()
    assert model.prepare(PROMPTS)
    model.encode(Batch(["a dog"]))
    assert moved[:2] == [("denoiser", "cpu"), ("decoder", "cpu")], "the encoders were freed and are read again"
    moved.clear()
    assert {n: id(p) for n, p in model.trainable().items()} == weights, "an optimiser would hold other parameters"
    assert moved == [("denoiser", "cpu:0"), ("decoder", "cpu:0")]


def test_judging_an_adapter_never_holds_two_denoisers(folders, tmp_path, monkeypatch):
    model = load_model(folders["sd3"], lora=ADAPTER)
    lora.save(model, tmp_path)
    model.device = model._where = torch.device("cpu:0")
    seen, original = [], type(model).reloaded
    monkeypatch.setattr(type(model), "reloaded", lambda m, folder: seen.append(str(m._where)) or original(m, folder))
    assert lora.verify(model, tmp_path, prompts=PROMPTS) == 0
    assert seen == ["cpu"] and str(model._where) == "cpu:0"


def test_what_is_quantised_stays_where_it_is(folders):
    model = load_model(folders["sd3"])
    model._where, model.options["quantize"] = torch.device("cpu:0"), "8bit"
    model.place(torch.device("cpu"))
    assert str(model._where) == "cpu:0"


def test_encoders_stay_where_the_embeddings_would_not_fit(folders, monkeypatch):
    monkeypatch.setattr("tropism.models.text.ROOM", 300_000)
    model = load_model(folders["flux"], **SIZED)
    assert not model.prepare([f"cat {i}" for i in range(20)])
    assert model.encode(Batch([f"cat {i}" for i in range(20)])).positive["text"].shape[0] == 20
    assert len(model.texts._kept) < 20


def test_a_vae_that_overflows_in_half_precision_stays_wide(folders):
    half, whole = load_model(folders["sdxl"], dtype=torch.float16), load_model(folders["sdxl"])
    assert (half.vae.dtype, half.network.dtype, half.dtype) == (torch.float32, torch.float16, torch.float16)
    x = noise(whole)
    torch.testing.assert_close(half.decode(x), whole.decode(x), rtol=0, atol=2e-3)  # its file was rounded, no more


def test_scheduler_keys_for_few_step_variants(folders):
    few = load_model(folders["sdxl"], scheduler={"timestep_spacing": "trailing"})
    assert few.process.times(4)[:2].tolist() == [999, 749]
    assert load_model(folders["sd3"], scheduler={"shift": 6.0}).process.shift == 6
    with pytest.raises(UserError, match=r"no 'timestep_spacin'. Did you mean timestep_spacing"):
        load_model(folders["sdxl"], scheduler={"timestep_spacin": "trailing"})


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("sd3", {"shift": -3}, "time shift is -3; it must be positive"),
        ("sd3", {"shift": 0}, "time shift is 0"),
        ("sd3", {"shift": float("nan")}, "shift is nan; it must be a number"),
        ("sd3", {"shift": "abc"}, "shift=abc is a word; shift is a number"),
        ("sd3", {"num_train_timesteps": -5}, "num_train_timesteps is -5"),
        ("sd3", {"num_train_timesteps": 2.5}, "num_train_timesteps is 2.5"),
        ("sd3", {"shift_terminal": 1.5}, r"shift_terminal\) is 1.5; it must lie in \[0, 1\)"),
        ("sd3", {"use_dynamic_shifting": "maybe"}, "is a word; use_dynamic_shifting is true or false"),
        ("flux", {"base_image_seq_len": 4096}, "are both 4096"),
        ("flux", {"base_shift": 1e6}, "time shift is .* tokens; it must be positive and ordinary"),
        ("flux", {"time_shift_type": "linear", "base_shift": -9, "max_shift": 9}, "time shift is -10.125"),
        ("sdxl", {"beta_start": "foo"}, "beta_start is a number"),
        ("sdxl", {"beta_start": 1.5}, "betas reach from .* must lie between 0 and 1"),
        ("sdxl", {"steps_offset": -1}, "steps_offset is -1"),
        ("sdxl", {"steps_offset": 5000}, "times do not fall from step to step: 999, 999"),
        ("sd3", {"stochastic_sampling": True}, "stochastic_sampling"),
        ("flux", {"base_shift": -100}, "time shift is .* positive and ordinary"),
        ("sdxl", {"timestep_spacing": "odd"}, "timestep_spacing is 'odd'"),
        ("sdxl", {"trained_betas": 3}, "trained_betas"),
    ],
)
def test_scheduler_values_that_cannot_be(folders, name, change, says):
    with pytest.raises(UserError, match=says):
        load_model(folders[name], scheduler=change, **SIZED).process.times(2, (4, 8, 8))


def test_a_scheduler_that_has_no_formula_is_overridden_in_the_reload_too(folders, tmp_path):
    folder = tmp_path / "beta"
    shutil.copytree(folders["sd3"], folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_beta_sigmas": True}))
    with pytest.raises(UserError, match="--scheduler use_beta_sigmas=false"):
        load_model(folder)
    model = load_model(folder, lora=ADAPTER, scheduler={"use_beta_sigmas": False})
    lora.save(model, tmp_path / "adapter")
    assert lora.verify(model, tmp_path / "adapter") == 0


def test_quantised_bases_need_the_library(folders, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*tropism\[quantize\]"):
        load_model(folders["sd3"], quantize="4bit")
    with pytest.raises(UserError, match="quantize is '3bit'"):
        load_model(folders["sd3"], quantize="3bit")
