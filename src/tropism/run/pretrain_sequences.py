"""`tropism pretrain dna` and `pretrain molecules`: the bundled models of sequence worlds, trained from nothing; resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tropism.core import Stream, noise, uniform
from tropism.models.masked_lm import Convolutions, Shape, loss, save
from tropism.process.masked import Masked
from tropism.run.pretrain_loop import train
from tropism.worlds import dna, molecules


@dataclass(frozen=True)
class Recipe:
    """How a world's network is trained. sequences(n, seed) -> tokens (n, L), fresh ones every update."""

    shape: Shape
    sequences: Callable[[int, int], Tensor]
    updates: int
    batch: int
    lr: float = 4e-3


RECIPES = {
    "dna": Recipe(Shape(tuple(dna.ALPHABET), dna.LENGTH, 64, 9, (1, 1, 4, 16), 1), dna.sequences, 12_000, 48),
    "molecules": Recipe(
        Shape(tuple(molecules.ALPHABET), molecules.LENGTH, 128, 5, (1, 2, 4, 8)), molecules.sequences, 9000, 64, 2e-3
    ),
}


def sequence_world(name: str, out: Path, updates: int | None = None, batch: int | None = None) -> Convolutions:
    """Train the network of a world and write OUT/model.safetensors. What an update sees is keyed by its number; arithmetic in bfloat16."""
    how = RECIPES[name]
    torch.manual_seed(0)
    network, process, rows = Convolutions(how.shape), Masked(len(how.shape.alphabet)), batch or how.batch

    def value(update: int) -> Tensor:
        tokens = how.sequences(rows, update)
        u = uniform(0, Stream.TIMESTEP, update, -1, 0, 0, (1,))[0, 0]
        u = ((torch.arange(rows) + u) / rows).clamp_min(0.03)  # one uniform, spread evenly
        drawn = noise(0, Stream.TRANSITION, update, -1, 0, 0, tokens.shape)[0, 0]
        with torch.autocast("cpu", torch.bfloat16):
            return loss(network, process, tokens, u**2, drawn, weight=2 * u)  # small t teach more a row

    train(name, network, value, out / ".train", updates=updates or how.updates, lr=how.lr, ema=0.999)
    save(network, out / "model.safetensors", name)
    return network
