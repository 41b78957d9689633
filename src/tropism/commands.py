"""What the command line does, as Python functions with the same names and arguments."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tropism.align.alignprop import alignprop
from tropism.core import Info, Model, Reward, UserError, name_of
from tropism.models import lora, mixing
from tropism.models.load import BUNDLED, load_model
from tropism.models.lora import LoraSettings
from tropism.models.latent import Latent
from tropism.rewards.combine import weighted
from tropism.rewards.load import check_prompts, load_rewards, require_gradient
from tropism.run import report
from tropism.run.checks import at_least_one, finite_numbers, known, not_negative, set_up
from tropism.run.evaluate import Evaluation
from tropism.run.fit import FitResult, fit
from tropism.run.optimiser import schedule_of
from tropism.run.products import Judge, Products, trained_on
from tropism.run.prompts import Prompt, batch_of, own_rows, train_and_held_out
from tropism.run.record import Recorder

METHODS = {"alignprop": alignprop}
BOUND = ("model", "reward", "batch", "state", "update", "seed", "micro_batch")
NOT_CONFIG = ("model", "reward", "callback", "command", "dry_run", "resume", "overwrite")
DEFAULTS = {"shapes": {"steps": 8, "guidance": 2.0}}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the held-out pictures and numbers before and after, and the fitted weights.

    reload_difference: largest pixel difference after loading the adapter into a plain diffusers pipeline (None: no adapter file).
    """

    out: Path
    before: Evaluation
    after: Evaluation
    result: FitResult
    reload_difference: float | None


# ---------------------------------------------------------------------------------------------------- settings


def options_of(method: str | Callable) -> dict[str, inspect.Parameter]:
    """An algorithm's own hyperparameters: the keyword arguments of its function."""
    function = METHODS[known(method, METHODS, "method")] if isinstance(method, str) else method
    return {n: p for n, p in inspect.signature(function).parameters.items() if n not in BOUND}


def _resolved(method: str, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    available = options_of(method)
    for name in options:
        known(name, available, f"option of {method}")
    own = DEFAULTS.get(model, {}) if isinstance(model, str) else {}
    return {n: options.get(n, own.get(n, p.default)) for n, p in available.items()}


def _reward(reward: Reward | str | Sequence[Reward | str]) -> Reward:
    parts = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    texts = [p for p in parts if isinstance(p, str)]
    if len(texts) == len(parts):
        return load_rewards(texts)
    loaded = [load_rewards([p]) if isinstance(p, str) else p for p in parts]
    return loaded[0] if len(loaded) == 1 else weighted([(r, 1.0) for r in loaded])


def _spelled(reward: Reward | str | Sequence[Reward | str]) -> list[str]:
    """The reward as the user wrote it; objects under their names."""
    parts = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    return [p if isinstance(p, str) else name_of(p) for p in parts]


# ---------------------------------------------------------------------------------------------------- align


def align(
    method: str,
    *,
    model: str | Model,
    reward: Reward | str | Sequence[Reward | str],
    prompts: str | Path | Sequence[str] | None = None,
    out: str | Path,
    updates: int = 60,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    ema: float = 0.0,
    schedule: str = "constant",
    micro_batch: int | None = None,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = LoraSettings().targets,
    full: bool = False,
    eta: float = 0.0,
    seed: int = 0,
    held_out: str | Path | Sequence[str] | None = None,
    evaluate_every: int = 10,
    evaluate_prompts: int = 32,
    evaluate_steps: int | None = None,
    evaluate_guidance: float | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    overwrite: bool = False,
    trackers: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    dry_run: bool = False,
    command: str = "",
    callback: Callable[[int, Info], None] | None = None,
) -> Run | None:
    """Change a model's weights so that its samples score higher, and leave a run folder. Returns the finished run.

    method: "alignprop". model: a bundled name, a diffusers folder, a hub id, "file.py:Class", or a Model.
    reward: a name, "NAME=WEIGHT", "file.py:function", any callable (images, batch) -> (B,), or several of these.
    prompts: a .txt, .jsonl or .csv file, or a list; held_out: the same, else every tenth prompt is kept for evaluation.
    options: the method's own hyperparameters by name (see its function). batch: samples an update, over all processes.
    evaluate_steps, evaluate_guidance: deployment settings, default those of training. dry_run: check everything, then stop.
    Raises UserError for anything that cannot be, before the first update where possible.
    """
    settings = {k: v for k, v in locals().items() if k not in NOT_CONFIG}
    place, precision = set_up(device, dtype, threads)
    hyper = _resolved(method, model, options or {})
    reward_ = _reward(reward)
    require_gradient(reward_, f"align {method}")
    _check_numbers(settings)
    adapter = None if full else LoraSettings(rank, alpha, tuple(targets), seed)
    model_ = (
        load_model(model, dtype=precision, device=place, lora=adapter, full=full, eta=eta)
        if isinstance(model, str)
        else model
    )
    train, held = train_and_held_out(prompts, held_out, model)
    held = [held[i] for i in report.spread(len(held), evaluate_prompts)]
    check_prompts(reward_, [p.text for p in train + held])
    _check_chain(model_, method, hyper, evaluate_steps)
    if dry_run:
        return _say_ready(model_, reward_, train, held)
    config = _plain({**settings, "model": str(model), "reward": _spelled(reward), "options": hyper})
    with Recorder(out, config, resume=resume, overwrite=overwrite, trackers=trackers) as recorder:
        _say_odd_prompts(recorder, model_, train, held)
        sampling = _deployed(hyper, evaluate_steps, evaluate_guidance)
        judge = Judge(Path(out), model_, reward_, held, *sampling, seed, batch, _identity(model, reward))
        if resume:
            judge.check_begun()
        products = Products(
            Path(out), method, model_, str(model), reward_, train, seed, command, config, recorder, judge
        )
        result = fit(
            _bound(METHODS[method], model_, reward_, hyper),
            model_.trainable(),
            lambda update: own_rows(batch_of(train, batch, seed, update)),
            updates=updates,
            out=out,
            recorder=recorder,
            lr=lr,
            weight_decay=weight_decay,
            clip=clip,
            ema=ema,
            schedule=schedule,
            seed=seed,
            micro_batch=micro_batch,
            checkpoint_every=checkpoint_every,
            resume=resume,
            evaluate=judge,
            evaluate_every=evaluate_every,
            callback=callback,
            finish=products.write,
        )
    return Run(Path(out), judge.before, judge.after, result, products.difference)


def _deployed(hyper: Mapping[str, Any], steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Steps and guidance of the evaluation: those asked for, else those of training."""
    return (
        hyper.get("steps", 50) if steps is None else steps,
        hyper.get("guidance", 7.5) if guidance is None else guidance,
    )


def _identity(model: str | Model, reward: Reward | str | Sequence[Reward | str]) -> dict[str, str]:
    """What a resumed run must share with the run it goes on with; without folders, which may be written in other ways."""
    named = str(model) if isinstance(model, str | Path) else type(model).__name__
    return {"model": Path(named).name, "reward": " ".join(part.rpartition("/")[2] for part in _spelled(reward))}


def _say_odd_prompts(recorder: Recorder, model: Model, train: list[Prompt], held: list[Prompt]) -> None:
    seen = trained_on(train, [p.text for p in held])
    if seen:
        recorder.say(f"{seen} of {len(held)} prompts for evaluation are trained on as well (with other noise).")
    for text in getattr(model, "too_long", lambda _: [])(sorted({p.text for p in train + held}))[:5]:
        recorder.say(f"This prompt is longer than the text encoder reads and is cut off: {text[:80]!r}")


def _say_ready(model: Model, reward: Reward, train: Sequence[Prompt], held: Sequence[Prompt]) -> None:
    numbers = sum(p.numel() for p in model.trainable().values())
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"Everything is in order: reward {name_of(reward)}, {len(train)} prompts to train on, {len(held)} held out, "
        f"{numbers:,} numbers to train. Nothing was written; run it again without --dry-run."
    )


def _bound(method: Callable, model: Model, reward: Reward, hyper: Mapping[str, Any]):
    return lambda batch, *, state, update, seed, micro_batch: method(
        model, reward, batch, state=state, update=update, seed=seed, micro_batch=micro_batch, **hyper
    )


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of its range or a schedule that is not known."""
    counts = ("updates", "batch", "evaluate_prompts", "rank", "checkpoint_every", "micro_batch", "evaluate_steps")
    at_least_one(**{name: settings[name] for name in counts})
    not_negative(**{name: settings[name] for name in ("lr", "weight_decay", "clip", "evaluate_every", "seed")})
    finite_numbers(alpha=settings["alpha"], evaluate_guidance=settings["evaluate_guidance"])
    if not 0 <= settings["ema"] < 1:
        raise UserError(f"ema is {settings['ema']}; the decay of the average must lie in [0, 1). Try --ema 0.95.")
    schedule_of(settings["schedule"])


def _check_chain(model: Model, method: str, hyper: Mapping[str, Any], evaluate_steps: int | None):
    """Everything about the chain that can be wrong is found before anything is written."""
    from tropism.align.alignprop import reward_loss
    from tropism.align.truncation import check_policy

    model.process.times(hyper.get("steps", 50))
    model.process.times(evaluate_steps or hyper.get("steps", 50))
    check_policy(hyper.get("truncation", "full"), hyper.get("steps", 50))
    not_negative(drift=hyper.get("drift", 0.0))
    finite_numbers(**{name: hyper.get(name) for name in ("guidance", "hinge", "target")})
    reward_loss(hyper.get("hinge"), hyper.get("target"))
    if not model.trainable():
        raise UserError(
            "This model has no trainable weights. Load it with a LoRA, or give `trainable()` some parameters."
        )


def _plain(value: Any) -> Any:
    """Settings as plain YAML values."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# ---------------------------------------------------------------------------------------------------- the others


def demo(
    out: str | Path = "runs/demo",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    command: str = "tropism demo",
) -> Run | None:
    """The main job on the bundled model: count what the prompt asks for, in fewer bytes."""
    return align(
        "alignprop",
        model="shapes",
        reward=["shapes-count", "jpeg=0.3"],
        out=out,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        threads=threads or min(2, os.cpu_count() or 1),
        command=command,
        **DEMO,
    )


DEMO: dict[str, Any] = {
    "updates": 24,
    "batch": 16,
    "lr": 2e-3,
    "ema": 0.9,
    "rank": 16,
    "targets": lora.EVERY_LAYER,
    "options": {"truncation": "2", "drift": 0.1},
}
"""Adapters on every layer: grain is drawn by the convolutions, and adapters on the attention alone cannot take it away."""


def mix(adapters: Sequence[str], *, out: str | Path, model: str = "shapes") -> Path:
    """Sum the B A products of finished adapters, each "FOLDER=WEIGHT", into one adapter in `out`; returns its file.

    Raises UserError for a weight that is not a number or adapters of another base.
    """
    parts: dict[str | Path, float] = {}
    for text in adapters:
        folder, _, weight = text.rpartition("=")
        try:
            share, adapter = (float(weight) if folder else 1.0), _adapter(folder or weight)
        except ValueError as error:
            raise UserError(f"The weight in {text!r} is not a number. Write --adapter FOLDER=0.5.") from error
        if not math.isfinite(share):
            raise UserError(f"The weight in {text!r} is not finite. Write --adapter FOLDER=0.5.")
        parts[adapter] = parts.get(adapter, 0.0) + share
    if Path(out).is_file() or (Path(out).exists() and any(Path(out).iterdir())):
        raise UserError(
            f"{out} is a file or a folder that is not empty, and a mixture never writes over an adapter. Choose another --out."
        )
    loaded = load_model(model)
    if not isinstance(loaded, Latent):
        raise UserError(f"{model} is not a diffusers pipeline, and only their adapters can be mixed.")
    mixing.mix(loaded, parts)
    file = lora.save(loaded, out)
    lora.verify(loaded, out)
    return file


def _adapter(folder: str) -> Path:
    """A run folder's adapter, or the adapter folder itself."""
    inside = Path(folder) / "lora"
    return inside if inside.is_dir() else Path(folder)


def pretrain(world: str = "shapes", *, out: str | Path, quick: bool = False, threads: int | None = None) -> Path:
    """Train the bundled networks of a world from nothing, resumable; returns the folder with the finished files.

    quick: a few updates of every stage, to see that it works.
    """
    from tropism.run import pretrain as generator
    from tropism.run import pretrain_loop, pretrain_rewards

    known(world, BUNDLED, "world")
    if Path(out).is_file():
        raise UserError(f"{out} is a file, but the networks need a folder. Choose another --out.")
    set_up("cpu", "float32", threads)
    lengths = pretrain_loop.QUICK if quick else pretrain_loop.Lengths()
    vae, tokenizer = generator.shapes_world(Path(out), lengths)
    pretrain_rewards.shapes_rewards(Path(out), vae, tokenizer, lengths)
    return Path(out)
