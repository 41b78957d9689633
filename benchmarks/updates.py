"""One real AlignProp gradient of full-size networks with random weights: peak memory and pictures a second, on one GPU.

    python benchmarks/updates.py                every row: bfloat16, 512 px, the family's own guidance, N = 20, K = 1, batch 4
    python benchmarks/updates.py "SD1.5 U-Net" --device cpu --side 64 --steps 2 --batch 1 --repeats 1      to see that it runs

A fresh process a row; one update warms up, the next `--repeats` are timed. Text encoders are left out, as in a run, where they are
freed before the first update. Not measured yet: no GPU was at hand.
"""

import argparse
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import diffusers
import torch
from backbones import CONFIGS, NETWORKS

from tropism.align.rollout import Chain, sweep
from tropism.core import Batch, Draw
from tropism.models.flux import Flux
from tropism.models.lora import LoraSettings
from tropism.models.sd3 import StableDiffusion3
from tropism.models.sdxl import StableDiffusionXL
from tropism.models.stable_diffusion import StableDiffusion
from tropism.models.text import TextCond

VP = ("DDIMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1})
FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
DYNAMIC = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})
ROWS = {
    "SD1.5 U-Net": (StableDiffusion, VP, 4, {"text": (77, 768)}),
    "SDXL U-Net": (StableDiffusionXL, VP, 4, {"text": (77, 2048), "pooled": (1280,)}),
    "SD3.5-M": (StableDiffusion3, FLOW, 16, {"text": (333, 4096), "pooled": (2048,)}),
    "FLUX.1": (Flux, DYNAMIC, 16, {"text": (512, 4096), "pooled": (768,)}),
}
"""By name: family, scheduler, latent channels of its VAE, and the shapes of one embedded prompt."""


def built(config: dict, device: str, dtype: torch.dtype, **changes) -> torch.nn.Module:
    """A network of random weights from its config, made on its device."""
    with torch.device(device):
        network = getattr(diffusers, config["_class_name"]).from_config({**config, **changes})
    return torch.nn.Module.to(network, dtype)  # diffusers' own `to` warns without a cause


def model_of(name: str, device: str, dtype: torch.dtype, side: int, checkpointing: bool):
    family, (scheduler, options), channels, _ = ROWS[name]
    read = lambda file: json.loads((CONFIGS / f"{file}.json").read_text())
    parts = {
        family.part: built(read(NETWORKS[name][0]), device, dtype),
        "vae": built(read("kl_vae"), device, dtype, latent_channels=channels),
        "scheduler": getattr(diffusers, scheduler)(**options),
    }
    size = {"height": side, "width": side}
    return family(SimpleNamespace(**parts), lora=LoraSettings(), checkpointing=checkpointing, **size)


def one(asked: argparse.Namespace) -> dict[str, float]:
    """Seconds of each timed update and the peak memory, GB, of one row in this process."""
    cuda, dtype = asked.device.startswith("cuda"), torch.bfloat16 if asked.device.startswith("cuda") else torch.float32
    model = model_of(asked.network, asked.device, dtype, asked.side, asked.checkpointing)
    batch = Batch([str(i) for i in range(asked.batch)])
    texts = {k: torch.randn(asked.batch, *s, device=asked.device) for k, s in ROWS[asked.network][3].items()}
    cond, times = TextCond(texts, texts, model.shape), model.process.times(asked.steps, model.shape)
    reward = lambda images, _: images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    active, seconds = (False,) * (asked.steps - 1) + (True,), []
    for update in range(1 + asked.repeats):
        began, draw = time.perf_counter(), Draw(0, update, batch.index)
        x, first = model.start(cond, draw, times)
        chain = Chain(model, reward, batch, cond, draw, tuple(times.tolist()), model.guidance, active, first)
        swept = sweep(chain, x, lambda r: -r, list(model.trainable().values()), asked.micro_batch)
        assert swept.step_norms, "no gradient arrived"
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    return {"pictures_per_second": asked.batch * asked.repeats / sum(seconds[1:]), "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=ROWS)
    for name, value in {"side": 512, "steps": 20, "batch": 4, "micro-batch": 1, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpointing", action="store_true")
    asked = parser.parse_args()
    if asked.network:
        print(json.dumps(one(asked)))
        return
    print("| network | checkpointing | pictures a second | peak, GB |\n|---|---|---:|---:|")
    for name in ROWS:
        for flags in ([], ["--checkpointing"]):
            done = subprocess.run(
                [sys.executable, __file__, name, *sys.argv[1:], *flags], capture_output=True, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            told = f"{found['pictures_per_second']:.3f} | {found['peak_gb']:.1f}" if found else "not measured | -"
            print(f"| {name} @{asked.side} | {'blocks' if flags else 'none'} | {told} |", flush=True)


if __name__ == "__main__":
    main()
