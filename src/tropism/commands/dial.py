"""The command that turns an adapter up and down, or mixes two, and shows what that does to reward and diversity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tropism.commands.compare import config_of, deployed, trained_model
from tropism.core import Batch, Model, Reward, UserError
from tropism.models import lora, mixing
from tropism.models.latent import Latent
from tropism.models.phases import Phased
from tropism.prompts.batches import as_batch, names_of
from tropism.run import dial as dialling
from tropism.run import dial_page
from tropism.run.checks import at_least_one, set_up
from tropism.run.dial import PROBES, STRENGTHS, WEIGHTS, Several, Stop, some
from tropism.run.dial_page import Dialled
from tropism.run.evaluate import Evaluation, columns_of, diversity, evaluate
from tropism.run.measures import measures_for
from tropism.run.record import Recorder
from tropism.run.report import spread
from tropism.run.request import Rewards, as_plain, read_reward, spelled
from tropism.run.sources import prompts_for

FRESH = 2**20
"""The first index of fresh pictures' noise: no evaluation has so many prompts, so the two never share a draw."""


def dial(
    runs: Sequence[str],
    *,
    out: str | Path,
    at: Sequence[float] = (),
    pictures: int = 16,
    quick: bool = False,
    phases: bool = False,
    check: int = 0,
    keep: float = 0.9,
    reward: Rewards = (),
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    command: str = "",
) -> Dialled:
    """Turn a finished run's adapter from 0 to 1.5, or mix those of two runs; leave a page with a slider and a setting to use.

    runs: one folder of `align`, or two of the same base model. at: the strengths, or weights of the second adapter, to draw.
    pictures: held-out prompts that are drawn at each, with the same noise. quick: draw only the 16 pictures that the prediction
    needs. phases: also vary the adapter in the early, middle and late third of the chain alone. check: fresh pictures a setting that
    the prediction is held against. keep: the share of the base's diversity that the recommended setting keeps at least. reward: the
    run's, where that was made in Python.
    Raises UserError for folders that are no finished runs with an adapter, runs of unlike bases, and settings out of range.
    """
    _check(runs, pictures, check, keep, phases)
    places = sorted({*(at or (STRENGTHS if len(runs) == 1 else WEIGHTS)), *PROBES[len(runs)]})
    if quick:
        places = sorted({0.0, 1.0, *PROBES[len(runs)]})
    stops = dialling.stops(places, len(runs), phases)
    place, precision = set_up(device, dtype, threads)
    bench = _bench(runs, reward, place, precision)
    config = as_plain(
        {"runs": [str(r) for r in runs], "at": places, "pictures": pictures, "quick": quick, "phases": phases}
    )
    config |= as_plain({"check": check, "keep": keep, "reward": spelled(reward), "device": device, "dtype": dtype})
    with Recorder(out, config, overwrite=overwrite) as recorder:
        ends = bench.ends(recorder.say)
        rows = spread(len(bench.asked), pictures)
        names, known = [*bench.rewards, "diversity"], [dialling.quantities(end) for end in ends]
        probing = dialling.plan(known, names, PROBES[len(runs)], rows)
        if quick:
            rows = min(probing.values(), key=len)
        drawn, probes = _sweep(bench, stops, rows, probing, ends, recorder.say)
        fresh = _fresh(bench, stops, check, recorder.say)
        found = dial_page.Dialled(
            out=Path(out),
            runs=[str(run) for run in runs],
            base=str(bench.base_name),
            rewards=bench.rewards,
            stops=stops,
            rows=rows,
            probes=probes,
            before=bench.before,
            ends=ends,
            drawn=drawn,
            fresh=fresh,
            keep=keep,
            command=command,
            config=config,
            environment=recorder.environment,
        )
        if not quick:
            found = _with_recommended(found, bench, recorder.say)
        page = dial_page.write(found)
        recorder.say(dial_page.summary(found) + f"\nSee {page}")
    return found


def _check(runs: Sequence[str], pictures: int, check: int, keep: float, phases: bool) -> None:
    if not 1 <= len(runs) <= 2:
        raise UserError(
            f"{len(runs)} runs were named; the dial takes one, or mixes two: tropism dial RUN1 RUN2 --out DIR."
        )
    if len(runs) == 2 and phases:
        raise UserError(
            "The phases of the chain are varied for one adapter at a time. Name one run, or leave --phases out."
        )
    at_least_one(pictures=pictures)
    if check < 0 or check == 1:
        raise UserError(
            f"check is {check}; it is a number of fresh pictures, at least 2, or 0 for none. Try --check 50."
        )
    if not 0 <= keep <= 1:
        raise UserError(f"keep is {keep:g}; it is a share of the base's diversity in 0..1. Try --keep 0.9.")


# ---------------------------------------------------------------------------------------------------- what is dialled


@dataclass(frozen=True)
class _Bench:
    """A model with one or two finished adapters, and the pictures of its first run to hold all others against.

    rewards: the columns that count, one for each run. asked: the run's held-out prompts. images: of the base. kept: those of each
    run after training, None where they were of other prompts or noise, or not kept.
    """

    folders: list[Path]
    model: Latent
    base_name: str
    reward: Reward
    rewards: list[str]
    asked: Batch
    seed: int
    steps: int
    guidance: float
    eta: float | None
    images: Tensor
    kept: list[Tensor | None]

    @cached_property
    def before(self) -> Evaluation:
        """The base model's pictures."""
        return self.seen(self.images, range(len(self.asked)))

    def seen(self, images: Tensor, rows: Sequence[int]) -> Evaluation:
        """Pictures of some of the prompts, measured."""
        batch = self.asked[list(rows)]
        columns = columns_of(images, batch, self.reward, measures_for(batch), {})
        return Evaluation(images, columns, names_of(batch), diversity(images))

    def draw(self, stop: Stop, asked: Batch, index: Sequence[int]) -> Evaluation:
        """Pictures of prompts at a setting, with the run's noise of these indices, measured."""
        with self._acting(stop) as model:
            return evaluate(
                model,
                self.reward,
                asked,
                steps=self.steps,
                guidance=self.guidance,
                seed=self.seed,
                measures=measures_for(asked),
                index=index,
                eta=self.eta,
            )

    @contextmanager
    def _acting(self, stop: Stop) -> Iterator[Model]:
        if len(self.folders) == 2:
            mixing.mix(self.model, dict(_summed(self.folders, stop.weights)))
            yield cast(Model, self.model)
        elif stop.group:
            yield cast(Model, Phased(self.model, stop.weights, self.steps))
        else:
            with lora.scaled(self.model, stop.weights[0]):
                yield cast(Model, self.model)

    def ends(self, say: Callable[[str], None]) -> tuple[Evaluation, Evaluation]:
        """All of the run's held-out pictures at places 0 and 1: those that the runs left, or else drawn again."""
        places, found = ([None, *self.kept] if len(self.folders) == 1 else self.kept), []
        for place, images in zip((0.0, 1.0), places, strict=True):
            every = range(len(self.asked))
            if len(self.folders) == 1 and place == 0:
                found.append(self.before)
            elif images is not None:
                found.append(self.seen(images, every))
            else:
                say(f"Drawing {len(every)} pictures that the run did not keep ...")
                weights = (1.0,) if len(self.folders) == 1 else (1 - place, place)
                found.append(self.draw(Stop("", place, weights), self.asked, every))
        return found[0], found[1]


def _summed(folders: Sequence[Path], weights: Sequence[float]) -> Iterator[tuple[Path, float]]:
    """(adapter, weight); a folder named twice has both weights."""
    for folder in dict.fromkeys(folders):
        yield folder / "lora", sum(w for f, w in zip(folders, weights, strict=True) if f == folder)


def _bench(runs: Sequence[str], reward: Rewards, device: torch.device, dtype: torch.dtype) -> _Bench:
    """Read the runs. Raises UserError for what is no finished run, and for two that do not go together."""
    folders, configs = [Path(run) for run in runs], [_finished(Path(run)) for run in runs]
    first = configs[0]
    for run, config in zip(runs, configs, strict=True):
        if config["model"] != first["model"]:
            raise UserError(
                f"{run} trained {config['model']}, but {runs[0]} trained {first['model']}. Mix adapters of one base."
            )
    rewards = [_reward(run, config, reward) for run, config in zip(runs, configs, strict=True)]
    names = ["reward"] if len(runs) == 1 else [f"reward of {name}" for name in _names(folders)]
    joint = rewards[0] if len(runs) == 1 else Several(dict(zip(names, rewards, strict=True)))
    told, images = _pictures(folders[0] / "samples" / "before.safetensors")
    model = trained_model(folders[0], first, device, dtype)
    held = prompts_for(first, first["model"], model)[1]
    asked = as_batch([held[i] for i in spread(len(held), first["evaluate_prompts"])])
    if names_of(asked) != json.loads(told["held-out prompts"]):
        raise UserError(
            f"The prompts of {runs[0]} have changed since ({first['held_out'] or first['prompts']}), so its pictures are not of them. "
            "Put the file back as it was."
        )
    if len(images) != len(asked):
        raise UserError(
            f"{runs[0]} was evaluated with {len(images)} pictures of {len(asked)} prompts; the dial reads one each. Name a run of "
            "`tropism align`."
        )
    steps, guidance = deployed(first)
    kept = [_after(folder, told) for folder in folders]
    of_run = (asked, first["seed"], steps, guidance, first.get("evaluate_eta"), images, kept)
    return _Bench(folders, cast(Latent, model), first["model"], cast(Reward, joint), names, *of_run)


def _finished(run: Path) -> dict[str, Any]:
    config = config_of(run)
    if "updates" not in config or config.get("method") == "distil":
        raise UserError(
            f"{run} is not a run of align, whose adapter has a strength. Name a folder that `tropism align METHOD` left."
        )
    if not (run / "report.html").exists() or not (run / "samples" / "before.safetensors").is_file():
        raise UserError(f"The run in {run} is not finished. Go on with the same command and --resume.")
    if not (run / "lora").is_dir():
        raise UserError(
            f"{run} trained every weight (--full), so there is no adapter whose strength could be dialled. Name a run that trained a LoRA."
        )
    return config


def _reward(run: str, config: dict[str, Any], given: Rewards) -> Reward:
    if given:
        return read_reward(given)
    try:
        return read_reward(config["reward"])
    except UserError as error:
        raise UserError(f"The reward of {run} cannot be read again: {error} Or name it: --reward.") from error


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [f"{i + 1}: {name}" for i, name in enumerate(names)]


def _pictures(file: Path) -> tuple[dict[str, str], Tensor]:
    """(what a file of pictures is of, the pictures)."""
    try:
        with safe_open(file, "pt") as f:
            told = f.metadata() or {}
        return told, load_file(file)["images"]
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}). Train the run again.") from error


def _after(run: Path, told: dict[str, str]) -> Tensor | None:
    """The run's pictures after training, if they were kept and are of the same prompts, noise, steps and guidance."""
    file = run / "samples" / "after.safetensors"
    if not file.is_file():
        return None
    of, images = _pictures(file)
    same = all(of.get(name) == told.get(name) for name in ("held-out prompts", "evaluation", "seed"))
    return images if same else None


# ---------------------------------------------------------------------------------------------------- drawing


def _sweep(
    bench: _Bench,
    stops: Sequence[Stop],
    rows: Sequence[int],
    probing: Mapping[float, list[int]],
    ends: tuple[Evaluation, Evaluation],
    say: Callable[[str], None],
) -> tuple[list[Evaluation], dict[float, tuple[list[int], Evaluation]]]:
    """(the chosen prompts at every setting, on the same noise; those of the probes); what is there already is not drawn again."""
    found, probes = [], {}
    for stop in stops:
        if not stop.group and stop.place in (0.0, 1.0):
            found.append(some(ends[int(stop.place)], rows))
            continue
        mine = [] if stop.group else probing.get(stop.place, [])
        wanted = sorted({*rows, *mine})
        say(f"Drawing {len(wanted)} pictures at {stop.name} ...")
        drawn = bench.draw(stop, bench.asked[wanted], wanted)
        found.append(some(drawn, [wanted.index(row) for row in rows]))
        if mine:
            probes[stop.place] = (mine, some(drawn, [wanted.index(row) for row in mine]))
    return found, probes


def _with_recommended(found: Dialled, bench: _Bench, say: Callable[[str], None]) -> Dialled:
    """The recommended setting beside the others, with its own pictures."""
    stop = found.recommended[0]
    before = [s.place for s in found.stops if not s.group and s.place <= stop.place]
    if stop.place in before:
        return found
    drawn, at = _sweep(bench, [stop], found.rows, {}, found.ends, say)[0], len(before)
    put = lambda values, new: [*values[:at], *new, *values[at:]]
    return replace(found, stops=put(found.stops, [stop]), drawn=put(found.drawn, drawn), fresh=put(found.fresh, [None]))


def _fresh(bench: _Bench, stops: Sequence[Stop], count: int, say: Callable[[str], None]) -> list[Evaluation | None]:
    """At every setting that is predicted, pictures of the same prompts in turn with noise that nothing else has seen."""
    if not count:
        return [None] * len(stops)
    asked = bench.asked[[i % len(bench.asked) for i in range(count)]]
    found: list[Evaluation | None] = []
    for stop in stops:
        if stop.group:
            found.append(None)
            continue
        say(f"Drawing {count} fresh pictures at {stop.name} ...")
        found.append(bench.draw(stop, asked, range(FRESH, FRESH + count)))
    return found
