"""SDXL, SD 3, FLUX.1, AuraFlow and Chroma pipelines with random weights, small enough for a test: real classes, real files.

Every pipeline makes 16 px images from (4, 8, 8) latents ((16, 8, 8) in SD 3) with a VAE of factor 2. FLUX.1,
AuraFlow and Chroma do not read their default size from the folder: pass `height=SIZE, width=SIZE`.
"""

import string
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from tiny import BETAS, TOKENS, tiny_pipeline, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tropism.models.load import load_model

SIZE = 16
SHIFTED = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@contextmanager
def _building() -> Iterator[None]:
    """Give the same random numbers at every build, leave the caller's alone, and say nothing."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def tiny_t5_tokenizer() -> transformers.T5TokenizerFast:
    """A T5 tokenizer of the ASCII characters with a few words: <pad> 0, </s> 1 (appended), <unk> 2."""
    characters = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
    words = [("▁red", -2.0), ("▁cat", -2.0), ("▁on", -2.0), ("▁a", -2.0)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((c, -4.0) for c in characters), *words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return transformers.T5TokenizerFast.from_pretrained(folder, model_max_length=512, **special)


def _clip(kind: type, tokenizer, width: int, act: str = "quick_gelu"):
    """A CLIP text encoder; its token embeddings are large enough for the hidden states to tell prompts apart."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = kind(config)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(50)
    return encoder


def _t5(tokenizer, width: int, name: str = "T5"):
    """A T5 v1.1 or UMT5 encoder."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return getattr(transformers, f"{name}EncoderModel")(config)


def _vae(channels: int = 4, **config) -> AutoencoderKL:
    """A VAE of factor 2."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
        **config,
    )


def _alive(denoiser: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """The denoiser with its matrices times `gain` and random numbers in every parameter that is zero."""
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
            elif parameter.ndim == 2:
                parameter.mul_(gain)
    return denoiser


def _write(folder: str | Path, pipeline: str, **parts) -> Path:
    """Write the pipeline of these parts and return its folder."""
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_sdxl(folder: str | Path) -> Path:
    """Write a 16 px SDXL folder (epsilon; latents (4, 8, 8), 16 tokens of width 16 + 24, pooled 24)."""
    with _building():
        tokenizer = tiny_tokenizer(Path(folder) / "tokenizer")
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16 + 24,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=[2, 4],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        return _write(
            folder,
            "StableDiffusionXLPipeline",
            vae=_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=_clip(transformers.CLIPTextModel, tokenizer, 16),
            text_encoder_2=_clip(transformers.CLIPTextModelWithProjection, tokenizer, 24, "gelu"),
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(Path(folder) / "tokenizer_2"),
            unet=_alive(unet),
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


def tiny_sd3(folder: str | Path, t5: bool = True) -> Path:
    """Write a 16 px SD 3.5 folder (latents (16, 8, 8), 16 CLIP and T5 tokens of width 48, pooled 40).

    Without `t5`, load it with `from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`.
    """
    with _building():
        tokenizer, third = tiny_tokenizer(Path(folder) / "tokenizer"), tiny_t5_tokenizer() if t5 else None
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        return _write(
            folder,
            "StableDiffusion3Pipeline",
            vae=_vae(
                16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=_clip(transformers.CLIPTextModelWithProjection, tokenizer, 16),
            text_encoder_2=_clip(transformers.CLIPTextModelWithProjection, tokenizer, 24, "gelu"),
            text_encoder_3=_t5(third, 48) if t5 else None,
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(Path(folder) / "tokenizer_2"),
            tokenizer_3=third,
            transformer=_alive(transformer, 1.7),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def tiny_flux(folder: str | Path, distilled: bool = True) -> Path:
    """Write a 16 px FLUX.1 folder (latents (4, 8, 8), packed (16, 16); T5 tokens of width 32, pooled 16).

    `distilled` is like FLUX.1-dev (a guidance embedding, dynamic shifting), otherwise like FLUX.1-schnell.
    """
    with _building():
        tokenizer, second = tiny_tokenizer(Path(folder) / "tokenizer"), tiny_t5_tokenizer()
        transformer = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 6, 6),
        )
        return _write(
            folder,
            "FluxPipeline",
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=_clip(transformers.CLIPTextModel, tokenizer, 16),
            text_encoder_2=_t5(second, 32),
            tokenizer=tokenizer,
            tokenizer_2=second,
            transformer=_alive(transformer, 1.7),
            scheduler=FlowMatchEulerDiscreteScheduler(**(SHIFTED if distilled else {"shift": 1.0})),
        )


def tiny_auraflow(folder: str | Path) -> Path:
    """Write a 16 px AuraFlow folder (latents (4, 8, 8), UMT5 tokens of width 32)."""
    with _building():
        tokenizer = tiny_t5_tokenizer()
        transformer = diffusers.AuraFlowTransformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=16 * 16,
        )
        return _write(
            folder,
            "AuraFlowPipeline",
            tokenizer=tokenizer,
            text_encoder=_t5(tokenizer, 32, "UMT5"),
            vae=_vae(scaling_factor=0.13025, force_upcast=True),
            transformer=_alive(transformer, 2.0),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )


def tiny_chroma(folder: str | Path) -> Path:
    """Write a 16 px Chroma folder (latents (4, 8, 8), packed (16, 16); T5 tokens of width 32; dynamic shifting)."""
    with _building():
        tokenizer = tiny_t5_tokenizer()
        transformer = diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        )
        return _write(
            folder,
            "ChromaPipeline",
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=_t5(tokenizer, 32),
            tokenizer=tokenizer,
            transformer=_alive(transformer, 1.2),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED),
        )


BUILDERS = {
    "sd1": tiny_pipeline,
    "sd2": lambda folder: tiny_pipeline(folder, "v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3_without_t5": lambda folder: tiny_sd3(folder, t5=False),
    "flux": tiny_flux,
    "schnell": lambda folder: tiny_flux(folder, distilled=False),
    "auraflow": tiny_auraflow,
    "chroma": tiny_chroma,
}


class Folders(dict):
    """{name: folder} of tiny pipelines, built when first asked for; read only."""

    def __init__(self, root, builders=BUILDERS):
        super().__init__()
        self.root, self.builders = root, builders

    def __missing__(self, name):
        self[name] = self.builders[name](self.root / name)
        return self[name]


def model_of(folders: Folders, name: str, **options):
    """The tiny pipeline of a name as a model, 16 px whatever its family's default."""
    return load_model(folders[name], **{"height": SIZE, "width": SIZE, **options})
