"""The command that examines a model and a reward before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from tropism.core import Model, Reward, UserError
from tropism.doctor import memory
from tropism.doctor.case import NEGATIVE
from tropism.doctor.examine import Finding, examine, report_lines
from tropism.models.latent import Latent
from tropism.models.lora import LoraSettings
from tropism.models.low_res import LowRes
from tropism.run import request
from tropism.run.checks import check_model_numbers, set_up
from tropism.run.record import environment


def doctor(
    *,
    model: str | Model | None = None,
    reward: Reward | str | Sequence[Reward | str] = (),
    prompts: str | Path | Sequence[str] | None = None,
    gpu: Sequence[float] = (),
    guidance: float | None = None,
    batch: int = 16,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = LoraSettings().targets,
    full: bool = False,
    eta: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    quantize: str | None = None,
    t5: bool = True,
    scheduler: Sequence[str] = (),
    setting: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
) -> list[Finding]:
    """What is installed; whether this model and reward can learn, proved by finite differences; and what fits in memory.

    model, reward, prompts and the options after them: as for `align`. gpu: card sizes in GB, default those on sale.
    Without a model the machine alone is described. Returns what was found; nothing is written or changed.
    """
    settings = dict(locals())
    check_model_numbers(settings)
    place, precision = set_up(device, dtype, threads)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    say(machine(environment()))
    if model is None:
        say("Name a model and a reward to examine: tropism doctor --model shapes --reward jpeg")
        return []
    if not reward:
        raise UserError(
            "There is no reward to examine the model with. Add --reward jpeg, or file.py:function of yours."
        )
    scored, asked = request.read_reward(reward), request.examples(model, prompts)
    loaded = request.read_model(model, settings, place, precision) if isinstance(model, str) else model
    if asked.low_res is None and hasattr(loaded, "trial"):
        asked = cast(LowRes, loaded).trial(asked.prompts)
    weight = request.own_guidance(loaded, guidance)
    encoders = 0
    if isinstance(loaded, Latent):
        encoders = memory.text_bytes(loaded)
        loaded.prepare(asked.prompts, [NEGATIVE, *(asked.negative_prompts or ())])
    findings = examine(loaded, scored, asked, guidance=weight, seed=seed)
    for line in report_lines(findings):
        say(line)
    if isinstance(loaded, Latent) and not any((f.level, f.check) == ("fault", "model runs") for f in findings):
        for line in memory.lines(loaded, encoders, batch=batch, active=loaded.steps, guidance=weight, gpu=gpu):
            say(line)
    return findings


def machine(found: Mapping[str, Any]) -> str:
    """What is installed, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    return f"{versions}; {found['platform']}, {found['accelerator'] or 'no GPU'}, {found['threads']} threads."
