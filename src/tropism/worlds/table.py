"""A masked diffusion model whose every answer is known: a table of all sequences, its exact conditionals, and the law of its chain.

A masked step decodes positions independently, so a chain of few steps does not have the data's law even with exact conditionals:
soft values and the tilted law are those of the chain that is run, by dynamic programming over all (V + 1)^L states.
Source: SVDD, arXiv 2408.08252, section 4.1 and appendix D (soft Bellman equation).
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import TERMINAL, Batch, Draw, count_rows
from tropism.core import kernel as default_kernel
from tropism.process.kernels import Categorical
from tropism.process.masked import Masked


class _Cond:
    def __init__(self, shape: tuple[int, ...], rows: int):
        self.shape, self._rows = shape, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows) -> _Cond:
        return _Cond(self.shape, len(range(self._rows)[rows]) if isinstance(rows, slice) else len(rows))


class TableModel:
    """The exact denoiser of a law over V^L sequences: `predict` is p(token | what is decoded), (B, L, V), float64.

    Relaxed states (B, L, V + 1) get the mean over the states that their rows stand for. It has no time input.
    `calls` counts its rows as a network's. Samples are tokens (B, L).
    """

    dtype, device, steps, guidance, uses_time = torch.float64, torch.device("cpu"), 4, 1.0, False

    def __init__(self, law: Tensor):
        """law: (V, ..., V), L axes, probabilities or weights that sum to more than 0."""
        self.law = law.double() / law.double().sum()
        self.vocabulary, self.length = law.shape[0], law.ndim
        self.process = Masked(self.vocabulary, end=0.0)
        self.calls = {"network": 0, "backward": 0, "decode": 0}

    @classmethod
    def random(cls, vocabulary: int = 4, length: int = 4, seed: int = 0, sharpness: float = 1.0) -> TableModel:
        """A law whose logarithms are normal."""
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary,) * length
        return cls((sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)).exp())

    # ------------------------------------------------------------------------------------------------ as a model

    def encode(self, batch: Batch, draw: Draw | None = None) -> _Cond:
        return _Cond((self.length,), len(batch))

    def start(self, cond: _Cond, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
        return torch.full((len(cond), self.length), self.process.mask), 0

    def predict(self, x_t: Tensor, t: float | Tensor, cond: _Cond | None = None, guidance: float = 1.0) -> Tensor:
        if x_t.is_floating_point():  # a relaxed state: every state in proportion to its probability under the rows
            weight = torch.ones(len(x_t), len(self.states), dtype=x_t.dtype)
            for i in range(self.length):
                weight = weight * x_t[:, i][:, self.states[:, i]]
            out = torch.einsum("bs,slv->blv", weight, self._conditionals.to(x_t))
        else:
            out = self._conditionals[self.index(x_t)]
        count_rows(self.calls, out, len(x_t))
        return out

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor) -> Tensor:
        return out

    kernel = default_kernel

    def decode(self, x0: Tensor) -> Tensor:
        self.calls["decode"] += len(x0)
        return x0

    def latents(self, samples: Tensor) -> Tensor:
        return samples

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {}

    # ------------------------------------------------------------------------------------------------ exact answers

    def index(self, x: Tensor) -> Tensor:
        """The number (B,) of states (B, L), MASK included, in the order of `states`."""
        base = self.vocabulary + 1
        return (x * base ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    @cached_property
    def states(self) -> Tensor:
        """All ((V + 1)^L, L) states."""
        return torch.tensor(list(itertools.product(range(self.vocabulary + 1), repeat=self.length)))

    @cached_property
    def clean(self) -> Tensor:
        """The numbers (V^L,) of the states without a MASK, in the order of the law's entries."""
        return (self.states != self.process.mask).all(1).nonzero()[:, 0]

    @cached_property
    def _conditionals(self) -> Tensor:
        """p(x_i = v | decoded tokens) (states, L, V)."""
        found = torch.empty(len(self.states), self.length, self.vocabulary, dtype=torch.float64)
        for n, state in enumerate(self.states.tolist()):
            kept = tuple(slice(None) if token == self.process.mask else slice(token, token + 1) for token in state)
            here = self.law[kept]
            for i, token in enumerate(state):
                if token == self.process.mask:
                    marginal = here.sum([j for j in range(self.length) if j != i])
                    found[n, i] = marginal / marginal.sum()
                else:
                    found[n, i] = F.one_hot(torch.tensor(token), self.vocabulary)
        return found

    def transition(self, t: float, s: float) -> Tensor:
        """p(x_s | x_t) of one step, (states, states)."""
        probs = cast(Categorical, self.process.reverse(self.states, self._conditionals, t, s)).probs
        found = torch.ones(len(self.states), len(self.states), dtype=torch.float64)
        for i in range(self.length):
            found *= probs[:, i][:, self.states[:, i]]
        return found

    def transitions(self, steps: int) -> list[Tensor]:
        return [self.transition(t, s) for t, s in pairwise(self.process.times(steps).tolist())]

    def chain_law(self, steps: int) -> Tensor:
        """The law (V, ..., V) that a chain of so many steps really has."""
        masked = self.index(torch.full((1, self.length), self.process.mask))
        probability = F.one_hot(masked[0], len(self.states)).double()
        for transition in self.transitions(steps):
            probability = probability @ transition
        return probability[self.clean].reshape(self.law.shape)

    def soft_values(self, reward: Tensor, alpha: float, steps: int) -> list[Tensor]:
        """v_t (states,) at every time of the chain and at its end, for rewards (V^L,) in the order of the law's entries.

        v = alpha log E[exp(r(x_0) / alpha) | x_t] by the soft Bellman equation; at the end -inf where a MASK is left.
        """
        value = torch.full((len(self.states),), -torch.inf, dtype=torch.float64)
        value[self.clean] = reward.double() / alpha
        found = [alpha * value]
        for transition in reversed(self.transitions(steps)):
            top = value[self.clean].max()
            value = (transition @ (value - top).exp()).log() + top
            found.insert(0, alpha * value)
        return found

    def tilted(self, reward: Tensor, alpha: float, steps: int) -> tuple[Tensor, float]:
        """(chain law times exp(r / alpha), normalised, shaped as the law; log of its sum)."""
        log = self.chain_law(steps).flatten().log() + reward.double() / alpha
        return log.softmax(0).reshape(self.law.shape), torch.logsumexp(log, 0).item()

    def value_at(self, values: list[Tensor], x: Tensor, t: float, steps: int) -> Tensor:
        """(B,): the value of states (B, L) at a time of the chain, from `soft_values`."""
        at = steps if t == TERMINAL else round((1 - t) * steps)
        return values[at][self.index(x)]
