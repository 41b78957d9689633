"""What the doctor looks at: two samples of one model through a short chain, their pictures, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from tropism.align.rollout import Chain, Swept, sweep
from tropism.core import Batch, Cond, Draw, Model, Reward, Stream, name_of, noise
from tropism.doctor.slopes import UPDATE, smooth, white

NEGATIVE = "a grey blur"
"""The negative prompt that the doctor tries; embedded with a run's own texts, so that the text encoders need not be read again."""
NEW = 0.05
"""Standard deviation that a factor which is zero (B of a fresh LoRA) is stirred with."""
STIR = 0.1
"""Relative size of the stir of every other parameter."""


@dataclass(frozen=True)
class Finding:
    """What one check says. level: "fault" (this run cannot be right), "warning" or "note".

    text: what was measured, why it matters, one remedy. error: the measured relative error of a note that is a proof.
    """

    level: str
    check: str
    text: str
    error: float | None = None


def fault(text: str) -> Finding:
    return Finding("fault", "", text)


def warning(text: str) -> Finding:
    return Finding("warning", "", text)


def note(text: str) -> Finding:
    return Finding("note", "", text)


def proof(text: str, error: float) -> Finding:
    return Finding("note", "", text, error)


class Case:
    """Everything the checks share, computed once. The two samples' prompts differ where the batch lets them."""

    def __init__(
        self, model: Model, reward: Reward, batch: Batch, guidance: float, steps: int, seed: int, gradient: bool = True
    ):
        self.by_gradient = gradient
        self.model, self.reward, self.guidance, self.seed = model, reward, guidance, seed
        self.asked, self.batch = batch, _pair(batch)
        self.draw = Draw(seed, UPDATE, self.batch.index)
        with torch.no_grad():
            self.cond: Cond = model.encode(self.batch, self.draw)
            self.times = tuple(model.process.times(steps, self.cond.shape).tolist())
            self.x, self.first = model.start(self.cond, self.draw, model.process.times(steps, self.cond.shape))
        self.t, self.s = self.times[self.first], self.times[self.first + 1]

    @property
    def parts(self) -> list[tuple[str, Reward]]:
        """The rewards of a combination, each by its name; else the one there is. A sum would hide a dead part."""
        return [(name_of(part), part) for part, _ in getattr(self.reward, "terms", ((self.reward, 1.0),))]

    # ------------------------------------------------------------------------------------------------ the chain

    def chain(self, rows: slice = slice(None)) -> Chain:
        """The engine's chain over the steps, all active, whose "pictures" are the clean latents, scored with fixed weights."""
        steps = len(self.times) - 1
        given = (cast(Model, _Undecoded(self.model)), _weighed(self.seed), self.batch, self.cond, self.draw)
        return Chain(*given, self.times, self.guidance, (True,) * steps, self.first)[rows]

    @cached_property
    @torch.no_grad()
    def drawn(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """(native outputs of every step, clean latents, pictures) of both samples."""
        chain, x, outs = self.chain(), self.x, []
        for i in chain.running:
            outs.append(chain.predict(i, x))
            x = chain.advance(i, x, outs[-1])
        return outs, x, self.model.decode(self.model.process.complete(x, x))

    def predict(self, x: Tensor | None = None, cond: Cond | None = None, guidance: float | None = None) -> Tensor:
        """The first step's native output of the first sample (1, *S)."""
        w = self.guidance if guidance is None else guidance
        return self.model.predict(self.x[:1] if x is None else x, self.t, self.cond[:1] if cond is None else cond, w)

    @cached_property
    @torch.no_grad()
    def found(self) -> Tensor:
        """The prediction with the adapter as it was found."""
        return self.predict()

    @cached_property
    def jitter(self) -> float:
        """Relative change between two equal calls: 0 but for a GPU's sums, or dropout."""
        with torch.no_grad():
            return change(self.found, self.predict())

    # ------------------------------------------------------------------------------------------------ the adapter

    @torch.no_grad()
    def stir(self) -> None:
        """Move every trainable parameter a little, so that B of a fresh LoRA is not zero and A has a gradient."""
        _ = self.found, self.jitter  # of the weights as they were found
        for p, d in zip(self.parameters, self.random_direction(0), strict=True):
            p.add_((NEW if not p.any() else STIR * size(p)) * d)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.trainable().values())

    def random_direction(self, k: int) -> list[Tensor]:
        """Keyed standard normals in the shapes of the trainable parameters."""
        return [
            noise(self.seed, Stream.EVAL, UPDATE, -1, i, k, p.shape)[0, 0].to(p) for i, p in enumerate(self.parameters)
        ]

    @torch.no_grad()
    def end(self) -> Tensor:
        """Clean latents (1, *S) of the first sample with the parameters as they now are."""
        chain, x = self.chain(slice(0, 1)), self.x[:1]
        for i in chain.running:
            x = chain.advance(i, x, chain.predict(i, x))
        return x

    def weigh(self, x: Tensor) -> Tensor:
        """(B,): the scalar of latents whose gradient is examined."""
        return _weighed(self.seed)(x, self.batch)

    def swept(self) -> Swept:
        """The engine's own gradient of that scalar for the first sample: forward without a graph, then step by step."""
        return sweep(self.chain(slice(0, 1)), self.x[:1], lambda r: r, self.parameters, 1)

    @cached_property
    def gradient(self) -> list[Tensor]:
        return self.swept().gradient

    # ------------------------------------------------------------------------------------------------ pictures

    @cached_property
    def pictures(self) -> tuple[Tensor, Batch]:
        """Four pictures (4, 3, H, W) off the walls, with their batch: the model's two and two of smooth noise; no two pixels tie."""
        own, grain = self.drawn[2].clamp(0, 1), 0.01 * white(self.drawn[2], self.seed, 3)
        made = 0.5 + 0.3 * torch.tanh(smooth(own, self.seed, 2) + 10 * grain)
        return torch.cat([0.2 + 0.6 * own + grain, made]), self.batch[[0, 1, 0, 1]]


class _Undecoded:
    """The model with an open decoder: its pictures are the latents themselves."""

    def __init__(self, model: Model):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def _weighed(seed: int) -> Callable[[Tensor, Batch], Tensor]:
    """A weighted sum of a sample's numbers, the same weights for every sample; (B,)."""

    def score(x: Tensor, batch: Batch) -> Tensor:
        weights = noise(seed, Stream.EVAL, UPDATE, -1, 0, -1, x.shape[1:])[0].to(x)
        return (weights * x).flatten(1).sum(1)

    return score


def _pair(batch: Batch) -> Batch:
    """The first row, and the first one with another prompt, the second, or the first again."""
    other = [i for i, prompt in enumerate(batch.prompts) if prompt != batch.prompts[0]]
    rows = [0, other[0] if other else min(1, len(batch) - 1)]
    return replace(batch[rows], index=(0, 1), rows=(), parent=None)


def size(p: Tensor) -> Tensor:
    """Root mean square: the unit of a parameter's relative step."""
    return p.detach().pow(2).mean().sqrt()


def change(before: Tensor, after: Tensor) -> float:
    """Relative size of a difference."""
    before, after = before.float(), after.float()
    scale = max(before.norm().item(), after.norm().item())
    return (after - before).norm().item() / scale if scale else 0.0


def module_names(names: list[str]) -> str:
    """The modules of parameter names, the first five."""
    modules = list(dict.fromkeys(name.split(".lora_")[0] for name in names))
    return ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")


def finite(tensors: Iterator[Tensor] | list[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
