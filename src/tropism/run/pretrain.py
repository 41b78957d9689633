"""`tropism pretrain shapes`: the bundled networks, trained from nothing on two CPU cores in about two hours.

Stages: the VAE, the U-Net with its text encoder, and the three reward networks. Every stage checkpoints into OUT/.train and
goes on where it stopped; the finished model is an ordinary diffusers folder in OUT/model, the rewards lie in OUT/rewards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.worlds import shapes


def train(
    name: str,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    folder: Path,
    *,
    updates: int,
    lr: float,
    ema: float = 0.0,
    every: int = 100,
) -> nn.Module:
    """AdamW with warm-up and cosine decay on `loss(update) -> scalar`, resumable; returns the network with EMA weights if asked."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    average = [p.detach().clone() for p in parameters]
    file, start = folder / f"{name}.safetensors", 0
    if file.exists():
        start = _restore(file, parameters, average, optimiser)
    began, total = time.time(), 0.0
    for i in range(start, updates):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (i + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / updates)))
        value = loss(i)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rate = min(ema, (i + 1) / (i + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - rate)
        total += value.item()
        if (i + 1) % every == 0 or i + 1 == updates:
            _store(file, parameters, average, optimiser, i + 1)
            seconds = (time.time() - began) / (i + 1 - start)
            Console(soft_wrap=True, highlight=False).print(
                f"{name} {i + 1}/{updates}  loss {total / ((i % every) + 1):.4f}  {seconds:.2f} s/update  "
                f"{seconds * (updates - i - 1) / 60:.0f} min left"
            )
            total = 0.0
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a if ema else p)
    return network


def _store(file: Path, parameters, average, optimiser, update: int):
    tensors = {}
    for k, (p, a) in enumerate(zip(parameters, average, strict=True)):
        state = optimiser.state[p]
        tensors |= {f"p{k}": p.detach(), f"a{k}": a, f"m{k}": state["exp_avg"], f"v{k}": state["exp_avg_sq"]}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file.with_suffix(".tmp"), metadata={"update": str(update)})
    file.with_suffix(".tmp").replace(file)


def _restore(file: Path, parameters, average, optimiser) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        update = int(f.metadata()["update"])
        with torch.no_grad():
            for k, (p, a) in enumerate(zip(parameters, average, strict=True)):
                p.copy_(f.get_tensor(f"p{k}"))
                a.copy_(f.get_tensor(f"a{k}"))
                optimiser.state[p] = {
                    "step": torch.tensor(float(update)),
                    "exp_avg": f.get_tensor(f"m{k}"),
                    "exp_avg_sq": f.get_tensor(f"v{k}"),
                }
    return update


def drawn(folder: Path, n: int, seed: int) -> tuple[Tensor, list[shapes.Scene]]:
    """n pictures of training scenes as uint8 (n, 3, 64, 64), cached in `folder`, and their scenes."""
    pool = shapes.scenes(held_out=False)
    order = np.random.default_rng([seed, 1]).integers(len(pool), size=n)
    chosen, file = [pool[i] for i in order], folder / f"drawn-{seed}-{n}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": (shapes.pictures(chosen, seed) * 255).round().byte().contiguous()}, file)
    return load_file(file)["pictures"], chosen


def rows_of(n: int, size: int, stream: int, update: int) -> tuple[Tensor, np.random.Generator]:
    rng = np.random.default_rng([stream, update])
    return torch.from_numpy(rng.integers(n, size=size)), rng


def _grounds(chosen: list[shapes.Scene]) -> Tensor:
    """The background colours (n, 3, 1, 1) in [0, 1] of scenes."""
    return torch.tensor([shapes.BACKGROUNDS[s.background] for s in chosen]).float()[:, :, None, None] / 255


def _objects(pictures: Tensor, ground: Tensor) -> Tensor:
    """Which pixels of pictures (B, 3, H, W) are no background: (B, 1, H, W), 0 or 1."""
    return ((pictures - ground).norm(dim=1, keepdim=True) > 0.24).float()


# ---------------------------------------------------------------------------------------------------- VAE


def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
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


def train_vae(folder: Path, updates: int, batch: int = 16):
    """AutoencoderKL at 16x16x4, reconstruction L1 + L2 with objects weighted five times, a light KL term."""
    torch.manual_seed(0)
    vae = new_vae()
    pictures, chosen = drawn(folder, 16_000, 1)
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

    return train("vae", vae, loss, folder, updates=updates, lr=2e-3, ema=0.995, every=50)


# ---------------------------------------------------------------------------------------------------- text and U-Net


def new_tokenizer(folder: Path):
    """A CLIP tokenizer whose vocabulary is the bytes and the words of this world; writes vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = sorted({w for s in shapes.scenes() for w in s.prompt.split()})
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
    from diffusers import UNet2DConditionModel

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
    from diffusers import DDIMScheduler

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


def train_denoiser(folder: Path, vae, updates: int, batch: int = 64, n: int = 24_000):
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

    train("denoiser", both, loss, folder, updates=updates, lr=2e-3, ema=0.999, every=100)
    vae.register_to_config(scaling_factor=scale)
    return both, tokenizer


def assemble(out: Path, vae, both, tokenizer):
    """Write the ordinary diffusers folder, float16 safetensors."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=both["unet"],
        text_encoder=both["text"],
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    pipe.to(torch.float32)


def shapes_world(out: Path, vae_updates: int = 2400, updates: int = 8000) -> tuple:
    """Train VAE, U-Net and text encoder, and write OUT/model. Returns (vae, tokenizer) for the rewards to come."""
    folder = out / ".train"
    vae = train_vae(folder, vae_updates)
    both, tokenizer = train_denoiser(folder, vae, updates)
    assemble(out / "model", vae, both, tokenizer)
    return vae, tokenizer
