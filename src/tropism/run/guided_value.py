"""`guide METHOD --value learned`: plain roll-outs first, then a network fitted to their rewards (SVDD-MC), kept in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.core import UserError
from tropism.guide.learned import LOSSES, LatentValue, RollOuts, TokenValue, fitted, learned, roll_outs, standardised
from tropism.guide.lineages import ValueOf
from tropism.prompts.batches import as_batch
from tropism.run.guided import Plan, damaged
from tropism.run.record import Recorder

UPDATES = 1000
"""Of the fit."""
HELD = 8
"""One roll-out in so many is kept out of the fit, to see what the network knows."""


def check(count: int, loss: str, alpha: float) -> None:
    """Raises UserError for too few roll-outs to learn from, and losses that cannot be."""
    if count < 2 * HELD:
        raise UserError(f"roll_outs is {count}; a value is learnt from at least {2 * HELD}. Try --roll-outs 512.")
    if loss not in ("auto", *LOSSES) or (loss in ("soft", "linex") and not alpha > 0):
        raise UserError(
            f"value_loss is {loss!r} and alpha is {alpha}; it must be auto, {', '.join(LOSSES)}, the last two with --alpha above 0."
        )


def learnt(
    plan: Plan, count: int, loss: str, alpha: float, file: Path, recorder: Recorder
) -> tuple[ValueOf, dict[str, int]]:
    """(the value, the costs of its roll-outs): read from the file if it is there, else learnt and written there.

    loss: "auto" is "linex" where alpha is above 0, else "mean", as the paper's code has it.
    """
    if not file.exists():
        _learn(plan, count, ("linex" if alpha > 0 else "mean") if loss == "auto" else loss, alpha, file, recorder)
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
        told = json.loads(metadata["told"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise damaged(file, error) from error
    changed = [name for name, text in plan.identity.items() if told["identity"].get(name) != text]
    if changed:
        raise UserError(
            f"{file} was learnt with another {' and another '.join(changed)}. Resume with the settings in config.yaml."
        )
    network = _network(plan, told["shape"], told["span"]).eval().requires_grad_(False)
    network.load_state_dict(load_file(file))
    network.to(getattr(plan.model, "device", "cpu"))
    mean, scale = told["mean"], told["scale"]
    return learned(lambda x, t: mean + scale * network(x, t.to(x.device)).double().cpu()), told["costs"]


def _learn(plan: Plan, count: int, loss: str, alpha: float, file: Path, recorder: Recorder) -> None:
    prompts = list({(p.text, p.negative): p for p, _ in plan.prompts}.values())
    each = -(-count // len(prompts))
    recorder.say(f"Learning the value from {each * len(prompts)} plain roll-outs.")
    before = dict(getattr(plan.model, "calls", {}))
    data = roll_outs(
        plan.model,
        plan.reward,
        as_batch(prompts, range(len(prompts))),
        each,
        steps=plan.steps,
        guidance=plan.guidance,
        seed=plan.seed,
        max_batch=plan.max_batch,
        fixed=plan.fixed,
    )
    rows = getattr(plan.model, "calls", {}).get("network", 0) - before.get("network", 0)
    data, mean, scale = standardised(data, len(prompts))
    kept = torch.arange(len(data.rewards)) % HELD == HELD - 1
    shape = list(data.states.shape[2:])
    torch.manual_seed(plan.seed)
    network = fitted(
        _network(plan, shape, data.times[0]),
        _some(data, ~kept),
        alpha=alpha / scale,
        loss=loss,
        updates=UPDATES,
        seed=plan.seed,
    )
    half, late = (correlation(network, _some(data, kept), at) for at in (len(data.times) // 2, len(data.times) - 1))
    recorder.say(
        f"On roll-outs kept aside it follows the reward with r = {half:.2f} half-way and {late:.2f} before the last step."
    )
    costs = {"network": rows, "rewards": len(data.rewards)}
    told = {
        "mean": mean,
        "scale": scale,
        "shape": shape,
        "span": data.times[0],
        "costs": costs,
        "identity": plan.identity,
        "half": half,
        "late": late,
    }
    beside = file.with_suffix(".tmp")
    save_file({n: v.contiguous() for n, v in network.state_dict().items()}, beside, metadata={"told": json.dumps(told)})
    beside.replace(file)


def _some(data: RollOuts, rows: Tensor) -> RollOuts:
    return replace(data, states=data.states[rows], rewards=data.rewards[rows])


def _network(plan: Plan, shape: Sequence[int], span: float) -> nn.Module:
    model: Any = plan.model
    return TokenValue(len(model.letters)) if hasattr(model, "letters") else LatentValue(shape, span)


@torch.no_grad()
def correlation(network: nn.Module, data: RollOuts, step: int) -> float:
    """Pearson's r of the network's values at a step and the rewards, 0 where it says the same of all."""
    values = network(
        data.states[:, step], torch.full((len(data.rewards),), data.times[step], dtype=torch.float64)
    ).double()
    found = torch.corrcoef(torch.stack([values.cpu(), data.rewards.double()]))[0, 1]
    return torch.nan_to_num(found).item()
