"""Whether the trainable weights act, are reached, and get the gradient that finite differences measure.

All but the first check run on a stirred adapter: B of a fresh LoRA is zero, which hides what A does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from tropism.core import UserError
from tropism.doctor.case import Case, Finding, change, fault, module_names, note, proof, size, warning
from tropism.doctor.slopes import TOLERANCE, WEIGHT_STEPS, judge, precision

ONE = {True: 1e-4, False: 0.02}
"""Relative difference between predictions with and without a graph, in float32 and in half precision: kernels may differ."""


def adapter_precision(case: Case) -> Iterator[Finding]:
    """What trains is at least float32."""
    narrow = {n: p.dtype for n, p in case.model.trainable().items() if torch.finfo(p.dtype).bits < 32}
    if narrow:
        dtype = next(iter(narrow.values()))
        yield warning(
            f"{len(narrow)} trainable weights are {str(dtype).removeprefix('torch.')} ({module_names(list(narrow))}): an update "
            f"below {torch.finfo(dtype).eps:.1g} of a weight is lost, and --lr 1e-4 makes many of these. Keep what trains in "
            "float32; the frozen base may stay narrow."
        )


def one_network(case: Case) -> Iterator[Finding]:
    """What draws, without a graph, is what is differentiated: the same weights at the same time, whatever was asked in between."""
    with torch.no_grad():
        drawn = case.predict()
        case.model.predict(case.x[:1], case.times[-2], case.cond[:1], case.guidance)
    error = change(drawn, case.predict().detach())
    limit = ONE[precision(case.predict, case.x) in WEIGHT_STEPS] + 2 * case.jitter
    if error > limit:
        yield fault(
            f"The prediction with a graph is another one than without (by {error:.1%}, the limit is {limit:.2g}), once the trainable "
            "weights have moved and the chain has gone on: what draws is not what trains. Look for a fused, cached or compiled copy of "
            "the network that is made once, or a time that a closure reads later. Draw with the network that trains."
        )


@torch.no_grad()
def adapter_acts(case: Case) -> Iterator[Finding]:
    """Moving the trainable weights moves the prediction."""
    if not case.parameters:
        yield fault("The model has no trainable weights. Load it with a LoRA, or give `trainable()` some parameters.")
    elif change(case.found, case.predict()) <= 2 * case.jitter:
        yield fault(
            f"Moving all {len(case.parameters)} trainable weights does not change the prediction: training them does nothing. "
            "Check that the adapter is enabled, its scale is not 0, and `predict` uses the network it is attached to."
        )


def base(case: Case) -> Iterator[Finding]:
    """`base()` switches the adapter off, on again, and its gradient can be taken after it has ended."""
    noise = max(2 * case.jitter, 1e-6)
    with torch.no_grad():
        adapted = case.predict()
        try:
            inside = _in_base(case)
        except UserError as reason:
            yield note(f"There is no base model to compare with. {reason}")
            return
        after = case.predict()
        with moved(case, list(case.model.trainable())):
            elsewhere = _in_base(case)
    if change(adapted, after) > noise:
        yield fault(
            "After `base()` the adapter stays switched off, so the rest of the run trains nothing. Restore it in a `finally`."
        )
    elif change(adapted, inside) <= noise:
        yield fault(
            "Inside `base()` the prediction is that of the adapted model: the drift penalty would always be 0. Switch the "
            "adapter off in it, for example with peft's disable_adapter."
        )
    elif (error := change(inside, elsewhere)) > noise:
        yield fault(
            f"Inside `base()` the prediction changes with the trainable weights (by {error:.1%}): it is not the base model. "
            "Switch every one of them off in it."
        )
    elif (error := _late_gradient(case)) > TOLERANCE:
        yield fault(
            f"The gradient of a base prediction is another one (by {error:.0%}) when it is taken after `base()` has ended: "
            "checkpointed blocks are recomputed with the adapter on. Recompute them with it as it was, or turn checkpointing off."
        )


def base_graph(case: Case) -> Iterator[Finding]:
    """The base's prediction hangs on the latents where the adapted one does: the drift penalty's gradient runs through both."""
    if not _base_has_graph(case):
        yield warning(
            "Inside `base()` no gradient is recorded, so the drift penalty would pull by a part of its gradient only. Take "
            "torch.no_grad out of it; --drift-detach asks for that and is cheaper."
        )


def _in_base(case: Case) -> Tensor:
    with case.model.base():
        return case.predict()


def _late_gradient(case: Case) -> float:
    """Relative change of d(base prediction)/d x_t between taking it inside base() and after."""
    x = case.x[:1].detach().requires_grad_()
    with case.model.base():
        inside = _pulled_back(case, case.predict(x), x)
        out = case.predict(x)
    try:
        return change(inside, _pulled_back(case, out, x))
    except CheckpointError:  # what it recomputed has other tensors than what it ran
        return 1.0


def _base_has_graph(case: Case) -> bool:
    """Whether the base's prediction hangs on the latents, if the adapted one does."""
    x = case.x[:1].detach().requires_grad_()
    reaches = lambda: bool(_pulled_back(case, case.predict(x), x).any())
    try:
        with case.model.base():
            inside = reaches()
    except UserError:  # there is no base, and base says so
        return True
    return inside or not reaches()


def _pulled_back(case: Case, out: Tensor, x: Tensor) -> Tensor:
    """The gradient of an output's scalar at x, zero where there is none."""
    if not out.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(case.weigh(out).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def adapter_reached(case: Case) -> Iterator[Finding]:
    """Every trainable weight gets a finite gradient that is not zero through the engine's own backward pass."""
    names = list(case.model.trainable())
    if not all(bool(torch.isfinite(g).all()) for g in case.gradient):
        yield fault("The gradient of the trainable weights is not finite. Use --dtype float32 or bfloat16.")
        return
    dead = [n for n, g in zip(names, case.gradient, strict=True) if not g.any()]
    if not dead:
        yield proof(f"all {len(names)} trainable weights get a gradient", 0.0)
        return
    which = f"{len(dead)} of {len(names)} trainable weights ({module_names(dead)})"
    if _effect(case, dead) > 2 * case.jitter:
        yield fault(
            f"{which} have a gradient of exactly zero, yet moving them changes the latents: they are cut off. Look for "
            ".detach(), .data or torch.no_grad on their way through `predict`."
        )
    else:
        say = note if getattr(case.model, "full", False) else warning  # a network may have weights that it does not use
        yield say(
            f"{which} have no effect on the latents and will never change. Leave them out of --targets, or check that "
            f"`predict` uses them{' (at guidance 0 the prompt has no effect)' if case.guidance == 0 else ''}."
        )


def autocast(case: Case) -> Iterator[Finding]:
    """No autocast surrounds the run; if one does, its cache of weights takes no gradient away.

    All other checks run without that cache.
    """
    kind = case.model.device.type
    if not torch.is_autocast_enabled(kind):
        return
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    try:
        dead = [i for i, g in enumerate(case.swept().gradient) if not g.any() and case.gradient[i].any()]
    finally:
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
    remedy = f"Leave torch.autocast out and load the model with --dtype bfloat16, or open it with {kind!r}, cache_enabled=False."
    if dead:
        yield fault(
            f"Autocast takes the gradient of {len(dead)} of {len(case.parameters)} trainable weights away: its cache holds them "
            f"as cast under no_grad, and uses that where a gradient is wanted. {remedy}"
        )
    else:
        yield warning(
            f"torch.autocast is on for {kind!r} around the whole run: what trains is computed in {torch.get_autocast_dtype(kind)}, and "
            f"some versions of torch cache weights without their gradient. {remedy}"
        )


@contextmanager
def moved(case: Case, names: list[str]) -> Iterator[None]:
    """These trainable weights elsewhere, about as far from where they are as they are from 0."""
    chosen = [
        (p, d) for (n, p), d in zip(case.model.trainable().items(), case.random_direction(1), strict=True) if n in names
    ]
    before = [p.detach().clone() for p, _ in chosen]
    with torch.no_grad():
        for p, d in chosen:
            p.add_(size(p) * d)
    yield
    with torch.no_grad():
        for (p, _), was in zip(chosen, before, strict=True):
            p.copy_(was)


@torch.no_grad()
def _effect(case: Case, names: list[str]) -> float:
    """Relative change of the latents when these weights move."""
    before = case.end()
    with moved(case, names):
        return change(before, case.end())


def chain_gradient(case: Case) -> Iterator[Finding]:
    """The engine's gradient through both steps is the slope of the latents along two random directions of the weights."""
    dtype = precision(case.end, case.x, *case.parameters)
    if dtype not in WEIGHT_STEPS:
        yield note("The chain's gradient is finite and not zero; in half precision its slopes cannot be measured.")
        return
    units = [size(p) for p in case.parameters]
    directions = [[u * d for u, d in zip(units, case.random_direction(k), strict=True)] for k in (1, 2)]
    claimed = torch.stack([_dot(case.gradient, d) for d in directions])
    usual = sum((g.double() * u.double()).pow(2).sum().item() for g, u in zip(case.gradient, units, strict=True)) ** 0.5
    value = lambda h: torch.stack([_at(case, d, h) for d in directions])
    verdict = judge(claimed, value, WEIGHT_STEPS[dtype], 0.1 * usual)
    if verdict.right:
        how = f"gradient of the chain ({len(case.times) - 1} steps) against finite differences"
        yield proof(f"{how} {verdict.error:.1g}", verdict.error)
    elif verdict.wrong:
        yield fault(
            f"The gradient of the chain is not the slope of its latents: autograd says {verdict.claimed:.3g}, finite differences "
            f"{verdict.measured:.3g} (apart by {verdict.error:.0%}, the limit is {TOLERANCE:.0%}). Look for a .detach() of a part "
            "of `predict`, a custom autograd.Function, or a checkpoint that recomputes something else."
        )
    else:
        yield note("The chain is too rough for finite differences: its gradient was not checked.")


def _dot(gradient: list[Tensor], direction: list[Tensor]) -> Tensor:
    return sum(((g * d).double().sum() for g, d in zip(gradient, direction, strict=True)), torch.zeros(())).cpu()


def _at(case: Case, direction: list[Tensor], h: float) -> Tensor:
    """The chain's scalar with the weights moved by h along a direction, and moved back."""
    _add(case.parameters, direction, h)
    value = case.weigh(case.end().double())[0]
    _add(case.parameters, direction, -h)
    return value


@torch.no_grad()
def _add(parameters: list[Tensor], direction: list[Tensor], h: float) -> None:
    for p, d in zip(parameters, direction, strict=True):
        p.add_(d, alpha=h)
