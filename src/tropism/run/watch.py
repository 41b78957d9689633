"""Watches a run: statistics of its training samples, drift from the base model, held-out scores, the best weights, alarms.

The rules are in `run.sentinel`. Statistics come from samples that training draws anyway; only drift asks the network, one sample at one
step, and never for more than SHARE of the rows that the run has spent. Evaluations are the user's and counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.core import Batch, Draw, Info, Model, Stream, generator
from tropism.run import looks, sentinel
from tropism.run.checks import known
from tropism.run.evaluate import Evaluation
from tropism.run.optimiser import is_main
from tropism.run.products import Judge
from tropism.run.sentinel import REACTIONS, Seen, Verdict

SHARE = 0.01
"""Share of the run's network rows that watching may take."""
REFERENCE = 3
"""Updates whose samples stand for the base model's."""
KEPT = 3
"""Best weights on disk: a resumed run may have to go back to those before the newest."""


@dataclass
class Watch:
    """Called by `fit` with every update and every evaluation.

    judge: the evaluation, called with an update it returns numbers for the record and leaves `after`. batches: update -> its rows.
    What it remembers is in OUT/samples/watched.safetensors and OUT/best, by update, so a run resumed at any of them goes on alike.
    """

    out: Path
    model: Model
    judge: Judge
    batches: Callable[[int], Batch]
    seed: int
    steps: int
    guidance: float
    on_alarm: str = "keep"
    seen: dict[int, Seen] = field(default_factory=dict)
    returns: dict[int, int] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=lambda: Verdict(0))

    def __post_init__(self):
        known(self.on_alarm, REACTIONS, "reaction to an alarm")
        if self.file.is_file():
            self._recall(load_file(self.file))

    @property
    def file(self) -> Path:
        return self.out / "samples" / "watched.safetensors"

    # ------------------------------------------------------------------------------------------------ training samples

    @torch.no_grad()
    def observe(self, update: int, info: Info, before: float, now: float) -> dict[str, float]:
        """What this update's samples say, "samples/<statistic>", for the record.

        update: updates done. before, now: network rows forward that the run had spent before and after it.
        """
        self._forget(update)
        images = info.images
        if self.on_alarm == "off" or not is_main() or images is None or images.ndim != 4 or images.shape[1] != 3:
            return {}
        batch, points = self.batches(update - 1), looks.features(images).cpu()
        if update <= REFERENCE:
            self.reference[update] = points
            self._remember()
        base = torch.cat([p for u, p in sorted(self.reference.items()) if u <= update])
        found = {
            "dark_share": looks.dark_share(images).mean().item(),
            "edge_density": looks.edge_density(images).mean().item(),
            "colour_entropy": looks.colour_entropy(images).mean().item(),
            "variety": looks.variety(points, batch.prompts),
            "vendi": looks.vendi(points, looks.median_distance(base)),
            "frechet": looks.frechet(points, base),
        }
        rows = 4 if self.guidance != 1 else 2
        asked = int(SHARE * now / rows) > int(SHARE * before / rows)
        if asked and (distance := self._distance(update, info, batch)) is not None:
            found["output_distance"] = distance
        return {f"samples/{name}": value for name, value in found.items()}

    def _distance(self, update: int, info: Info, batch: Batch) -> float | None:
        """|out - base's out|^2 / |base's out|^2 on one sample, noised to a random step; None for a process that is not Gaussian."""
        latents, process = info.latents, self.model.process
        if latents is None or not latents.is_floating_point() or not hasattr(process, "forward"):
            return None
        counted = getattr(self.model, "calls", {})
        spent, one = dict(counted), batch[:1]
        draw = Draw(self.seed, update, one.index)
        cond = self.model.encode(one, draw)
        times = process.times(self.steps, cond.shape).tolist()
        t = times[int(generator(self.seed, Stream.WATCH, update).integers(0, len(times) - 1))]
        x_t = process.forward(latents[:1], t, draw(Stream.WATCH, 0, tuple(latents.shape[1:])).to(latents))
        out = self.model.predict(x_t, t, cond, self.guidance)
        with self.model.base():
            base = self.model.predict(x_t, t, cond, self.guidance)
        counted.update(spent)  # what watching takes is not what the method needs
        return ((out - base).square().mean() / base.square().mean().clamp_min(1e-12)).item()

    # ------------------------------------------------------------------------------------------------ evaluations

    def __call__(self, update: int) -> dict[str, Any]:
        """Evaluate, and judge what was seen so far; the numbers for the record, and the update of the best evaluation."""
        numbers: dict[str, Any] = self.judge(update)
        if self.on_alarm == "off":
            return numbers
        self._forget(update)
        self.seen[update] = seen_of(update, self.judge.after)
        self._judge()
        if self.verdict.best == update:
            self._keep_best(update)
        self._remember()
        return numbers | {"best": self.verdict.best}

    def _forget(self, update: int) -> None:
        """What a run that goes on before this update has not seen yet: it was resumed at a checkpoint that is older than its memory."""
        if all(u < update for u in (*self.seen, *self.returns)):
            return
        self.seen = {u: s for u, s in self.seen.items() if u < update}
        self.returns = {at: to for at, to in self.returns.items() if at < update}
        self.verdict = Verdict(0)
        if self.seen:
            self._judge()

    def _judge(self) -> None:
        """The verdict on what was seen, but for evaluations that the run has gone back behind."""
        left_out = lambda u: any(to < u <= at for at, to in self.returns.items())
        self.verdict = sentinel.assess([s for u, s in sorted(self.seen.items()) if not left_out(u)])

    def alarm(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """What is wrong, in words, or "": by held-out scores, else by the statistics in the record's lines."""
        return "" if self.on_alarm == "off" else self.verdict.alarm or sentinel.collapsed(lines)

    def go_back(self, update: int) -> dict[str, Tensor] | None:
        """The best weights by name, for a run that returns to them at this update; its evaluations since then count no more."""
        weights = self.best()
        if weights is not None:
            self.returns[update] = self.verdict.best
            self._remember()
        return weights

    def ending(self) -> dict[str, Tensor] | None:
        """The best weights of a run that an alarm has ended; its pictures after training are then drawn anew."""
        weights = self.best()
        if weights is not None:
            self.judge.forget_last()
        return weights

    # ------------------------------------------------------------------------------------------------ on disk

    def best(self) -> dict[str, Tensor] | None:
        """The weights of the best evaluation by name, on the CPU; None if they are not at hand."""
        file = self._weights(self.verdict.best)
        return load_file(file) if file.is_file() else None

    def _weights(self, update: int) -> Path:
        return self.out / "best" / f"weights-{update:06d}.safetensors"

    def _keep_best(self, update: int) -> None:
        if not is_main():
            return
        _written(self._weights(update), {n: p.detach().cpu() for n, p in self.model.trainable().items()})
        for old in sorted(self._weights(update).parent.glob("weights-*"))[:-KEPT]:
            old.unlink()

    def _remember(self) -> None:
        if not is_main():
            return
        tensors = {f"reference/{u}": p for u, p in self.reference.items()}
        tensors |= {f"return/{at}": torch.tensor([to]) for at, to in self.returns.items()}
        for u, s in self.seen.items():
            columns = {"trained": s.trained} | {f"held_out/{n}": v for n, v in s.held_out.items()}
            tensors |= {f"seen/{u}/{n}": v for n, v in columns.items()}
        _written(self.file, tensors)

    def _recall(self, kept: Mapping[str, Tensor]) -> None:
        for key, value in kept.items():
            kind, number, *rest = key.split("/", 2)
            if kind == "reference":
                self.reference[int(number)] = value
            elif kind == "return":
                self.returns[int(number)] = int(value)
            else:
                seen = self.seen.setdefault(int(number), Seen(int(number), value, {}))
                if rest == ["trained"]:
                    self.seen[int(number)] = replace(seen, trained=value)
                else:
                    self.seen[int(number)] = replace(seen, held_out={**seen.held_out, rest[0].partition("/")[2]: value})
        if self.seen:
            self._judge()


def seen_of(update: int, found: Evaluation) -> Seen:
    """What the sentinel may see of an evaluation: the trained reward, and the watched ones; never another measure.

    A sample without a finite score counts as the worst of those that have one.
    """
    columns = {n: _known(v) for n, v in found.columns.items() if n == "reward" or n.startswith("watch/")}
    return Seen(update, columns.pop("reward"), {n.removeprefix("watch/"): v for n, v in columns.items()})


def _known(values: Tensor) -> Tensor:
    finite = values[values.isfinite()]
    return torch.where(values.isfinite(), values, finite.min() if len(finite) else values.new_zeros(()))


def _written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({n: t.contiguous() for n, t in tensors.items()}, temporary)
    temporary.replace(file)
