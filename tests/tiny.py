"""A Stable Diffusion pipeline with random weights, small enough for a test: real classes, real tokenizer files."""

import json
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of the lower-case letters and digits with a few merges."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    merges = ["r e", "re d</w>", "c a", "ca t</w>", "o n</w>"]
    words = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def _text_encoder(tokenizer, act: str) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet(linear: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        use_linear_projection=linear,
        attention_head_dim=[2, 4] if linear else 2,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_pipeline(folder: str | Path, prediction: str = "epsilon") -> Path:
    """Write a 16 px pipeline folder (latents (4, 8, 8), 16 tokens) and return it.

    "epsilon": like SD 1.x (PNDM, steps_offset 1, set_alpha_to_one False). "v_prediction": like SD 2.x (DDIM, linear
    projections, heads per block).
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        tokenizer, second = tiny_tokenizer(folder / "tokenizer"), prediction == "v_prediction"
        common = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": prediction}
        scheduler = (
            DDIMScheduler(**common, clip_sample=False) if second else PNDMScheduler(**common, skip_prk_steps=True)
        )
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            unet=_unet(second),
            text_encoder=_text_encoder(tokenizer, "gelu" if second else "quick_gelu"),
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(folder, safe_serialization=True)
    return folder
