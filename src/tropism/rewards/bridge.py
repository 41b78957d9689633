"""Another package's scorer as a reward: `--reward bridge:MODULE:ATTRIBUTE`, an object with `score(pixels, prompts) -> (B,)`.

ATTRIBUTE may be the object, or a class or function that makes it without arguments. Pixels are (B, 3, H, W) in [0, 1].
The package is imported because its user named it: name only those you trust.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tropism.core import Batch, Reward, UserError, is_differentiable
from tropism.rewards.named import Named


def bridge(place: str) -> Reward:
    """The reward of "MODULE:ATTRIBUTE", its networks frozen and in evaluation mode. Its gradient is taken to be real unless it declares
    `differentiable` False.

    Raises UserError for a package that is missing or fails, and an attribute without `score`.
    """
    module, colon, attribute = place.partition(":")
    if not (colon and module and attribute):
        raise UserError(
            f"bridge:{place} is not of the form bridge:MODULE:ATTRIBUTE. Write for example bridge:my_scorers:PickScore."
        )
    scorer = _made(_imported(module), module, attribute)
    if not callable(getattr(scorer, "score", None)):
        raise UserError(
            f"{place} has no method score(pixels, prompts). Write a reward function around it: FILE.py:FUNCTION."
        )
    for network in networks(scorer):
        network.eval().requires_grad_(False)

    def reward(samples: Tensor, batch: Batch) -> Any:
        return scorer.score(samples, list(batch.prompts))

    return Named(str(getattr(scorer, "name", None) or attribute), is_differentiable(scorer), reward)


def networks(scorer: Any) -> Iterator[nn.Module]:
    """Every network that an object holds: itself, or in its attributes, however deep in lists, dictionaries and other objects."""
    seen, left = dict[int, Any](), [scorer]
    while left:
        held = left.pop()
        if id(held) in seen or isinstance(held, type | ModuleType | Tensor):
            continue
        seen[id(held)] = held  # kept, so that no other object takes its id
        if isinstance(held, nn.Module):
            yield held
        if isinstance(held, Mapping):
            left += held.values()
        elif isinstance(held, list | tuple | set | frozenset):
            left += held
        elif isinstance(held, partial):
            left += [held.func, *held.args, *held.keywords.values()]
        left += [getattr(held, "__self__", None), *getattr(held, "__dict__", {}).values()]


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise UserError(
            f"bridge:{module} cannot be imported ({error}). If its package is missing: pip install {missing}, "
            "or the package that brings it."
        ) from error
    except Exception as error:  # whatever a package does while it is imported
        raise UserError(
            f"Importing {module} failed with {type(error).__name__}: {error}. Run `python -c 'import {module}'` to see where."
        ) from error


def _made(found: Any, module: str, attribute: str) -> Any:
    try:
        scorer = reduce(getattr, attribute.split("."), found)
    except AttributeError as error:
        names = [n for n in vars(found) if not n.startswith("_")][:20]
        raise UserError(f"{module} has no {attribute!r}. It has: {', '.join(names) or 'nothing public'}.") from error
    if not isinstance(scorer, type) and hasattr(scorer, "score"):
        return scorer
    try:
        return scorer() if callable(scorer) else scorer
    except Exception as error:
        raise UserError(
            f"Making {module}:{attribute} without arguments failed with {type(error).__name__}: {error}. "
            "Make it in a file of yours and give FILE.py:FUNCTION."
        ) from error
