"""Settings that cannot be, and runs that cannot learn or have broken, stop and say why."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor

from tropism.align.truncation import check_policy
from tropism.align.update import NotFinite, reward_loss
from tropism.core import Info, Model, UserError
from tropism.run.ledger import budget_of
from tropism.run.optimiser import schedule_of
from tropism.run.sentinel import REACTIONS

_METHODS = "or take a method that needs no gradient (align ddpo --eta 1, guide svdd)"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}


def known(name: str, choices: Mapping | Sequence, what: str) -> str:
    """The name itself. Raises UserError with the nearest choice if it is none of them."""
    if name in choices:
        return name
    near = difflib.get_close_matches(name, choices, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"There is no {what} '{name}'.{hint} Known: {', '.join(choices)}.")


def set_up(device: str, dtype: str, threads: int | None) -> tuple[torch.device, torch.dtype]:
    """Thread count, device and dtype of a command, checked."""
    known(dtype, DTYPES, "dtype")
    at_least_one(threads=threads)
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("The device 'cuda' was asked for, but this torch sees no GPU. Use --device cpu.")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"There is no device {device!r}. Use cpu, cuda or cuda:1.") from error
    if place.type == "cpu" and dtype == "float16":
        raise UserError(
            "dtype is float16 on the CPU, where much of torch has no such arithmetic. Use --dtype bfloat16 or float32, or "
            "--device cuda."
        )
    return place, DTYPES[dtype]


def overrides(texts: Sequence[str], example: str = "--scheduler timestep_spacing=trailing") -> dict[str, Any]:
    """{key: value} of several "KEY=VALUE". Raises UserError for one without a key or a value, with the example."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            found[key] = _plain(value)
        except yaml.YAMLError:
            value = ""
        if not (key and equals and value):
            raise UserError(f"{example.split()[0]} {text!r} is not of the form KEY=VALUE. Try {example}.")
    return found


def numbers_of(option: str, texts: Sequence[str]) -> dict[str, float]:
    """{name: number} of several "NAME=NUMBER", split at the last "=". Raises UserError for one that is not of that form."""
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not (name and math.isfinite(found.get(name, math.nan))):
            raise UserError(f"--{option} {text!r} is not of the form NAME=NUMBER. Try --{option} jpeg=0.3.")
    return found


def _plain(text: str) -> Any:
    """A number, or what YAML makes of the text; YAML takes 1e-4 for a word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return yaml.safe_load(text)


def at_least_one(**numbers: int | None) -> None:
    """Raises UserError for a setting below 1; None is one that was left out."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1. Try --{name.replace('_', '-')} 16.")


def not_negative(**numbers: float) -> None:
    """Raises UserError for a setting that is negative or not finite."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"{name} is {value}; it must be a finite number of at least 0. Leave --{name.replace('_', '-')} out."
            )


def finite_numbers(**numbers: float | None) -> None:
    """Raises UserError for a setting that is not a finite number; None is one that was left out."""
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name} is {value}; it must be a finite number. Leave --{name.replace('_', '-')} out.")


def check_model_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of its range among those that every command with a model takes."""
    at_least_one(**{name: settings[name] for name in ("batch", "rank", "height", "width")})
    not_negative(seed=settings["seed"])
    finite_numbers(alpha=settings["alpha"], guidance=settings.get("guidance"))
    for size in settings.get("gpu", ()):
        if not (math.isfinite(size) and size > 0):
            raise UserError(f"The GPU size is {size:g}; it must be positive, in GB. Try --gpu 24.")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a number of a run out of its range or a schedule that is not known."""
    check_model_numbers(settings)
    counts = ("updates", "evaluate_prompts", "checkpoint_every", "micro_batch", "evaluate_steps", "per_prompt")
    at_least_one(**{name: settings[name] for name in counts})
    not_negative(**{name: settings[name] for name in ("lr", "weight_decay", "clip", "evaluate_every")})
    if settings["batch"] % settings["per_prompt"]:
        raise UserError(
            f"A batch of {settings['batch']} is no multiple of {settings['per_prompt']} pictures a prompt. "
            f"Try --batch {settings['per_prompt'] * -(-settings['batch'] // settings['per_prompt'])}."
        )
    finite_numbers(evaluate_guidance=settings["evaluate_guidance"])
    if not 0 <= settings["ema"] < 1:
        raise UserError(f"ema is {settings['ema']}; the decay of the average must lie in [0, 1). Try --ema 0.95.")
    schedule_of(settings["schedule"])
    budget_of(settings["budget"])
    known(settings["on_alarm"], REACTIONS, "reaction to an alarm")


def check_chain(
    model: Model,
    hyper: Mapping[str, Any],
    evaluate_steps: int | None,
    evaluate_guidance: float | None,
    negatives: Sequence[str],
) -> None:
    """Everything about the chain that can be wrong is found before anything is written."""
    shape = getattr(model, "shape", (1, 1, 1))
    model.process.times(hyper.get("steps", 50), shape)
    model.process.times(evaluate_steps or hyper.get("steps", 50), shape)
    check_request = getattr(model, "check_request", lambda *_: None)
    check_request(hyper.get("guidance"), negatives)
    check_request(evaluate_guidance)
    check_policy(hyper.get("truncation", hyper.get("k", "full")), hyper.get("steps", 50))
    not_negative(drift=hyper.get("drift", 0.0))
    finite_numbers(**{name: hyper.get(name) for name in ("guidance", "hinge", "target")})
    reward_loss(hyper.get("hinge"), hyper.get("target"))
    if not model.trainable():
        raise UserError(
            "This model has no trainable weights. Load it with a LoRA, or give `trainable()` some parameters."
        )


def has_graph(loss: Tensor, update: int) -> None:
    """Raises UserError if the loss cannot be differentiated."""
    if not loss.requires_grad:
        raise UserError(
            f"Update {update}: the loss has no graph, so nothing can be learned from it. The reward, or a step before "
            "it, cuts its result off from the picture: torch.no_grad, .detach(), rounding, numpy or PIL. Write the "
            f"reward in torch operations, {_METHODS}."
        )


def bad_rewards(info: Info) -> tuple[int, int]:
    """(samples with a non-finite reward, samples)."""
    reward = info.columns.get("reward")
    return (0, 0) if reward is None else (int((~torch.isfinite(reward)).sum()), reward.numel())


def finite(update: int, loss: float, norm: float, bad: float, count: float, info: Info, kept: str) -> None:
    """Raises NotFinite if the reward of any sample, the loss or the gradient is not finite; `kept` says what is safe."""
    if bad:
        wrong = [n for n, v in info.columns.items() if n != "reward" and not bool(torch.isfinite(v).all())]
        raise NotFinite(
            f"Update {update}: the reward is not finite for {bad:.0f} of {count:.0f} samples ({bad / count:.0%})"
            + (f", in {', '.join(wrong)}" if wrong else "")
            + f". {kept} "
            "Make the reward finite for every picture: guard logarithms, roots and divisions with a small constant."
        )
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = f"the gradient (norm {norm})" if math.isfinite(loss) else f"the loss ({loss})"
        raise NotFinite(
            f"Update {update}: {what} is not finite; the step was not taken. {kept} "
            "Try a smaller learning rate (--lr), or --dtype float32."
        )


def weights_finite(parameters: Iterable[Tensor], update: int, kept: str) -> None:
    """Raises NotFinite if an optimiser step left a weight that is not finite."""
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise NotFinite(
            f"Update {update}: a trained weight is no longer finite after the step. {kept} Try a smaller --lr."
        )


def can_learn(info: Info, norm: float, update: int) -> bool:
    """Whether this step proves that something can be learned; False if its policy drew no active step.

    Raises UserError for a gradient that is exactly zero everywhere.
    """
    if info.scalars.get("active_steps") == 0:
        return False
    if norm == 0:
        reward = info.columns.get("reward")
        why = "The reward ignores the picture, is saturated, or every active step is cut off from the weights"
        if reward is not None and reward.numel() > 1 and bool((reward == reward.flatten()[0]).all()):
            why = f"The reward is {reward.flatten()[0].item():.6g} for every sample, so it looks constant"
        raise UserError(
            f"Update {update}: the gradient of every trained parameter is exactly zero: this run cannot learn. {why}. "
            f"Choose a reward that changes with the picture, {_METHODS}."
        )
    return True
