"""The one optimiser loop, for every algorithm that changes weights.

An algorithm is a generator that runs once an update; each of its yields is one optimiser step, and what it returns is
the next state, committed together with the weights. So a run can be killed at any moment and goes on from (update,
state).
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from tropism.core import Batch, Info
from tropism.run import checkpoint, checks, ledger
from tropism.run.failed import failures_kept
from tropism.run.optimiser import Optimiser, Parameters, any_process, is_distributed, is_main, schedule_of
from tropism.run.record import Recorder
from tropism.run.rows import merged, statistics
from tropism.run.signals import Interrupted, Stop, stopping

__all__ = ["FitResult", "Interrupted", "Step", "Watcher", "fit"]

HALF = 0.5
"""Factor on the learning rate of a run that has gone back to its best weights."""


class Step(Protocol):
    """An algorithm with its model, reward and hyperparameters bound. If it has a `pace`, that is called with the share of the run that is
    done, before every update.
    """

    def __call__(
        self, batch: Batch, *, state: dict, update: int, seed: int, micro_batch: int | None
    ) -> Generator[tuple[Tensor, Info], None, dict]: ...


class Watcher(Protocol):
    """What looks on: it reports on every update, sounds an alarm, and holds the best weights; see `run.watch.Watch`."""

    on_alarm: str

    def observe(self, update: int, info: Info, before: float, now: float) -> dict[str, float]: ...

    def alarm(self, lines: Sequence[Mapping[str, Any]]) -> str: ...

    def go_back(self, update: int) -> dict[str, Tensor] | None: ...

    def ending(self) -> dict[str, Tensor] | None: ...


@dataclass
class FitResult:
    """A finished run. The parameters themselves hold the result: the EMA if there is one, else the trained weights.

    weights: the trained weights by name (before the EMA took their place). average: the EMA by name, or {}.
    first: the update the run was resumed at, 0 if it was not.
    """

    updates: int
    first: int
    state: dict
    micro_batch: int | None
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


@dataclass
class _Run:
    """What changes while a run goes on: all of it is in a checkpoint, but for the signal that all processes agree on."""

    optimiser: Optimiser
    folder: Path
    keep: int
    update: int = 0
    state: dict = field(default_factory=dict)
    micro_batch: int | None = None
    alive: bool = False
    agreed: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    ended: bool = False

    def save(self) -> None:
        if not is_main():
            return
        tensors = {k: v for k, v in self.state.items() if isinstance(v, Tensor)}
        values = {k: v for k, v in self.state.items() if k not in tensors}
        checkpoint.save(
            self.folder,
            self.update,
            {**self.optimiser.tensors(), "state": tensors},
            {
                **{"state": values, "micro_batch": self.micro_batch, "steps": self.optimiser.steps},
                **{"alive": self.alive, "spent": self.spent, "ended": self.ended, "slowed": self.optimiser.slowed},
            },
            keep=self.keep,
        )

    def restore(self) -> tuple[str, ...]:
        """Go back to the newest whole checkpoint; returns remarks. Without one the run starts at update 0."""
        found = checkpoint.newest(self.folder)
        if found is None:
            return ("There is no complete checkpoint: starting at update 0.",)
        if not found.tensors:
            return (*found.remarks, "No checkpoint is whole: starting at update 0.")
        self.optimiser.load(found.tensors, found.values["steps"])
        self.update, self.micro_batch = found.update, found.values["micro_batch"]
        self.alive, self.spent = found.values["alive"], found.values.get("spent", {})
        self.ended, self.optimiser.slowed = found.values.get("ended", False), found.values.get("slowed", 1.0)
        self.state = {**found.values["state"], **found.tensors.get("state", {})}
        return (*found.remarks, f"Resuming after update {self.update}.")

    @property
    def kept(self) -> str:
        newest = max((p.name for p in self.folder.glob("step-*")), default=None)
        return f"The checkpoint {newest} is kept." if newest else "No checkpoint was written yet."


def fit(
    step: Step,
    parameters: Parameters,
    batches: Callable[[int], Batch],
    *,
    updates: int,
    out: Path | str,
    recorder: Recorder,
    lr: float | Mapping[str, float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    ema: float = 0.0,
    schedule: str = "constant",
    seed: int = 0,
    micro_batch: int | None = None,
    checkpoint_every: int = 50,
    keep: int = 3,
    resume: bool = False,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    evaluate_at: Sequence[float] = (),
    budget: Mapping[str, float] | None = None,
    prices: Mapping[str, float] | None = None,
    watch: Watcher | None = None,
    callback: Callable[[int, Info], None] | None = None,
    finish: Callable[[], None] | None = None,
) -> FitResult:
    """Run `updates` updates of an algorithm by AdamW, on gradients divided by the samples of all processes.

    parameters: {name: tensor} or {group: {name: tensor}}, float32 or float64, trained in place; lr may be one a group.
    batches: update number (from 0) -> this process's rows; a pure function. out: the run folder (holds checkpoints/).
    clip: largest norm of the mean gradient, 0 is off. ema: decay of an average of the weights, 0 is off.
    schedule: how the learning rate goes over the whole run: "constant", or "linear" or "cosine" down to 0.
    micro_batch: rows a piece; what an algorithm reports as scalar "micro_batch" replaces it and is saved.
    evaluate: updates done -> numbers for the record, called with the average in place, before the first update, every
    `evaluate_every` (0: never between) and after the last. budget: {axis of `run.ledger`: limit}; the update that reaches one is the
    last. prices: see `ledger.cost`. evaluate_at: also as soon as these shares of the run, between 0 and 1, are done, however many
    updates that takes. watch: asked after every update for numbers and alarms; on an alarm at an evaluation the run ends with the best
    weights ("stop") or goes back to them with half the rate ("shrink"). callback: (updates done, Info). finish: called at the end
    with the result in the parameters, still protected from signals (export, report).
    Raises UserError for a run that cannot learn, a reward that raises an exception (its batch is kept in failed_batch/), a reward, loss
    or gradient that is not finite, and a full disk; Interrupted after SIGINT or SIGTERM, once the update is finished and saved.
    """
    rate = schedule_of(schedule)
    optimiser = Optimiser(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip, ema=ema)
    run = _Run(optimiser, Path(out) / "checkpoints", keep, micro_batch=micro_batch)
    remarks = run.restore() if resume else ()
    first = run.update
    shown = recorder.showing(run.update or -1, updates, remarks)
    with failures_kept(Path(out)), stopping() as stop, _full_disk_explained(run.folder), shown:
        if evaluate and run.update == 0:
            recorder.write({"update": 0, **_evaluated(evaluate, run)})
        told = recorder.lines() if watch and is_main() else []
        while not run.ended and (done := max(run.update / updates, ledger.share(run.spent, budget))) < 1:
            optimiser.pace(rate(done))
            getattr(step, "pace", lambda _: None)(done)
            before = run.spent.get("forwards", 0.0)
            info, row = _one_update(step, batches(run.update), run, seed, stop, prices)
            now = max(run.update / updates, ledger.share(run.spent, budget))
            last, point = now >= 1, any(done < share <= now for share in evaluate_at)
            if watch:
                row |= watch.observe(run.update, info, before, run.spent["forwards"])
                told.append(row)
            if evaluate and (last or point or (evaluate_every and run.update % evaluate_every == 0)):
                row |= _evaluated(evaluate, run)
                last = _reacted(watch, told, run) or last
            if watch and (alarm := watch.alarm(told)):
                row["alarm"] = alarm
            recorder.write(row)
            if _asked(stop, run) or last or run.update % checkpoint_every == 0:
                run.save()
            if callback:
                callback(run.update, info)
            _leave_if_asked(stop, run, updates)
        result = _result(run, first, watch)
        if finish:
            finish()
        _leave_if_asked(stop, run, updates)
    return result


def _reacted(watch: Watcher | None, told: Sequence[Mapping[str, Any]], run: _Run) -> bool:
    """Do what an alarm asks for; whether the run ends here. All processes do the same: an alarm of one is an alarm of all."""
    if watch is None or watch.on_alarm not in ("stop", "shrink") or not any_process(bool(watch.alarm(told))):
        return False
    if watch.on_alarm == "stop":
        run.ended = True
    elif weights := watch.go_back(run.update):
        run.optimiser.go_back(weights, HALF)
    return run.ended


def _result(run: _Run, first: int, watch: Watcher | None) -> FitResult:
    weights = {n: p.detach().clone() for n, p in run.optimiser.named.items()}
    run.optimiser.use_average()
    if run.ended and watch and (best := watch.ending()):
        run.optimiser.fill(best)
    return FitResult(run.update, first, run.state, run.micro_batch, weights, run.optimiser.average)


def _evaluated(evaluate: Callable[[int], dict[str, float]], run: _Run) -> dict[str, float]:
    with run.optimiser.averaged():
        return evaluate(run.update)


def _asked(stop: Stop, run: _Run) -> int:
    """The signal to leave for, 0 for none: with several processes only one that all know of, or others would wait."""
    return run.agreed if is_distributed() else stop.number


def _leave_if_asked(stop: Stop, run: _Run, updates: int) -> None:
    """Raises Interrupted if a signal has come and the state is saved."""
    number = _asked(stop, run)
    if not number:
        return
    saved = run.folder / f"step-{run.update:06d}"
    if is_main() and not saved.exists():  # the signal came after this update's save was decided
        run.save()
    raise Interrupted(
        128 + number,
        f"Stopped after update {run.update} of {updates}; saved in checkpoints/{saved.name}. "
        "Run the same command with --resume to go on.",
    )


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if checkpoint.is_full(error):
            raise checkpoint.full_disk(folder, error) from error
        raise


# ---------------------------------------------------------------------------------------------------- one update


def _one_update(
    step: Step, batch: Batch, run: _Run, seed: int, stop: Stop, prices: Mapping[str, float] | None
) -> tuple[Info, dict]:
    """Exhaust the generator of one update, then commit the next state: (all that was reported, the record's row)."""
    began, worked, infos, norms = time.perf_counter(), time.process_time(), [], []
    with closing(step(batch, state=run.state, update=run.update, seed=seed, micro_batch=run.micro_batch)) as steps:
        while True:
            try:
                loss, info = next(steps)
            except StopIteration as end:
                state = end.value or {}
                break
            norms.append(_one_step(loss, info, run, stop))
            infos.append(info)
    assert infos, "an algorithm must yield at least once an update"
    info, seconds = merged(infos), time.perf_counter() - began
    _commit(run, state, info)
    run.spent = ledger.added(run.spent, ledger.cost(info.calls, seconds, time.process_time() - worked, prices))
    row = {
        "update": run.update,
        "seconds": seconds,
        **statistics(info),
        **info.scalars,
        "gradient_norm": sum(norms) / len(norms),
        "calls": dict(info.calls),
        "spent": run.spent,
    }
    return info, row


def _one_step(loss: Tensor, info: Info, run: _Run, stop: Stop) -> float:
    """One optimiser step; the norm of its mean gradient. Every check sees sums over all processes, so all agree."""
    checks.has_graph(loss, run.update)
    bad, count = checks.bad_rewards(info)
    totals = run.optimiser.backward(loss, [info.samples, loss.item(), bad, count, stop.number])
    _, value, bad, count, number = totals
    run.agreed = (stop.number or signal.SIGTERM) if number else 0
    norm = run.optimiser.norm()
    checks.finite(run.update, value, norm, bad, count, info, run.kept)
    run.alive = run.alive or checks.can_learn(info, norm, run.update)
    run.optimiser.step(norm)
    checks.weights_finite(run.optimiser.named.values(), run.update, run.kept)
    return norm


def _commit(run: _Run, state: dict, info: Info) -> None:
    plain = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    assert json.loads(json.dumps(plain)) == plain, f"state must hold tensors and JSON values only: {plain}"
    size = info.scalars.get("micro_batch")
    run.micro_batch = int(size) if size else run.micro_batch
    run.state = {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
    run.update += 1
