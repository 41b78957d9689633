"""A diffusion model small enough for exact tests: float64, a smooth network on (2, 3, 3) latents, a linear decoder, no clamp."""

from contextlib import contextmanager

import torch
from torch import nn

from tropism import core
from tropism.core import Batch, Draw, Stream
from tropism.process.gaussian import VP


def table(n: int = 100) -> tuple[float, ...]:
    betas = torch.linspace(1e-3, 6e-2, n, dtype=torch.float64)
    return tuple(torch.cumprod(1 - betas, 0).tolist())


class ToyCond:
    shape = (2, 3, 3)

    def __init__(self, text):
        self.text = text

    def __getitem__(self, rows):
        return ToyCond(self.text[rows])


class ToyModel:
    """out = W2 tanh(W1 x + c + t/100) under guidance; `adapter` holds low-rank deltas that `base` turns off."""

    dtype, device, prediction = torch.float64, torch.device("cpu"), "epsilon"

    def __init__(self, eta=0.0, prediction="epsilon", final=1.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.w1, self.w2, self.read = make(18, 18) / 4, make(18, 18) / 4, make(3 * 16, 18) / 8
        self.a, self.b = nn.Parameter(make(18, 4) / 4), nn.Parameter(make(4, 18) / 4)
        self.process, self.prediction = VP(table(), "leading", 0, eta, final), prediction
        self.calls, self.on = {"network": 0, "backward": 0, "decode": 0}, True

    def encode(self, batch, draw=None):
        return ToyCond(torch.tensor([[float(len(p) % 7) / 7] for p in batch.prompts], dtype=torch.float64))

    def start(self, cond, draw, times):
        return draw(Stream.PRIOR, 0, cond.shape).double(), 0

    def _net(self, x, t, c):
        w1 = self.w1 + (self.a @ self.b if self.on else 0)
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1) / 100
        out = (torch.tanh(x.flatten(1) @ w1.T + c + t) @ self.w2.T).reshape(x.shape)
        core.count_rows(self.calls, out, len(x))
        return out

    def predict(self, x_t, t, cond, guidance):
        conditional = self._net(x_t, t, cond.text)
        if guidance == 1:
            return conditional
        free = self._net(x_t, t, torch.zeros_like(cond.text))
        return free + guidance * (conditional - free)

    def x0(self, x_t, out, t):
        return self.process.x0(x_t, out, t, self.prediction)

    def decode(self, x0):
        self.calls["decode"] += len(x0)
        return (x0.flatten(1) @ self.read.T).reshape(-1, 3, 4, 4)

    kernel = core.kernel

    @contextmanager
    def base(self):
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def trainable(self):
        return {"a": self.a, "b": self.b}


def smooth_reward(images, batch):
    """Differentiable, per sample, different for every prompt."""
    scale = torch.tensor([1 + len(p) % 3 for p in batch.prompts], dtype=images.dtype)
    return scale * torch.tanh(images).flatten(1).mean(1) + images.flatten(1).pow(2).mean(1).neg()


def batch(n=5):
    return Batch([f"{'x' * (i + 1)} thing" for i in range(n)])


def draw(n=5, seed=3, update=0):
    return Draw(seed, update, tuple(range(n)))
