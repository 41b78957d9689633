"""Stable Diffusion 1.x and 2.x, and the bundled `shapes` model: a diffusers folder or hub id as a core.Model.

diffusers gives the networks and the schedule's constants; the chain is process.gaussian.VP, always DDIM on the model's
own betas and spacing. No pipeline call and no scheduler state is used.
Source: High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tropism import core
from tropism.core import Batch, Draw, Stream, UserError
from tropism.models import lora as adapters
from tropism.models import schedule
from tropism.models.lora import LoraSettings


@dataclass(frozen=True)
class TextCond:
    """Prompt embeddings, positive and negative (B, L, D), and one sample's latent shape (C, H/f, W/f)."""

    positive: Tensor
    negative: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> TextCond:
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, dtype=torch.long, device=self.positive.device)
        return TextCond(self.positive[rows], self.negative[rows], self.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32, never below `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class StableDiffusion:
    """A text-to-image latent diffusion model. `load` makes one; `calls` counts rows through "network", "backward" and "decode"."""

    def __init__(
        self,
        pipe: Any,
        *,
        source: str = "",
        lora: LoraSettings | None = None,
        full: bool = False,
        eta: float = 0.0,
        checkpointing: bool = False,
        height: int | None = None,
        width: int | None = None,
    ):
        """Takes the parts of a StableDiffusionPipeline, already on their device and in their dtype; see `load`."""
        self.unet, self.vae, self.text_encoder, self.tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
        self.source, self.lora, self.full = source, lora, full
        self.calls = {"network": 0, "backward": 0, "decode": 0}
        config = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
        self.process, self.prediction = schedule.process(config, eta), schedule.prediction_of(config)
        self.dtype, self.device = self.vae.dtype, self.vae.device
        self.shape = self._latent_shape(height, width)
        self._texts: dict[str, Tensor] = {}
        self._freeze()
        self._network_dtype = next(self.unet.conv_in.parameters()).dtype
        if checkpointing:
            self.unet.enable_gradient_checkpointing(self._checkpoint)
            self.vae.enable_gradient_checkpointing()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        lora: LoraSettings | None = LoraSettings(),
        full: bool = False,
        eta: float = 0.0,
        checkpointing: bool | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> StableDiffusion:
        """Read a diffusers folder or hub id (safetensors only).

        dtype: of the frozen networks; adapters and a fully trained U-Net are at least float32.
        lora: the adapter to train. `lora=None` freezes everything, with `full=True` every U-Net weight trains.
        eta: 0 is DDIM, 1 is as stochastic as DDPM. height, width: pixels, default the U-Net's own size.
        checkpointing: recompute U-Net and VAE blocks in the backward pass; default on, except on the CPU.
        Raises UserError for a missing source, a pickle-only or foreign pipeline, and sizes the VAE cannot make.
        """
        if full and lora is not None:
            raise UserError(
                "Both a LoRA and full fine-tuning were asked for; only one can train. Pass lora=None with full=True."
            )
        device = torch.device(device)
        checkpointing = device.type != "cpu" if checkpointing is None else checkpointing
        return cls(
            _pipeline(str(source), dtype, device),
            source=str(source),
            lora=lora,
            full=full,
            eta=eta,
            checkpointing=checkpointing,
            height=height,
            width=width,
        )

    def reloaded(self, folder: str | Path) -> StableDiffusion:
        """The same base in a fresh, plain diffusers pipeline with the adapter of `folder`: judges an export."""
        pipe, factor = _pipeline(self.source, _wide(self.dtype), self.device), self._factor()
        with _quiet():
            pipe.load_lora_weights(str(folder))
        for network in (pipe.unet, pipe.vae, pipe.text_encoder):
            for name, p in network.named_parameters():
                if ".lora_" not in name:  # the adapter stays as wide as the one in memory
                    p.data = p.data.to(self.dtype)
        return StableDiffusion(
            pipe, source=self.source, eta=self.process.eta, height=self.shape[1] * factor, width=self.shape[2] * factor
        )

    # ------------------------------------------------------------------------------------------------ setting up

    def _factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        own, factor = self.unet.config.sample_size, self._factor()
        own = (own, own) if isinstance(own, int) else own
        pixels = [asked or side * factor for asked, side in zip((height, width), own, strict=True)]
        if any(p % factor or p < factor for p in pixels):
            raise UserError(
                f"The picture size {pixels[0]}x{pixels[1]} is not a multiple of {factor}, this VAE's "
                f"factor. Try {own[0] * factor}x{own[1] * factor}."
            )
        return self.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor

    def _freeze(self) -> None:
        for network in (self.unet, self.vae, self.text_encoder):
            network.requires_grad_(False).eval()
        if self.lora is not None:
            adapters.attach(self.unet, self.lora, _wide(self.dtype))
        if self.full:
            nn.Module.to(self.unet, _wide(self.dtype)).requires_grad_(True)

    def _checkpoint(self, module: nn.Module, *inputs: Any) -> Any:
        """Checkpoint one block; the recomputation sees the adapter as it was, whatever `base()` says by then."""
        on = adapters.is_on(self.unet)

        def again(*inputs):
            with adapters.switched(self.unet, on):
                return module(*inputs)

        return checkpoint(again, *inputs, use_reentrant=False)

    # ------------------------------------------------------------------------------------------------ text

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that have more tokens than the text encoder reads; their ends are cut off."""
        limit = self.tokenizer.model_max_length
        return [p for p in prompts if len(self.tokenizer(p, verbose=False).input_ids) > limit]

    @torch.no_grad()
    def _embedded(self, text: str) -> Tensor:
        """(L, D) on the CPU, computed once and alone, so that its bits do not depend on its company."""
        if text not in self._texts:
            ids = self.tokenizer(
                [text],
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = ids.attention_mask.to(self.device) if use_mask else None
            self._texts[text] = self.text_encoder(ids.input_ids.to(self.device), attention_mask=mask)[0][0].cpu()
        return self._texts[text]

    def encode(self, batch: Batch, draw: Draw | None = None) -> TextCond:
        """Embeddings of a batch's prompts and negative prompts (default ""), each distinct text computed once."""
        negatives = batch.negative_prompts or [""] * len(batch)
        positive, negative = (
            torch.stack([self._embedded(t) for t in texts]).to(self.device) for texts in (batch.prompts, negatives)
        )
        return TextCond(positive, negative, self.shape)

    # ------------------------------------------------------------------------------------------------ the chain

    def start(self, cond: TextCond, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
        """x_T (B, C, h, w), standard normals in at least float32, and the first step, 0."""
        return draw(Stream.PRIOR, 0, cond.shape).to(self.device, _wide(self.dtype)), 0

    def predict(self, x_t: Tensor, t: float | Tensor, cond: TextCond, guidance: float) -> Tensor:
        """The network's native output (B, C, h, w) after guidance, in at least float32 and x_t's dtype.

        t: a time or (B,) times. guidance 1 runs the prompt alone; any other one doubled batch, counted as two each.
        """
        times = torch.as_tensor(t, device=x_t.device).long().expand(len(x_t))
        if guidance == 1:
            return self._network(x_t, times, cond.positive)
        text = torch.cat([cond.negative, cond.positive])
        both = self._network(torch.cat([x_t, x_t]), torch.cat([times, times]), text)
        free, conditional = both.chunk(2)
        return free + guidance * (conditional - free)

    def _network(self, x: Tensor, times: Tensor, text: Tensor) -> Tensor:
        out = self.unet(x.to(self._network_dtype), times, text.to(self._network_dtype)).sample
        core.count_rows(self.calls, out, len(x))
        return out.to(torch.promote_types(out.dtype, _wide(x.dtype)))

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor) -> Tensor:
        """The clean latents a native output stands for; linear, no network, never clipped."""
        return self.process.x0(x_t, out, t, self.prediction)

    kernel = core.kernel

    # ------------------------------------------------------------------------------------------------ pictures

    def decode_raw(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), 0 black and 1 white, not clamped; at least float32."""
        self.calls["decode"] += len(x0)
        latents = x0 / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0)
        pictures = self.vae.decode(latents.to(self.dtype)).sample
        return pictures.to(torch.promote_types(pictures.dtype, _wide(x0.dtype))) * 0.5 + 0.5

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]; see core.clamp for the gradient at the walls."""
        return core.clamp(self.decode_raw(x0))

    def latents(self, samples: Tensor) -> Tensor:
        """The clean latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1]: the posterior's mean, differentiable."""
        mean = self.vae.encode((2 * samples - 1).to(self.dtype)).latent_dist.mean
        mean = mean.to(torch.promote_types(mean.dtype, _wide(samples.dtype)))
        return (mean - (getattr(self.vae.config, "shift_factor", None) or 0)) * self.vae.config.scaling_factor

    # ------------------------------------------------------------------------------------------------ weights

    def base(self) -> AbstractContextManager[None]:
        """The un-adapted network inside. Raises UserError in full fine-tuning: the base's own weights train."""
        if self.full:
            raise UserError(
                "Full fine-tuning has no base model to go back to: its own weights are the ones that "
                "train. Train a LoRA, or set the drift penalty to 0."
            )
        return adapters.switched(self.unet, False) if self.lora is not None else nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The U-Net's parameters that train, by name: the adapter's factors, or all of them; at least float32."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------- reading


@contextmanager
def _quiet(warnings: bool = False) -> Iterator[None]:
    """No progress bars for local files (a download still shows its own), and no warnings unless asked for."""
    import diffusers.utils.logging as first
    import transformers.utils.logging as second

    before = [(module, module.is_progress_bar_enabled(), module.get_verbosity()) for module in (first, second)]
    try:
        for module, _, level in before:
            module.disable_progress_bar()
            module.set_verbosity(level if warnings else module.ERROR)
        yield
    finally:
        for module, bars, level in before:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline. Name the folder that "
            "pipe.save_pretrained(folder) wrote."
        )
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"{folder} has no tokenizer folder, so no prompt can be read. Save the whole pipeline again.")
    for part in ("unet", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")) and any((folder / part).glob("*.bin")):
            raise UserError(
                f"{folder / part} holds its weights only as a pickle (.bin), which can run code when it is "
                "read, so it is refused. If you trust it, convert it once: load it with diffusers and call "
                "pipe.save_pretrained(folder, safe_serialization=True)."
            )


def _pipeline(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A plain StableDiffusionPipeline, used as a bag of networks and for its scheduler's configuration."""
    with _quiet():  # importing it warns of image processors that are never used
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    if Path(source).is_dir():
        _check_folder(Path(source))
    try:
        name = cast(dict, StableDiffusionPipeline.load_config(source)).get("_class_name")
        if name != "StableDiffusionPipeline":
            raise UserError(
                f"{source} is a {name}; this reads Stable Diffusion 1.x and 2.x (StableDiffusionPipeline). "
                "Choose such a model, or write your own: --model file.py:Class."
            )
        with _quiet(warnings=True):
            pipe = StableDiffusionPipeline.from_pretrained(
                source,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"The model {source!r} could not be read: {str(error).splitlines()[0]} It must be a diffusers "
            "folder or a hub id with safetensors weights. Check the name and the network."
        ) from error
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UserError(
            f"{source}: the U-Net takes {pipe.unet.config.in_channels} channels, the VAE makes "
            f"{pipe.vae.config.latent_channels}. Inpainting and depth models are not text-to-image; choose "
            "another."
        )
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        nn.Module.to(network, device, dtype)  # diffusers' own `to` warns without a cause
    return pipe
