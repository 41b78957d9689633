"""Held-out evaluation: pictures on fixed seeds at deployment settings, the reward with its parts, and honest measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, Model, Reward, UserError, scored_parts
from tropism.prompts.batches import names_of
from tropism.run.measures import Measure

UPDATE = 2**40
"""The update number of evaluation noise: no training run gets there, so the two never share a draw."""


@dataclass(frozen=True)
class Evaluation:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU, prompt-major, and what was measured on each.

    columns: name -> (B,): "reward", its parts, each measure, and "drift" where a base was given.
    diversity: see `diversity`; None where there is no pair to compare.
    """

    images: Tensor
    columns: dict[str, Tensor]
    prompts: list[str]
    diversity: float | None = None

    def numbers(self) -> dict[str, float]:
        """For the record: means as "held_out/<column>", "drift" and "diversity" under their own names.

        Samples without a finite score, and rows of a part that is not meant for their prompt, are left out.
        """
        row = {n if n == "drift" else f"held_out/{n}": finite_mean(v) for n, v in self.columns.items()}
        if lost := int((~torch.isfinite(self.columns["reward"])).sum()):
            row["held_out/nonfinite"] = float(lost)
        return row if self.diversity is None else row | {"diversity": self.diversity}


def finite_mean(values: Tensor) -> float:
    """The mean of the finite values; NaN without one. What a reward cannot score takes no part."""
    return values[torch.isfinite(values)].double().mean().item()


@torch.no_grad()
def evaluate(
    model: Model,
    reward: Reward,
    prompts: Sequence[str] | Batch,
    *,
    steps: int,
    guidance: float,
    seed: int,
    per_prompt: int = 1,
    measures: Mapping[str, Measure] | None = None,
    batch_size: int = 16,
    base: Tensor | None = None,
    index: Sequence[int] | None = None,
    eta: float | None = None,
    watch: Mapping[str, Reward] | None = None,
) -> Evaluation:
    """Draw `per_prompt` pictures of every prompt and measure them; one seed gives one noise for any batch size.

    prompts: texts, or a Batch where negative prompts, metadata or references go with them. eta: of the chain that draws, in place of
    the model's own: what is trained on a stochastic chain is mostly used on a deterministic one. watch: rewards that were not
    trained on, as columns "watch/<name>".
    base: the base model's pictures of the same call (B, 3, H, W); adds the column "drift", the mean squared difference
    of each picture to its twin. index: the number that keys each picture's noise, default its place; so some of a larger call's
    pictures can be drawn again. Raises UserError for no prompts or a reward of the wrong shape.
    """
    if not prompts:
        raise UserError(
            "There are no prompts to evaluate on (0 given, at least 1 needed). Give a file with one prompt a line."
        )
    asked = prompts if isinstance(prompts, Batch) else Batch(list(prompts))
    repeated = [i for i in range(len(asked)) for _ in range(per_prompt)]
    keys = tuple(range(len(repeated)) if index is None else index)
    batch = replace(asked[repeated], index=keys, rows=(), parent=None)
    images, columns = [], []
    with _noise_level(model, eta):
        for at in range(0, len(batch), batch_size):
            piece = batch[at : at + batch_size]
            drawn = sample(model, piece, Draw(seed, UPDATE, piece.index), steps=steps, guidance=guidance)
            images.append(drawn.float().cpu())
            columns.append(columns_of(drawn, piece, reward, measures or {}, watch or {}))
    pictures = torch.cat(images)
    joined = {n: torch.cat([c[n] for c in columns]) for n in columns[0]}
    if base is not None:
        joined["drift"] = (pictures - base).pow(2).flatten(1).mean(1)
    return Evaluation(pictures, joined, names_of(batch), diversity(pictures, per_prompt))


@contextmanager
def _noise_level(model: Any, eta: float | None) -> Iterator[None]:
    """Inside, the model's chain has this eta; None leaves it. Raises UserError for a process without one."""
    own = model.process
    if eta is not None:
        if not hasattr(own, "eta"):
            raise UserError("This model's process has no eta, so it cannot be evaluated at another one.")
        model.process = replace(own, eta=eta)
    try:
        yield
    finally:
        model.process = own


def columns_of(
    images: Tensor, batch: Batch, reward: Reward, measures: Mapping[str, Measure], watch: Mapping[str, Reward]
) -> dict[str, Tensor]:
    """What is measured on pictures (B, 3, H, W): "reward", its parts and every other measure, each (B,) float32 on the CPU."""
    total, parts = scored_parts(reward, images, batch)
    columns = {"reward": total, **parts, **{f"watch/{n}": scored_parts(r, images, batch)[0] for n, r in watch.items()}}
    for name, measure in measures.items():
        columns |= {name if key == name else f"{name}/{key}": v for key, v in measure(images, batch).items()}
    return {n: v.detach().float().cpu() for n, v in columns.items()}


def diversity(images: Tensor, per_prompt: int = 1) -> float | None:
    """Mean over pairs of pictures of their root-mean-square pixel difference, in [0, 1]; None without a pair.

    With several pictures a prompt the pairs are those of equal prompt (one prompt's variety); with one, all pairs of
    the set, which falls towards 0 when every prompt gets the same picture.
    """
    flat = images.flatten(1)
    groups = flat.split(per_prompt) if per_prompt > 1 else (flat,)
    if len(groups[0]) < 2:
        return None
    scale = flat.shape[1] ** -0.5
    return torch.stack([torch.pdist(g).mean() for g in groups]).mean().item() * scale
