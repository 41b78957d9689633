"""What a run needs in memory, predicted part by part, and the largest micro-batch that fits this machine and cards of named sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tropism.doctor.footprint import GPUS, NETWORKS, Footprint, Update, count, fits, inputs_of, peak, room
from tropism.models.latent import Latent, wide


@dataclass(frozen=True)
class Parts:
    """Footprints of one row through the denoiser and one picture through the decoder, plain and with block checkpointing."""

    denoiser: dict[bool, Footprint]
    decoder: dict[bool, Footprint]


def text_bytes(model: Latent) -> int:
    """Bytes of the text encoders' weights; they are read if they are not there, and stay."""
    encoders = [part for name, part in model.texts.encoders.components.items() if name.startswith("text_encoder")]
    return sum(p.nbytes for part in encoders if part is not None for p in part.parameters())


def parts_of(model: Latent) -> Parts | None:
    """Counted on the meta device, seconds for the largest networks; None for a network whose inputs are not known."""
    if type(model.network).__name__ not in NETWORKS or type(model.vae).__name__ not in NETWORKS:
        return None
    height, width = model.shape[-2:]
    tokens = next(iter(model.texts.of(None).values())).shape[1]
    denoiser = inputs_of(model.network, height, width, tokens=tokens)
    decoder = inputs_of(model.vae, height, width, tokens=0)
    both = lambda network, inputs, **how: {
        blocks: count(network, inputs, checkpointing=blocks, **how) for blocks in (False, True)
    }
    own = wide(model.dtype) if model.full else model.dtype
    steps = both(model.network, denoiser, dtype=own, full=model.full)
    decodes = both(model.vae, decoder, dtype=model.vae.dtype, method="decode")
    if model.options.get("quantize"):
        held = sum(_bytes(t) for t in (*model.network.parameters(), *model.network.buffers()))
        steps = {blocks: replace(found, parameter_bytes=held) for blocks, found in steps.items()}
    return Parts(steps, decodes)


def _bytes(t: Any) -> int:
    """Of a tensor, or of the parts that a quantised one is made of."""
    inner = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
    return sum(_bytes(getattr(t, name)) for name in inner) or t.nbytes


def lines(
    model: Latent, encoders: int, *, batch: int, active: int, guidance: float, gpu: Sequence[float] = ()
) -> list[str]:
    """A few lines of text: what each part takes, and how many samples at a time fit where.

    encoders: the text encoders' bytes, see `text_bytes`; they are alone on the device, but for a quantised denoiser and its decoder.
    active: steps from the first active one to the last. gpu: card sizes in GB, default those that cards are sold by.
    """
    parts = parts_of(model)
    if parts is None:
        return [f"Memory: {type(model.network).__name__} is not counted, so what fits is not known."]
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    pixels = tuple(side * factor for side in model.shape[-2:])
    weights, decoder = parts.denoiser[False].parameter_bytes, parts.decoder[False].parameter_bytes
    one = lambda blocks: Update(
        parts.denoiser[blocks],
        parts.decoder[blocks],
        model.shape,
        (3, *pixels),
        batch,
        active,
        guided=model.rows(guidance) == 2,
        text_bytes=encoders + (weights + decoder if model.options.get("quantize") else 0),  # those do not step aside
    )
    most = lambda blocks, bytes_: fits(lambda m: peak(one(blocks), m), bytes_, batch)
    free = _free(model.device, weights + decoder)
    sizes = [(f"this machine ({free / 2**30:.1f} GiB free)", free), *((f"{g:g} GB card", room(g)) for g in gpu or GPUS)]
    told = [
        f"{name}: {most(True, size) or 'nothing'} with, {most(False, size) or 'nothing'} without"
        for name, size in sizes
    ]
    return [
        f"Memory, predicted, {pixels[0]}x{pixels[1]} pixels, {str(model.dtype).removeprefix('torch.')}: "
        f"weights {_size(weights)} (denoiser), "
        f"{_size(decoder)} (VAE); text encoders {_size(encoders)}, there alone and freed "
        "before the first update.",
        f"A picture's peak: denoiser step {_size((2 if one(True).guided else 1) * parts.denoiser[True].peak_bytes)} with "
        f"block checkpointing, {_size((2 if one(False).guided else 1) * parts.denoiser[False].peak_bytes)} without; decode "
        f"{_size(parts.decoder[True].peak_bytes)} and {_size(parts.decoder[False].peak_bytes)}; latents "
        f"{_size(4 * model.shape[0] * model.shape[1] * model.shape[2])} an active step. The reward's network is not counted.",
        f"Largest --micro-batch of {batch}, with and without block checkpointing. " + "; ".join(told) + ".",
    ]


def _size(bytes_: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if bytes_ >= scale:
            return f"{bytes_ / scale:.3g} {unit}"
    return f"{bytes_ / 1e3:.3g} kB"


def _free(device: torch.device, own: int) -> int:
    """Bytes of the device (for the CPU: of this machine) that are free or held by the model itself, `own` bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    lines_ = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines_ if line.startswith("MemAvailable")]
    return (available[0] if available else 8 * 2**30) + own
