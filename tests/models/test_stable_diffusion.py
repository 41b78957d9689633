"""Stable Diffusion against its own pipeline, its text, its sizes, and bad folders."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import TOKENS, tiny_pipeline

from tropism.core import Batch, Draw, UserError
from tropism.models.stable_diffusion import StableDiffusion

PROMPTS = ["red cat", "a cat on mars"]


@torch.no_grad()
def sampled(model, x, prompts, steps, guidance):
    cond, times = model.encode(Batch(prompts)), model.process.times(steps).tolist()
    for t, s in pairwise(times):
        x = model.kernel(x, t, s, cond, guidance)[0].mean
    return x


def copied(folder, to, part="scheduler/scheduler_config.json", **change):
    """A copy of a pipeline folder with keys of one JSON file changed; None removes a key."""
    shutil.copytree(folder, to)
    values = json.loads((to / part).read_text()) | change
    (to / part).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return to


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_equals_the_pipeline(folders, kind, guidance):
    model = StableDiffusion.load(folders[kind])
    pipe = StableDiffusionPipeline.from_pretrained(folders[kind])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    x = Draw(1, 0, (0, 1))(0, 0, model.shape)
    call = {"latents": x, "num_inference_steps": 10, "guidance_scale": guidance}
    theirs = pipe(PROMPTS, **call, output_type="latent").images
    ours = sampled(model, x, PROMPTS, 10, guidance)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    drawn = torch.from_numpy(pipe(PROMPTS, **call, output_type="np").images)
    torch.testing.assert_close(model.decode(ours).detach(), drawn.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_never_clips(folders, tmp_path):
    """Without the key, DDIM's own default is to clip x_0 to [-1, 1], and a clamp silently zeroes gradients."""
    folder = copied(folders["sd2"], tmp_path / "m", clip_sample=None)
    model = StableDiffusion.load(folder, dtype=torch.float64)
    plain = StableDiffusion.load(folders["sd2"], dtype=torch.float64)
    x = 3 * Draw(1, 0, (0, 1))(0, 0, model.shape).double()
    ours = sampled(model, x, PROMPTS, 5, 3.0)
    assert torch.equal(ours, sampled(plain, x, PROMPTS, 5, 3.0))
    assert ours.abs().max() > 1.5
    assert DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config.clip_sample


def test_old_step_offset_is_read_as_the_pipeline_reads_it(folders, tmp_path):
    folder = copied(folders["sd1"], tmp_path / "m", steps_offset=0)
    assert StableDiffusion.load(folder).process.times(50)[-2] == 1


def test_each_text_is_embedded_once(folders):
    model = StableDiffusion.load(folders["sd1"])
    seen = []
    model.texts.encoders.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    first = model.encode(Batch(["red", "cat", "red"]))
    second = model.encode(Batch(["cat", "red"], negative_prompts=["", "red"]))
    assert len(seen) == 3
    assert torch.equal(first.positive["text"][:2], second.positive["text"][[1, 0]])
    assert torch.equal(second.negative["text"][1], second.positive["text"][1])
    assert not first.positive["text"].requires_grad


def test_prompts_over_the_limit_are_named(folders):
    model = StableDiffusion.load(folders["sd1"])
    long = "cat " * TOKENS
    assert model.too_long(["red cat", long, "cat " * (TOKENS - 2)]) == [long]
    assert model.encode(Batch([long])).positive["text"].shape[1] == TOKENS


def test_size(folders):
    model = StableDiffusion.load(folders["sd1"], height=24, width=32)
    cond = model.encode(Batch(["red"]))
    assert cond.shape == (4, 12, 16)
    assert model.decode(torch.zeros(1, *cond.shape)).shape == (1, 3, 24, 32)
    assert model.predict(torch.zeros(1, *cond.shape), 1, cond, 2.0).shape == (1, 4, 12, 16)
    with pytest.raises(UserError, match="multiple of 2"):
        StableDiffusion.load(folders["sd1"], height=17)


def test_decode_of_latents(folders):
    model = StableDiffusion.load(folders["sd1"], dtype=torch.float64)
    pictures = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    expected = model.vae.encode(2 * pictures - 1).latent_dist.mean * 0.18215
    assert torch.equal(model.latents(pictures), expected)
    assert torch.autograd.grad(model.latents(pictures).sum(), pictures)[0].abs().max() > 0


def test_pickles_are_refused(folders, tmp_path):
    folder = copied(folders["sd1"], tmp_path / "m")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="pickle"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}), "could not be read: sigmoid"),
        (("scheduler/scheduler_config.json", {"prediction_type": "flow"}), "prediction_type is 'flow'"),
        (("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}), "is a StableDiffusionXLPipeline"),
    ],
)
def test_foreign_folders(folders, tmp_path, change, message):
    part, values = change
    folder = copied(folders["sd1"], tmp_path / "m", part)
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UserError, match=message):
        StableDiffusion.load(folder)


def test_not_a_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        StableDiffusion.load(tmp_path)


def test_tiny_pipeline_is_reproducible(folders, tmp_path):
    again = tiny_pipeline(tmp_path / "m")
    for file in again.rglob("*.safetensors"):
        assert file.read_bytes() == (folders["sd1"] / file.relative_to(again)).read_bytes()
