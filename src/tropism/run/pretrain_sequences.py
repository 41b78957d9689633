"""`tropism pretrain dna`: the bundled model of a sequence world, trained from nothing on fresh sequences; resumable."""

from __future__ import annotations

from pathlib import Path

import torch

from tropism.core import Stream, noise, uniform
from tropism.models.masked_lm import Convolutions, Shape, loss, save
from tropism.process.masked import Masked
from tropism.run.pretrain_loop import train
from tropism.worlds import dna


def dna_world(out: Path, updates: int = 5000, batch: int = 48) -> Convolutions:
    """Train the DNA network and write OUT/model.safetensors; fresh sequences every update, keyed by its number."""
    torch.manual_seed(0)
    network = Convolutions(Shape(tuple(dna.ALPHABET), dna.LENGTH))
    process = Masked(len(dna.ALPHABET))

    def value(update: int) -> torch.Tensor:
        tokens = dna.sequences(batch, update)
        u = uniform(0, Stream.TIMESTEP, update, -1, 0, 0, (1,))[0, 0]
        t = ((torch.arange(batch) + u) / batch).clamp_min(1e-3)  # one uniform, spread evenly
        return loss(network, process, tokens, t, noise(0, Stream.TRANSITION, update, -1, 0, 0, tokens.shape)[0, 0])

    train("dna", network, value, out / ".train", updates=updates, lr=2e-3, ema=0.999)
    save(network, out / "model.safetensors")
    return network
