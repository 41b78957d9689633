"""`tropism pretrain shapes`: the bundled generator, trained from nothing on two CPU cores: the VAE, then U-Net and text encoder.

Every stage checkpoints into OUT/.train and goes on where it stopped; the finished model is an ordinary diffusers folder in
OUT/model, and `pretrain_rewards` adds the reward networks beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.run import pictures as drawings
from tropism.run.pretrain_loop import Lengths, drawn, rows_of, train
from tropism.worlds import shapes


def _grounds(chosen: list[shapes.Scene]) -> Tensor:
    """The background colours (n, 3, 1, 1) in [0, 1] of scenes."""
    return torch.tensor([shapes.BACKGROUNDS[str(s.background)] for s in chosen]).float()[:, :, None, None] / 255


def _objects(pictures: Tensor, ground: Tensor) -> Tensor:
    """Which pixels of pictures (B, 3, H, W) are no background: (B, 1, H, W), 0 or 1."""
    return ((pictures - ground).norm(dim=1, keepdim=True) > 0.24).float()


# ---------------------------------------------------------------------------------------------------- VAE


def new_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    make: Any = AutoencoderKL  # its annotations are too narrow
    return make(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=shapes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(folder: Path, updates: int, n: int, batch: int = 16):
    """AutoencoderKL at 16x16x4, reconstruction L1 + L2 with objects weighted five times, a light KL term."""
    torch.manual_seed(0)
    vae = new_vae()
    pictures, chosen = drawn(folder, n, 1)
    grounds = _grounds(chosen)

    def loss(update: int) -> Tensor:
        rows, rng = rows_of(len(pictures), batch, 11, update)
        x = pictures[rows].float() / 255
        weight = 1 + 4 * _objects(x, grounds[rows])
        if rng.random() < 0.5:
            x, weight = x.flip(3), weight.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(2 * x - 1).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32))
            error = vae.decode(mean + std * noise).sample.float() - (2 * x - 1)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return (weight * (error.abs() + 2 * error**2)).mean() + 3e-4 * kl

    def samples() -> Image:
        x = pictures[:16].float() / 255
        again = (vae.decode(vae.encode(2 * x - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        cells = list(zip(x, again, strict=True))
        return drawings.grid(cells, [s.prompt for s in chosen[:16]], [""] * 16, heads=("picture", "through the VAE"))

    return train("vae", vae, loss, folder, updates=updates, lr=2e-3, ema=0.995, every=50, samples=samples)


# ---------------------------------------------------------------------------------------------------- text and U-Net


def new_tokenizer(folder: Path, known: Sequence[str] = ()):
    """A CLIP tokenizer whose vocabulary is the bytes and some words (default: of this world); writes vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = sorted(set(known) or {w for s in shapes.scenes() for w in s.prompt.split()})
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for n in range(1, len(parts)):
            pair = ("".join(parts[:n]), parts[n])
            merges += [pair] if pair not in merges else []
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def new_text_encoder(tokenizer, width: int = 96):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(width: int = 96):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shapes.SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_scheduler():
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def tokens(tokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids


@torch.no_grad()
def encoded(folder: Path, vae, n: int, seed: int) -> tuple[Tensor, list[shapes.Scene]]:
    """Latent means (2n, 4, 16, 16) of n pictures and of their mirror images, unscaled, cached; and the n scenes."""
    pictures, chosen = drawn(folder, n, seed)
    file = folder / f"latents-{seed}-{n}.safetensors"
    if not file.exists():
        both = [2 * p.float() / 255 - 1 for p in pictures.split(100)]
        means = [vae.encode(x.flip(3) if flip else x).latent_dist.mean for flip in (False, True) for x in both]
        save_file({"latents": torch.cat(means).contiguous()}, file)
    return load_file(file)["latents"], chosen


def train_denoiser(folder: Path, vae, updates: int, n: int, batch: int = 64):
    """The U-Net and its text encoder together: v-prediction at uniform times, prompts dropped one time in ten.

    Latents on and beside objects weigh four times: most of the loss is texture that nobody can predict.
    """
    torch.manual_seed(1)
    tokenizer = new_tokenizer(folder / "tokenizer")
    both = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokenizer)})
    latents, chosen = encoded(folder, vae, n, 2)
    scale = 1 / latents.std().item()
    ids, empty = tokens(tokenizer, [s.prompt for s in chosen]), tokens(tokenizer, [""])
    bars, pictures, grounds = new_scheduler().alphas_cumprod, drawn(folder, n, 2)[0], _grounds(chosen)

    def loss(update: int) -> Tensor:
        rows, rng = rows_of(len(latents), batch, 12, update)
        t = torch.from_numpy((np.arange(batch) + rng.random(batch)) * 1000 / batch).long()
        noise = torch.from_numpy(rng.standard_normal((batch, *latents.shape[1:]), np.float32))
        text = torch.where(torch.from_numpy(rng.random(batch) < 0.1)[:, None], empty, ids[rows % n])
        alpha, sigma = bars[t].sqrt()[:, None, None, None], (1 - bars[t]).sqrt()[:, None, None, None]
        x0 = latents[rows] * scale
        with torch.autocast("cpu", torch.bfloat16):
            hidden = both["text"](text).last_hidden_state
            v = both["unet"](alpha * x0 + sigma * noise, t, hidden).sample
        objects = _objects(pictures[rows % n].float() / 255, grounds[rows % n])
        objects = torch.where((rows >= n)[:, None, None, None], objects.flip(3), objects)
        weight = 1 + 3 * F.max_pool2d(F.max_pool2d(objects, 4), 3, 1, 1)
        return (weight / weight.mean() * (v.float() - (alpha * noise - sigma * x0)) ** 2).mean()

    vae.register_to_config(scaling_factor=scale)
    pipe, prompts = _pipeline(vae, both, tokenizer), [s.prompt for s in shapes.scenes(held_out=True)][::9][:20]
    pipe.set_progress_bar_config(disable=True)

    def samples() -> Image:
        generator = torch.Generator().manual_seed(0)
        found = pipe(prompts, num_inference_steps=8, guidance_scale=2.0, generator=generator, output_type="pt").images
        return drawings.grid([[x] for x in found], prompts, [""] * len(prompts))

    train("denoiser", both, loss, folder, updates=updates, lr=2e-3, ema=0.999, every=100, samples=samples)
    return both, tokenizer


def _pipeline(vae, both, tokenizer) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    make: Any = StableDiffusionPipeline  # its annotations are too narrow
    return make(
        vae=vae,
        unet=both["unet"],
        text_encoder=both["text"],
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assemble(out: Path, vae, both, tokenizer):
    """Write the ordinary diffusers folder, float16 safetensors."""
    pipe = _pipeline(vae, both, tokenizer)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    pipe.to(torch.float32)


def shapes_world(out: Path, lengths: Lengths) -> tuple:
    """Train VAE, U-Net and text encoder, and write OUT/model. Returns (vae, tokenizer) for the rewards to come."""
    folder = out / ".train"
    vae = train_vae(folder, lengths.vae, 2 * lengths.pictures // 3)
    both, tokenizer = train_denoiser(folder, vae, lengths.denoiser, lengths.pictures)
    assemble(out / "model", vae, both, tokenizer)
    return vae, tokenizer
