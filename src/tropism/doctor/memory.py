"""What a run needs in memory, predicted part by part, and the largest micro-batch that fits this machine and cards of named sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tropism.core import Batch, UserError
from tropism.doctor.footprint import GPUS, NETWORKS, Footprint, Update, count, fits, inputs_of, peak, room
from tropism.models.latent import Latent


@dataclass(frozen=True)
class Parts:
    """Footprints of one row through the denoiser and one picture through the decoder, plain and with block checkpointing."""

    denoiser: dict[bool, Footprint]
    decoder: dict[bool, Footprint]


def parts_of(model: Latent) -> Parts | None:
    """Counted on the meta device, seconds for the largest networks; None for a network whose inputs are not known."""
    if type(model.network).__name__ not in NETWORKS or type(model.vae).__name__ not in NETWORKS:
        return None
    height, width = model.shape[-2:]
    tokens = next(iter(model.encode(Batch(["a picture"])).positive.values())).shape[1]
    denoiser = inputs_of(model.network, height, width, tokens=tokens)
    decoder = inputs_of(model.vae, height, width, tokens=0)
    counted = lambda network, inputs, method: {
        blocks: count(network, inputs, checkpointing=blocks, dtype=model.dtype, method=method)
        for blocks in (False, True)
    }
    return Parts(counted(model.network, denoiser, "forward"), counted(model.vae, decoder, "decode"))


def lines(model: Latent, *, batch: int, active: int, guidance: float, gpu: Sequence[float] = ()) -> list[str]:
    """A few lines of text: what each part takes, and how many samples at a time fit where.

    active: steps from the first active one to the last. gpu: card sizes in GB, default those that cards are sold by.
    """
    if any(not size > 0 for size in gpu):
        raise UserError(f"The GPU size is {min(gpu):g}; it must be positive, in GB. Try --gpu 24.")
    parts = parts_of(model)
    if parts is None:
        return [f"Memory: {type(model.network).__name__} is not counted, so what fits is not known."]
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    pixels = tuple(side * factor for side in model.shape[-2:])
    one = lambda blocks: Update(
        parts.denoiser[blocks],
        parts.decoder[blocks],
        model.shape,
        (3, *pixels),
        batch,
        active,
        guided=model.rows(guidance) == 2,
    )
    most = lambda blocks, bytes_: fits(lambda m: peak(one(blocks), m), bytes_, batch)
    free = _free(model.device)
    sizes = [(f"this machine ({free / 2**30:.1f} GiB free)", free), *((f"{g:g} GB card", room(g)) for g in gpu or GPUS)]
    told = [
        f"{name}: {most(True, size) or 'nothing'} with, {most(False, size) or 'nothing'} without"
        for name, size in sizes
    ]
    return [
        f"Memory, predicted, {pixels[0]}x{pixels[1]} pixels, {str(model.dtype).removeprefix('torch.')}: "
        f"weights {_size(parts.denoiser[False].parameter_bytes)} (denoiser), "
        f"{_size(parts.decoder[False].parameter_bytes)} (VAE); text encoders are freed.",
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


def _free(device: torch.device) -> int:
    """Bytes that are free on the device, or on this machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines_ = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines_ if line.startswith("MemAvailable")]
    return available[0] if available else 8 * 2**30
