"""What a reward holds: its networks and tensors, wherever a user may keep them; and everything left as it was found."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tropism.core import Model, Reward
from tropism.models import lora
from tropism.rewards.frozen import Frozen

LIMIT = 10_000
"""Objects looked at, at most: a user's closure may reach anything."""
_FOREIGN = {"torch", "numpy", "scipy", "PIL", "transformers", "diffusers", "peft", "safetensors"}


def held(reward: Reward, model: Model) -> list[Any]:
    """The modules, tensors and Frozen networks that a reward reaches; nothing that belongs to the model."""
    queue, seen, found = [reward], {id(model)}, []
    for own in modules_of(model):
        seen |= {id(thing) for thing in (*own.modules(), *own.parameters())}
    while queue and len(seen) < LIMIT:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | str | int | float):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module | Tensor | Frozen):
            found.append(thing)
        try:
            queue += _children(thing)
        except Exception:  # theirs, in a property; what it hides stays hidden
            continue
    return found


def modules_of(model: Model) -> list[nn.Module]:
    """The networks that a model holds as attributes, or is itself."""
    whole = [model] if isinstance(model, nn.Module) else []
    return [*whole, *(m for m in getattr(model, "__dict__", {}).values() if isinstance(m, nn.Module))]


def _children(thing: Any) -> list[Any]:
    """What an object leads to: attributes, entries, a partial's arguments, a function's closure and its own globals."""
    if isinstance(thing, nn.Module | Tensor):
        return []
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, types.FunctionType):
        return _reads(thing)
    return list(getattr(thing, "__dict__", {}).values())


def _reads(function: types.FunctionType) -> list[Any]:
    if (function.__module__ or "").partition(".")[0] in _FOREIGN:
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    names = [name for name in _names(function.__code__) if name in function.__globals__]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*cells, *given, *(function.__globals__[name] for name in names), getattr(function, "__wrapped__", None)]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


# ---------------------------------------------------------------------------------------------------- as found


@contextmanager
def as_found(model: Model, reward: Reward) -> Iterator[None]:
    """Whatever happens inside, afterwards parameters, call counts, adapter switches, buffers of networks in training mode,
    copies of frozen networks and every global random generator are what they were.
    """
    network, calls, cuda = getattr(model, "network", None), getattr(model, "calls", None), model.device.type == "cuda"
    things = held(reward, model)
    with ExitStack() as after:
        after.enter_context(torch.random.fork_rng(devices=[model.device] if cuda else []))
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 whatever a reward may have drawn from
        _quieten(after)
        if isinstance(network, nn.Module):
            after.enter_context(lora.switched(network, lora.is_on(network)))
        if isinstance(calls, dict):
            after.callback(_refill, calls, dict(calls))
        for frozen in (t for t in things if isinstance(t, Frozen)):
            after.callback(_refill, frozen._copies, dict(frozen._copies))
        for tensor in _changeable(model, things):
            after.callback(_put_back, tensor, tensor.detach().to("cpu", copy=True), tensor.requires_grad)
        yield


def _quieten(after: ExitStack) -> None:
    """Without what makes honest finite differences wrong: autocast's cached weights, and TF32's 10 bits."""
    after.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    for backend in backends:
        after.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
        backend.allow_tf32 = False


def _changeable(model: Model, things: list[Any]) -> list[Tensor]:
    modules = [m for t in [*modules_of(model), *things] if isinstance(t, nn.Module) for m in t.modules()]
    buffers = [b for m in modules if m.training for b in m.buffers(recurse=False)]
    return list({id(t): t for t in (*model.trainable().values(), *buffers)}.values())


def _refill(mapping: dict, before: dict) -> None:
    mapping.clear()
    mapping.update(before)


@torch.no_grad()
def _put_back(tensor: Tensor, before: Tensor, trained: bool) -> None:
    tensor.copy_(before)
    if tensor.is_leaf:
        tensor.requires_grad_(trained)
