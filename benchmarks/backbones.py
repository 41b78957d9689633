"""FLOPs and saved bytes of one step of full-size networks, without weights, beside the floor computed before writing the engine.

    python benchmarks/backbones.py              the two tables, about two minutes on one core

Networks from their public configs (configs/) on the meta device, bfloat16, one row, no guidance; backward to the input only.
GB are 10^9 bytes. The second table adds what the first leaves out: a rank-4 float32 LoRA, and the true peak of a step.
"""

import json
import time
from pathlib import Path

import diffusers
import torch

from tropism.doctor.footprint import Footprint, count, inputs_of
from tropism.models import lora

CONFIGS = Path(__file__).parent / "configs"
NETWORKS = {
    "SD1.5 U-Net": ("sd15_unet", 77),
    "SDXL U-Net": ("sdxl_unet", 77),
    "SD3.5-M": ("sd35_medium_transformer", 77 + 256),
    "FLUX.1": ("flux1_transformer", 512),
    "KL-VAE decoder": ("kl_vae", 0),
}
"""By name: its file in configs/ and the tokens of a prompt."""
FLOOR = {
    ("SD1.5 U-Net", 512): (0.86, 0.803, 1.23, 0.78, 0.16),
    ("SDXL U-Net", 512): (2.57, 1.59, 1.02, 1.35, 0.13),
    ("SDXL U-Net", 1024): (2.57, 6.76, 1.17, 5.34, 0.50),
    ("SD3.5-M", 512): (2.24, 2.44, 1.21, 2.02, 0.10),
    ("SD3.5-M", 1024): (2.24, 11.25, 1.56, 6.91, 0.34),
    ("FLUX.1", 512): (11.9, 21.5, 1.11, 7.20, 0.55),
    ("FLUX.1", 1024): (11.9, 74.4, 1.30, 21.6, 1.64),
    ("KL-VAE decoder", 512): (0.05, 2.52, 1.02, 2.98, 0.43),
    ("KL-VAE decoder", 1024): (0.05, 10.5, 1.08, 11.9, 1.71),
}
"""By network and picture side: parameters, 10^9; forward, TFLOP; backward/forward; saved, GB, plain and at block boundaries."""


def built(file: str, adapter: bool = False):
    """A network on the meta device, from its config, with a rank-4 float32 adapter if asked."""
    config = json.loads((CONFIGS / f"{file}.json").read_text())
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
        if adapter:
            lora.attach(network, lora.LoraSettings(), torch.float32)
    return network


def measured(name: str, side: int, checkpointing: bool, adapter: bool = False) -> Footprint:
    """The footprint of one row for pictures of side x side pixels."""
    file, tokens = NETWORKS[name]
    network = built(file, adapter)
    inputs = inputs_of(network, side // 8, side // 8, tokens=tokens)
    method = "forward" if tokens else "decode"
    return count(network, inputs, checkpointing=checkpointing, dtype=torch.bfloat16, method=method)


def parameters(name: str, found: Footprint) -> int:
    """Of what runs: of the VAE, the decoder alone."""
    if name != "KL-VAE decoder":
        return found.parameters
    return sum(p.numel() for p in built(NETWORKS[name][0]).decoder.parameters())


def row(name: str, side: int, plain: Footprint, blocks: Footprint) -> str:
    """One line: ours / the floor's (ratio)."""
    ours = (
        parameters(name, plain) / 1e9,
        plain.forward_flops / 1e12,
        plain.backward_flops / plain.forward_flops,
        plain.saved_bytes / 1e9,
        blocks.saved_bytes / 1e9,
    )
    cells = [f"{a:.3g} / {b:.3g} ({a / b:.2f})" for a, b in zip(ours, FLOOR[name, side], strict=True)]
    return f"| {name} @{side} | " + " | ".join(cells) + " |"


def step(name: str, side: int, plain: Footprint, blocks: Footprint) -> str:
    """One line of what a step really holds, GB, and what it recomputes in forwards."""
    sizes = (plain.parameter_bytes, plain.peak_bytes, blocks.block_bytes, blocks.peak_bytes)
    cells = [f"{size / 1e9:.3g}" for size in sizes]
    cells.append(f"{(blocks.backward_flops - plain.backward_flops) / plain.forward_flops:.2f}")
    if name == "KL-VAE decoder" or side != 512:  # a larger picture scales both alike, and would take a minute more
        return f"| {name} @{side} | " + " | ".join([*cells, "-", "-"]) + " |"
    plain, blocks = (measured(name, side, checkpointing, adapter=True) for checkpointing in (False, True))
    cells += [f"{plain.saved_bytes / 1e9:.3g}", f"{blocks.peak_bytes / 1e9:.3g}"]
    return f"| {name} @{side} | " + " | ".join(cells) + " |"


def main() -> None:
    began, steps = time.perf_counter(), []
    print("ours / floor (ratio)\n")
    print(
        "| network | parameters, 10^9 | forward, TFLOP | backward/forward | saved plain, GB | saved, block ckpt, GB |"
    )
    print("|---|---|---|---|---|---|")
    for name, side in FLOOR:
        plain, blocks = (measured(name, side, checkpointing) for checkpointing in (False, True))
        print(row(name, side, plain, blocks), flush=True)
        steps.append(step(name, side, plain, blocks))
    print("\nGB; peak: the most alive in one step, forward and backward; recompute: in forwards\n")
    print(
        "| network | weights | peak plain | largest block | peak ckpt | recompute | saved plain, LoRA | peak ckpt, LoRA |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(steps))
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
