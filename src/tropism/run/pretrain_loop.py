"""What every stage of pretraining shares: lengths, the resumable training loop, and rendered pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.worlds import shapes

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Lengths:
    """How long each network is trained, in updates, and on how many pictures."""

    vae: int = 2400
    denoiser: int = 10_500
    counter: int = 1500
    clip: int = 5000
    head: int = 1500
    pictures: int = 24_000


QUICK = Lengths(vae=2, denoiser=2, counter=2, clip=2, head=20, pictures=64)
"""Enough to see every stage work, in seconds; the networks know nothing."""


def train(
    name: str,
    network: Network,
    loss: Callable[[int], Tensor],
    folder: Path,
    *,
    updates: int,
    lr: float,
    ema: float = 0.0,
    every: int = 100,
    samples: Callable[[], Image] | None = None,
) -> Network:
    """AdamW with warm-up and cosine decay on `loss(update) -> scalar`, resumable; returns the network with EMA weights if asked.

    samples: draws a picture with those weights, kept ten times a training in FOLDER/../samples.
    """
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
        for p, a in zip(parameters, average, strict=True):
            a.lerp_(p.detach(), 1 - rate)
        total += value.item()
        if (i + 1) % every == 0 or i + 1 == updates:
            _store(file, parameters, average, optimiser, i + 1)
            seconds = (time.time() - began) / (i + 1 - start)
            Console(soft_wrap=True, highlight=False).print(
                f"{name} {i + 1}/{updates}  loss {total / ((i % every) + 1):.4f}  {seconds:.2f} s/update  "
                f"{seconds * (updates - i - 1) / 60:.0f} min left"
            )
            total = 0.0
        if samples and ((i + 1) % max(1, updates // 10) == 0 or i + 1 == updates):
            shown = folder.parent / "samples" / f"{name}-{i + 1:06d}.png"
            shown.parent.mkdir(parents=True, exist_ok=True)
            with _holding(parameters, average if ema else parameters):
                samples().save(shown)
    if ema:
        _fill(parameters, average)
    return network


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, v in zip(parameters, values, strict=True):
        p.copy_(v)


@contextmanager
def _holding(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in the parameters, without a graph, inside."""
    own = [p.detach().clone() for p in parameters]
    _fill(parameters, values)
    try:
        with torch.no_grad():
            yield
    finally:
        _fill(parameters, own)


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


def cache(folder: Path, what: str, n: int, seed: int, texture: str | None = None, twin: str = "") -> Path:
    """Where n pictures of a kind are kept."""
    return folder / f"{what}-{seed}-{n}{f'-{texture}' if texture else ''}{f'-{twin}' if twin else ''}.safetensors"


def drawn(
    folder: Path, n: int, seed: int, texture: str | None = None, twin: str = ""
) -> tuple[Tensor, list[shapes.Scene]]:
    """n pictures of training scenes as uint8 (n, 3, 64, 64), cached in `folder`, and their scenes.

    twin: "changed" draws each scene with another shape, colour or background, "odd" with some objects not what the scene
    says (see `odd_objects`); both in the same places, on the same texture.
    """
    rng = np.random.default_rng([seed, 1])
    chosen = training_scenes(n, rng)
    if twin == "changed":
        chosen = [another(s, ("shape", "shape", "colour", "background")[rng.integers(4)], rng) for s in chosen]
    file = cache(folder, "drawn", n, seed, texture, twin)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        odd = [odd_objects(s, rng) for s in chosen] if twin == "odd" else None
        pictures = (shapes.pictures(chosen, seed, texture, odd) * 255).round().byte()
        save_file({"pictures": pictures.contiguous()}, file)
    return load_file(file)["pictures"], chosen


def training_scenes(n: int, rng: np.random.Generator) -> list[shapes.Scene]:
    """n random scenes that are not held out."""
    pool = shapes.scenes(held_out=False)
    return [pool[i] for i in rng.integers(len(pool), size=n)]


def odd_objects(scene: shapes.Scene, rng: np.random.Generator) -> shapes.Odd:
    """Some objects of a scene, at least one, left out (a third of the time), of another shape, or halfway to it."""
    assert scene.count and scene.shape
    some = rng.permutation(scene.count)[: rng.integers(1, max(2, scene.count))].tolist()
    other = another(scene, "shape", rng).shape or scene.shape
    return dict.fromkeys(some, ((), (other,), (scene.shape, other))[rng.integers(3)])


def another(scene: shapes.Scene, attribute: str, rng: np.random.Generator) -> shapes.Scene:
    """The scene with another value of one attribute, a training scene if one exists."""
    values = {
        "count": range(1, len(shapes.COUNTS) + 1),
        "shape": shapes.SHAPES,
        "colour": tuple(shapes.COLOURS),
        "background": tuple(shapes.BACKGROUNDS),
    }[attribute]
    others = [replace(scene, **{attribute: v}) for v in values if v != getattr(scene, attribute)]
    others = [s for s in others if not s.held_out] or others
    return others[rng.integers(len(others))]


def rows_of(n: int, size: int, stream: int, update: int) -> tuple[Tensor, np.random.Generator]:
    rng = np.random.default_rng([stream, update])
    return torch.from_numpy(rng.integers(n, size=size)), rng
