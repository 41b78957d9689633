"""Is this run's gradient alive and right? Planted against the field's own bugs; a few network calls on two samples.

Every check is a function named for what it proves; a check runs only where those it presupposes found nothing, so one
mistake gives one diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from tropism.answers import first_line, place_of
from tropism.core import Batch, Model, Reward, UserError, name_of
from tropism.doctor import adapter
from tropism.doctor import decoder as of_decoder
from tropism.doctor import model as of_model
from tropism.doctor import reward as of_reward
from tropism.doctor.case import Case, Finding, fault, warning
from tropism.doctor.holds import as_found

__all__ = ["Finding", "examine", "report_lines"]

Check = Callable[[Case], Iterator[Finding]]

CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "model runs": (of_model.model_runs, ()),
    "model repeatable": (of_model.model_repeatable, ("model runs",)),
    "model frozen": (of_model.model_frozen, ()),
    "start": (of_model.start, ("model runs",)),
    "decoder repeatable": (of_decoder.decoder_repeatable, ("model runs",)),
    "decoder scale": (of_decoder.decoder_scale, ("decoder repeatable",)),
    "clamped pixels": (of_decoder.clamped_pixels, ("decoder scale",)),
    "reward runs": (of_reward.reward_runs, ("model runs",)),
    "reward frozen": (of_reward.reward_frozen, ("reward runs",)),
    "reward repeatable": (of_reward.reward_repeatable, ("reward runs",)),
    "reward per sample": (of_reward.reward_per_sample, ("reward repeatable",)),
    "reward differs": (of_reward.reward_differs, ("reward per sample",)),
    "reward graph": (of_reward.reward_graph, ("reward runs",)),
    "reward flat": (of_reward.reward_flat, ("reward graph", "reward per sample")),
    "reward gradient": (of_reward.reward_gradient, ("reward flat",)),
    "reward finite": (of_reward.reward_finite, ("reward runs",)),
    "decoder graph": (of_decoder.decoder_graph, ("decoder repeatable",)),
    "decoder gradient": (of_decoder.decoder_gradient, ("decoder graph",)),
    "x0 linear": (of_model.x0_linear, ("model runs",)),
    "rows": (of_model.rows, ("model repeatable",)),
    "time": (of_model.time, ("model repeatable",)),
    "prompts": (of_model.prompts, ("model repeatable",)),
    "guidance": (of_model.guidance, ("prompts", "rows")),
    "negative prompts": (of_model.negative_prompts, ("guidance",)),
    "adapter precision": (adapter.adapter_precision, ()),
}
"""What is examined, in this order, each with the checks that must have found no fault or warning before."""

OF_THE_PICTURE = (
    *("reward graph", "reward flat", "reward gradient"),
    *("clamped pixels", "decoder graph", "decoder gradient"),
)
"""Checks of what only a method with the reward's own gradient needs."""

OF_SCORES = ("reward differs",)
"""Checks of what only a method without it needs."""

STIRRED: dict[str, tuple[Check, tuple[str, ...]]] = {
    "one network": (adapter.one_network, ("model repeatable",)),
    "adapter acts": (adapter.adapter_acts, ("one network",)),
    "base": (adapter.base, ("adapter acts",)),
    "base graph": (adapter.base_graph, ("base",)),
    "adapter reached": (adapter.adapter_reached, ("adapter acts", "base")),
    "autocast": (adapter.autocast, ("adapter reached",)),
    "input gradient": (of_model.input_gradient, ("adapter reached",)),
    "chain gradient": (adapter.chain_gradient, ("adapter reached", "x0 linear", "input gradient")),
}
"""What is examined once every trainable weight has been moved a little."""


def examine(
    model: Model,
    reward: Reward,
    batch: Batch,
    *,
    guidance: float,
    steps: int = 2,
    seed: int = 0,
    gradient: bool = True,
) -> list[Finding]:
    """Examine a run before it starts, on two samples of the batch and a chain of `steps` steps. Deterministic.

    model: any core.Model; network, rows, decode_raw and calls are used where it has them. reward: any callable
    (images (B, 3, H, W) in [0, 1], batch) -> (B,). guidance: the run's own. gradient: False leaves out the gradients
    of reward and decoder, which a policy gradient does without. An exception of theirs becomes a fault.
    Everything is left as it was found: weights to the bit, gradients, call counts, switches and random generators.
    """
    try:
        with as_found(model, reward), torch.enable_grad():
            without = OF_SCORES if gradient else OF_THE_PICTURE
            return _examined(Case(model, reward, batch, guidance, steps, seed, gradient), without)
    except Exception as error:  # before the first check
        return [_raised("model runs", error, reward)]


def _examined(case: Case, without: Sequence[str]) -> list[Finding]:
    findings: list[Finding] = []
    passed: set[str] = set()
    for name in (n for n in CHECKS if n not in without):
        findings += _ran(name, CHECKS, case, passed)
    if "model repeatable" in passed:
        case.stir()
        for name in STIRRED:
            findings += _ran(name, STIRRED, case, passed)
    return findings


def _ran(name: str, checks: dict, case: Case, passed: set[str]) -> list[Finding]:
    """One check's findings; none where something it presupposes did not pass."""
    check, needs = checks[name]
    if not passed.issuperset(needs):
        return []
    try:
        found = [replace(f, check=f.check or name) for f in check(case)]
    except Exception as error:
        found = [_raised(name, error, case.reward)]
    if all(f.level == "note" for f in found):
        passed.add(name)
    return found


def _raised(check: str, error: Exception, reward: Reward) -> Finding:
    """What an exception says in one line; memory that runs out is no mistake of theirs."""
    who = f"Reward '{name_of(reward)}'" if check.startswith("reward") else "The model"
    if isinstance(error, torch.OutOfMemoryError):
        said = warning("This was not examined: memory ran out with two samples. The run itself goes in smaller pieces.")
    elif isinstance(error, UserError):
        said = fault(str(error))
    else:
        place = place_of(error, but="/tropism/doctor/")
        said = fault(f"{who} raised {type(error).__name__}: {first_line(error)} ({place}). Correct it there.")
    return replace(said, check=check)


def report_lines(findings: Sequence[Finding]) -> list[str]:
    """One line each, faults first, then one of all that was measured and found right."""
    lines = [
        f"{level.capitalize()}, {f.check}: {f.text}"
        for level in ("fault", "warning", "note")
        for f in findings
        if f.level == level and f.error is None
    ]
    proofs = "; ".join(f.text for f in findings if f.error is not None)
    clean = all(f.level == "note" for f in findings)
    return [*lines, *([f"{'Everything' if clean else 'The rest'} in order: {proofs}."] if proofs else [])]
