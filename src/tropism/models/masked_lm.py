"""A masked diffusion model of token sequences: a dilated convolutional network without a time input.

Source: Simple and Effective Masked Diffusion Language Models, arXiv 2406.07524, section 3 (no time input); the network's form follows
Dirichlet Flow Matching, arXiv 2402.05841, appendix (dilated convolutions for DNA).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism import core
from tropism.core import Batch, Draw, UserError
from tropism.models.own import Prompts
from tropism.process.masked import Masked


@dataclass(frozen=True)
class Shape:
    """What the network is made of. dilations: one a layer, repeated `repeats` times. alphabet: the tokens' letters or names."""

    alphabet: tuple[str, ...]
    length: int
    hidden: int = 64
    kernel: int = 9
    dilations: tuple[int, ...] = (1, 1, 4, 16, 64)
    repeats: int = 2


class Convolutions(nn.Module):
    """Logits (B, L, V) of tokens (B, L) in 0..V, or of relaxed states (B, L, V + 1)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, width = shape, len(shape.alphabet)
        self.embed = nn.Parameter(torch.randn(width + 1, shape.hidden) * 0.5)
        layers = shape.dilations * shape.repeats
        self.norms = nn.ModuleList(nn.LayerNorm(shape.hidden) for _ in layers)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(shape.hidden, shape.hidden, shape.kernel, padding="same", dilation=d) for d in layers
        )
        self.out = nn.Sequential(nn.LayerNorm(shape.hidden), nn.Linear(shape.hidden, shape.hidden), nn.GELU())
        self.head = nn.Linear(shape.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.embed) @ self.embed if x.is_floating_point() else self.embed[x]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = h + F.gelu(convolution(norm(h).transpose(1, 2)).transpose(1, 2))
        return self.head(self.out(h))


class Independent(nn.Module):
    """Logits of tokens that do not depend on each other: exact for a prior of independent places. probs (V,)."""

    def __init__(self, probs: Sequence[float], shape: Shape):
        super().__init__()
        self.shape = shape
        self.logits = nn.Parameter(torch.tensor(probs).log(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:2], len(self.logits))


class MaskedModel:
    """Tokens from masks; needs no prompt and no guidance. Samples are tokens (B, L); relaxed ones stay (B, L, V).

    full: the network's weights can be trained. `calls` counts rows through the network.
    """

    guidance, uses_time = 1.0, False

    def __init__(
        self,
        network: Convolutions | Independent,
        *,
        device: str | torch.device = "cpu",
        steps: int = 64,
        full: bool = False,
        world: str = "",
    ):
        self.world = world
        trains = full and isinstance(network, Convolutions)
        self.network = network.to(device).eval().requires_grad_(trains)
        self.device, self.dtype = torch.device(device), torch.float32
        self.letters, self.shape, self.steps = network.shape.alphabet, (network.shape.length,), steps
        self.process = Masked(len(self.letters))
        self.calls = {"network": 0, "backward": 0, "decode": 0}

    def encode(self, batch: Batch, draw: Draw | None = None) -> Prompts:
        return Prompts(tuple(batch.prompts), self.shape)

    def start(self, cond: Any, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
        return torch.full((len(cond), *self.shape), self.process.mask, device=self.device), 0

    def predict(self, x_t: Tensor, t: float | Tensor, cond: Any, guidance: float) -> Tensor:
        """Logits (B, L, V)."""
        out = self.network(x_t)
        core.count_rows(self.calls, out, len(x_t))
        return out

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor) -> Tensor:
        """Probabilities (B, L, V); a decoded token has its own for sure."""
        probs = out.softmax(-1)
        if x_t.is_floating_point():
            return probs
        sure = F.one_hot(x_t.clamp_max(probs.shape[-1] - 1), probs.shape[-1]).to(probs)
        return torch.where((x_t == self.process.mask)[..., None], probs, sure)

    kernel = core.kernel

    def decode(self, x0: Tensor) -> Tensor:
        self.calls["decode"] += len(x0)
        return x0

    def latents(self, samples: Tensor) -> Tensor:
        return samples

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}


def loss(
    network: nn.Module, process: Masked, tokens: Tensor, t: Tensor, noise: Tensor, weight: float | Tensor = 1.0
) -> Tensor:
    """Mean over (B, L) of -log p(x_0) / t on masked places: the negative evidence bound a token, in nats.

    tokens (B, L), t (B,) in (0, 1], noise: standard normals (B, L). weight: (B,) one over the density of t, where it is not uniform.
    """
    return (bounds(network, process, tokens, t, noise) * weight).mean()


def bounds(network: nn.Module, process: Masked, tokens: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """`loss` of every row (B,)."""
    x_t = process.forward(tokens, t, noise)
    each = F.cross_entropy(network(x_t).float().transpose(1, 2), tokens, reduction="none")
    return (each * (x_t == process.mask)).mean(1) * process.loss_weight(t)


def save(network: Convolutions, file: Path, world: str = "") -> None:
    """Weights in float16, with the network's shape and the name of its world in the header."""
    tensors = {n: p.detach().half().contiguous() for n, p in network.state_dict().items()}
    save_file(tensors, file, metadata={"shape": json.dumps(asdict(network.shape)), "world": world})


def header(file: str | Path) -> dict[str, str]:
    """What `save` wrote beside the weights. Raises UserError for another file."""
    try:
        with safe_open(str(file), "pt") as f:
            told = f.metadata() or {}
        json.loads(told["shape"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{file} does not hold a model of tokens as `align distil` and `pretrain` write it ({type(error).__name__}: {error})."
        ) from error
    return told


def load(file: str | Path) -> Convolutions:
    """A network that `save` wrote."""
    told = json.loads(header(file)["shape"])
    listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    network = Convolutions(Shape(**listed))
    network.load_state_dict({n: p.float() for n, p in load_file(str(file)).items()})
    return network
