"""The flags of a command, read off its function's signature and docstring."""

from __future__ import annotations

import collections.abc
import inspect
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

FLAGS = {"run": "--from"}
"""Flags that are not called as their argument."""
HIDDEN = ("method", "options", "command", "callback")


def _type(annotation: Any) -> Any:
    """The command-line type of a Python annotation: numbers, flags, text, lists of text; several choices become text."""
    if typing.get_origin(annotation) is collections.abc.Sequence:
        return list[float] if typing.get_args(annotation) == (float,) else list[str]
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = [m for m in typing.get_args(annotation) if m is not type(None)] if union else [annotation]
    simple = members[0] if len(members) == 1 and members[0] in (int, float, bool, str) else str
    return simple | None if union and type(None) in typing.get_args(annotation) else simple


def _documented(function: Callable) -> dict[str, str]:
    """`name: text.` sentences of a docstring."""
    text = " ".join((function.__doc__ or "").split())
    return {n: t.strip()[0].upper() + t.strip()[1:] + "." for n, t in re.findall(r"\b([a-z_]+): ([^.;]+)[.;]", text)}


def _flag(name: str, kind: Any, default: Any, text: str) -> inspect.Parameter:
    if name in FLAGS:
        option = typer.Option(FLAGS[name], help=text)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
    option = (
        typer.Option(f"--{name.replace('_', '-')}", help=text)
        if kind is not bool
        else typer.Option(
            f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}" if default else f"--{name.replace('_', '-')}",
            help=text,
        )
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def flags(function: Callable, skip: tuple[str, ...], help_of: Mapping[str, str]) -> list[inspect.Parameter]:
    """The parameters of a function as options, but for those in `skip`. help_of: what to say of a name, where its docstring does not."""
    hints, documented, found = typing.get_type_hints(function), _documented(function), []
    for name, p in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        kind = list[str] if name == "reward" else _type(hints[name])
        default = p.default if p.default is not inspect.Parameter.empty else ...
        default = list(default) if typing.get_origin(kind) is list and default is not ... else default
        found.append(
            _flag(
                name,
                kind,
                str(default) if kind is str and isinstance(default, int) else default,
                (documented.get(name) or help_of.get(name, ""))
                if skip != HIDDEN
                else help_of.get(name) or documented.get(name, ""),
            )
        )
    return found


def optional(annotation: Any) -> Any:
    """Unset flags of a method are None, so that a model's own defaults can step in."""
    kind, option = typing.get_args(annotation)
    return Annotated[kind | None, option]


def number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value


def plain_command(function: Callable, help_of: Mapping[str, str], *arguments: inspect.Parameter) -> Callable:
    """A command whose flags are its function's, after these arguments."""

    told = {"command"} & set(inspect.signature(function).parameters)

    def run(**values: Any) -> None:
        function(**values, **{name: command_line() for name in told})

    own = flags(function, HIDDEN + tuple(a.name for a in arguments), help_of)
    run.__signature__ = inspect.Signature([*arguments, *own])  # type: ignore[attr-defined]
    run.__doc__ = (function.__doc__ or "").splitlines()[0]
    return run


def command_line() -> str:
    """What was typed, so that it can be typed again."""
    return shlex.join(["tropism", *sys.argv[1:]])
