"""Reads what a user asked for into objects, and finds everything that cannot be before anything is written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tropism.align.ddpo import check_stochastic
from tropism.core import Batch, Model, Reward, UserError, name_of
from tropism.doctor.case import NEGATIVE
from tropism.models.load import OWN, load_model
from tropism.models.lora import LoraSettings
from tropism.prompts.batches import Prompt, as_batch, batch_of, chosen, train_and_held_out
from tropism.rewards.combine import weighted
from tropism.rewards.identity import fingerprint, identity_of
from tropism.rewards.load import check_prompts, load_rewards, require_gradient
from tropism.rewards.workers import InWorkers
from tropism.run import report
from tropism.run.checks import check_chain, check_numbers, known, not_negative, overrides, set_up
from tropism.run.products import trained_on
from tropism.run.sources import prompts_for

BOUND = ("model", "reward", "batch", "state", "update", "seed", "micro_batch")
MODELS_OWN = ("steps", "guidance")
"""Hyperparameters whose default is the model's own, where it has one."""
WITHOUT_GRADIENT = ("ddpo",)
"""Methods that need no gradient of the reward, but a stochastic chain."""
OF_MODEL = ("full", "eta", "height", "width", "quantize", "t5")

Rewards = Reward | str | Sequence[Reward | str]


@dataclass(frozen=True)
class Request:
    """A run's model, reward, prompts to train on and held out, and the method's hyperparameters, read and checked.

    watch: rewards by name that evaluations measure and nothing is trained on.
    """

    method: str
    model: Model
    reward: Reward
    train: list[Prompt]
    held: list[Prompt]
    hyper: dict[str, Any]
    settings: dict[str, Any]
    remarks: list[str]
    watch: dict[str, Reward] = field(default_factory=dict)

    def batch(self, update: int) -> Batch:
        """All rows of an update's batch; a pure function."""
        size, seed, group = (self.settings[n] for n in ("batch", "seed", "per_prompt"))
        return batch_of(self.train, size, seed, update, group)

    def embed(self) -> None:
        """Embed the prompts that the run and its doctor will ask for and free the text encoders, where the model can."""
        prepare, updates = getattr(self.model, "prepare", None), self.settings["updates"]
        if prepare is None:
            return
        few = updates * self.settings["batch"] < len(self.train)
        size, seed, group = (self.settings[n] for n in ("batch", "seed", "per_prompt"))
        every = (chosen(self.train, size, seed, u, group) for u in range(updates))
        drawn = [p for prompts in every for p in prompts] if few else self.train
        prepare([p.text for p in (*self.held, *drawn)], [NEGATIVE, *(p.negative for p in (*self.held, *drawn))])

    def sampling(self) -> tuple[int, float]:
        """Steps and guidance of the evaluation: those asked for, else those of training."""
        steps, guidance = self.settings["evaluate_steps"], self.settings["evaluate_guidance"]
        return (
            self.hyper.get("steps", 50) if steps is None else steps,
            self.hyper.get("guidance", 7.5) if guidance is None else guidance,
        )


def read(
    method: str, function: Callable, model: str | Model, reward: Rewards, options: Mapping[str, Any], settings: dict
) -> Request:
    """Everything a run needs, of the settings of `commands.align`. Raises UserError for anything that cannot be."""
    place, precision = set_up(settings["device"], settings["dtype"], settings["threads"])
    for name in options:
        known(name, hyperparameters(function), f"option of {method}")
    reward_ = read_reward(reward, settings["workers"], settings["timeout"])
    if method not in WITHOUT_GRADIENT:
        require_gradient(reward_, f"align {method}")
    check_numbers(settings)
    model_ = read_model(model, settings, place, precision) if isinstance(model, str) else model
    hyper = _resolved(function, model_, options)
    train, held = prompts_for(settings, model, model_)
    held = [held[i] for i in report.spread(len(held), settings["evaluate_prompts"])]
    plain = [p for p in train + held if not p.fill]  # what pictures bring is known with the first batch
    check_prompts(reward_, [p.text for p in plain], [dict(p.meta) for p in plain])
    watch = _watched(settings["watch"], held)
    negatives = [p.negative for p in train + held]
    check_chain(model_, hyper, settings["evaluate_steps"], settings["evaluate_guidance"], negatives)
    if method in WITHOUT_GRADIENT:
        check_stochastic(model_, hyper["steps"])
    _check_options(function, hyper, batch_of(train, settings["batch"], settings["seed"], 0, settings["per_prompt"]))
    return Request(method, model_, reward_, train, held, hyper, settings, _remarks(model_, train, held), watch)


def _watched(texts: Sequence[Reward | str], held: Sequence[Prompt]) -> dict[str, Reward]:
    """Rewards that are measured and not trained on, by name. Raises UserError for two of one name, and for what cannot be loaded."""
    found: dict[str, Reward] = {}
    for text in texts:
        loaded = read_reward(text)
        name = name_of(loaded)
        if name in found:
            raise UserError(f"The reward '{name}' is watched twice. Leave one out.")
        check_prompts(loaded, [p.text for p in held])
        found[name] = loaded
    return found


class _Reached(Exception):
    """A method has accepted its options and turned to its model."""


class _Nothing:
    def __getattr__(self, name: str) -> Any:
        raise _Reached


def _check_options(function: Callable, hyper: Mapping[str, Any], batch: Batch) -> None:
    """Raises UserError for options that the method itself refuses, before any network runs."""
    with suppress(_Reached):
        next(function(_Nothing(), None, batch, state={}, update=0, seed=0, micro_batch=None, **hyper))


def hyperparameters(function: Callable) -> dict[str, inspect.Parameter]:
    """An algorithm's own: the keyword arguments of its function."""
    return {n: p for n, p in inspect.signature(function).parameters.items() if n not in BOUND}


def _resolved(function: Callable, model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyperparameter: the user's, else the model's own, else the method's default."""
    default = lambda name, p: getattr(model, name, p.default) if name in MODELS_OWN else p.default
    return {n: options.get(n, default(n, p)) for n, p in hyperparameters(function).items()}


def read_model(model: str, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Model:
    """The model a user named, with the adapter and the options of the settings."""
    adapter = LoraSettings(settings["rank"], settings["alpha"], tuple(settings["targets"]), settings["seed"])
    own = overrides(settings.get("setting", ()), "--setting noise_level=50")
    return load_model(
        model,
        dtype=dtype,
        device=device,
        lora=None if settings["full"] else adapter,
        scheduler=overrides(settings["scheduler"]),
        **{name: settings[name] for name in OF_MODEL},
        **({"settings": own} if own else {}),
    )


def examples(model: str | Model, prompts: str | Path | Sequence[str] | None) -> Batch:
    """Two prompts to examine a model with: the first of the user's or of the bundled world's, else any two."""
    if prompts is None and model not in OWN:
        return Batch(["a red apple on a table", "two cats in the snow"])
    return as_batch(train_and_held_out(prompts, None, model)[0][:2])


def own_guidance(model: Model, guidance: float | None) -> float:
    """The guidance asked for, else the model's own, else none. Raises UserError for one that it cannot follow."""
    getattr(model, "check_request", lambda *_: None)(guidance)
    return getattr(model, "guidance", 1.0) if guidance is None else guidance


def read_reward(reward: Rewards, workers: int = 0, timeout: float = 60.0) -> Reward:
    """One reward of names and callables; several are summed. workers: above 0, a single name runs in so many processes of its own.

    timeout: seconds a sample may take there. Raises UserError for what cannot be loaded, by workers or at all.
    """
    not_negative(workers=workers)
    parts = _parts(reward)
    texts = [p for p in parts if isinstance(p, str)]
    if workers:
        if len(parts) != 1 or not texts:
            raise UserError(
                "Workers load the reward by its name: give one --reward NAME or file.py:function, without others beside it."
            )
        return InWorkers(texts[0], workers=workers, timeout=timeout)
    if len(texts) == len(parts):
        return load_rewards(texts)
    loaded = [load_rewards([p]) if isinstance(p, str) else p for p in parts]
    return loaded[0] if len(loaded) == 1 else weighted([(r, 1.0) for r in loaded])


def spelled(reward: Rewards) -> list[str]:
    """The reward as the user wrote it; objects under their names."""
    return [p if isinstance(p, str) else name_of(p) for p in _parts(reward)]


def _parts(reward: Rewards) -> list[Reward | str]:
    return [reward] if isinstance(reward, str) or callable(reward) else list(reward)


def as_plain(value: Any) -> Any:
    """Settings as plain YAML values."""
    if isinstance(value, Mapping):
        return {k: as_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def identity(model: str | Model, reward: Rewards, loaded: Reward) -> dict[str, str]:
    """What a resumed run must share with the run it goes on with. loaded: the reward as it was read."""
    named = str(model) if isinstance(model, str | Path) else type(model).__name__
    return {"model": Path(named).name + fingerprint(named), "reward": identity_of(spelled(reward), loaded)}


def _remarks(model: Model, train: list[Prompt], held: list[Prompt]) -> list[str]:
    seen = trained_on(train, [p.name for p in held])
    said = [f"{seen} of {len(held)} prompts for evaluation are trained on as well (with other noise)."] if seen else []
    long = getattr(model, "too_long", lambda _: [])(sorted({p.text for p in train + held}))[:5]
    return said + [f"This prompt is longer than the text encoder reads and is cut off: {text[:80]!r}" for text in long]
