"""Rewards on scales of their own, and weights that change over a run: what is around an algorithm, not inside it.

Every term of a sum is taken as (r - mean) / std. The numbers come from samples of the base model at update 0 ("base"), and with
"running" follow the training samples from there. They are constants of an update, so a loss stays per sample; they travel in the
algorithm's state, so a resumed run goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tropism.align.rollout import sample
from tropism.core import Batch, Info, Model, Reward, UserError, gather
from tropism.noise import Draw

KINDS = ("none", "base", "running")
DECAY = 0.9
LEAST = 1e-8

Step = Generator[tuple[Tensor, Info], None, dict]


@dataclass
class Scaled:
    """An algorithm around which a sum of rewards is normalised and its weights go from the first to the last update.

    function: (reward) -> the algorithm's step, see `run.fit.Step`. reward: a sum with `terms` and `scales`.
    kind: "none", "base" or "running". ramps: name of a term -> its weight at the run's end, the last update or where its budget is spent,
    whichever comes first; linear from its own. done: the share of the run that lies behind, as `pace` was told it.
    Raises UserError for an unknown kind, a ramp of no term, or scales for a reward that is not a sum.
    """

    function: Callable[[Reward], Callable[..., Step]]
    model: Model
    reward: Any
    updates: int
    steps: int
    guidance: float
    kind: str = "none"
    ramps: Mapping[str, float] = field(default_factory=dict)
    done: float = field(default=0.0, init=False)

    def __post_init__(self):
        names = getattr(self.reward, "names", [])
        if self.kind not in KINDS:
            raise UserError(f"There is no normalisation '{self.kind}'. Known: {', '.join(KINDS)}.")
        if (self.kind != "none" or self.ramps) and getattr(self.reward, "kind", "") != "sum":
            raise UserError(
                "Normalisation and ramps are for a sum of rewards, and this is one reward. Give a second --reward, or leave them out."
            )
        for name in self.ramps:
            if name not in names:
                raise UserError(f"There is a ramp for '{name}', which is none of the rewards {', '.join(names)}.")

    def __call__(self, batch: Batch, *, state: dict, update: int, seed: int, micro_batch: int | None) -> Step:
        if self.kind == "none" and not self.ramps:
            return (
                yield from self.function(self.reward)(
                    batch, state=state, update=update, seed=seed, micro_batch=micro_batch
                )
            )
        network = getattr(self.model, "calls", {})
        before, known = network.get("network", 0), state.get("scales")
        scales = known or self._measured(batch, seed, micro_batch)
        begun = {"forward": network.get("network", 0) - before, **({} if known else _of_samples(self.kind, len(batch)))}
        following, own = scales, {}
        steps = self.function(self._at(update, scales))(
            batch, state=state.get("own", {}), update=update, seed=seed, micro_batch=micro_batch
        )
        while True:
            try:
                loss, info = next(steps)
            except StopIteration as end:
                own = end.value
                break
            following = self._followed(scales, info)
            info.scalars |= {f"scale/{name}": spread for name, (_, spread) in scales.items()}
            if self.kind != "none":
                info.columns = self._as_given(info.columns, update)
            info.calls = {name: info.calls.get(name, 0) + begun.get(name, 0) for name in info.calls | begun}
            begun = {}
            yield loss, info
        return {"scales": following, "own": own}

    def pace(self, done: float) -> None:
        """Before every update: the share of the run, of its updates or its budget, that is done."""
        self.done = done

    def _as_given(self, columns: dict[str, Tensor], update: int) -> dict[str, Tensor]:
        """The columns with "reward" in the user's own units, as evaluations have it, and "reward_normalised" beside it."""
        now = self._at(update, {})
        raw = now.join([columns[n].nan_to_num(nan=0.0) for n in now.names], [w for _, w in now.terms])
        return {
            "reward": raw,
            "reward_normalised": columns["reward"],
            **{n: columns[n] for n in columns if n != "reward"},
        }

    def _at(self, update: int, scales: Mapping[str, list[float]]) -> Any:
        """The reward of an update: its scales, and its weights on their way."""
        done = max(update / max(1, self.updates - 1), self.done)
        named = zip(self.reward.names, self.reward.terms, strict=True)
        now = tuple((r, w + done * (self.ramps.get(n, w) - w)) for n, (r, w) in named)
        return replace(self.reward, terms=now, scales={n: (m, s) for n, (m, s) in scales.items()})

    def _measured(self, batch: Batch, seed: int, micro_batch: int | None) -> dict[str, list[float]]:
        """Mean and spread of every term over the base model's own samples of the first batch."""
        if self.kind == "none":
            return {}
        size, columns = micro_batch or len(batch), []
        with torch.no_grad(), self.model.base():
            for at in range(0, len(batch), size):
                part = batch[at : at + size]
                images = sample(self.model, part, Draw(seed, 0, part.index), steps=self.steps, guidance=self.guidance)
                columns.append(self.reward.parts(images, part))
        return self._scales({n: torch.cat([c[n] for c in columns]) for n in columns[0]})

    def _scales(self, columns: Mapping[str, Tensor]) -> dict[str, list[float]]:
        found = {}
        for name in self.reward.names:
            values, _ = gather(columns[name].detach().double(), range(len(columns[name])))
            values = values[values.isfinite()]
            spread = values.std(correction=0).item() if len(values) > 1 else 0.0
            if spread < LEAST:
                raise UserError(
                    f"Reward '{name}' says {values[:1].tolist()} of every one of {len(values)} pictures, so it has no scale of its own. "
                    "Leave --normalise out, take a larger --batch, or drop this reward."
                )
            found[name] = [values.mean().item(), spread]
        return found

    def _followed(self, scales: dict[str, list[float]], info: Info) -> dict[str, list[float]]:
        if self.kind != "running":
            return scales
        try:
            new = self._scales(info.columns)
        except UserError:  # a batch of equal values says nothing new
            return scales
        mixed = {}
        for name, (mean, spread) in scales.items():
            m, s = new[name]
            mixed[name] = [DECAY * mean + (1 - DECAY) * m, (DECAY * spread**2 + (1 - DECAY) * s**2) ** 0.5]
        return mixed


def _of_samples(kind: str, samples: int) -> dict[str, int]:
    """What the samples that the scales are measured on cost, beside the network."""
    return {"decode": samples, "reward": samples} if kind != "none" else {}
