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
HELP = {
    "model": "Bundled name (shapes; glyphs, an upscaler; guide: dna, utr, molecules too), diffusers folder, hub id, or file.py:Class "
    "(made without arguments: rank, eta, dtype are its own).",
    "reward": "NAME[=WEIGHT], repeatable: jpeg, jpeg-bytes, incompressibility, shapes-alignment, shapes-count, shapes-aesthetic, "
    "aesthetic, pickscore, hps:v2.1, imagereward, count, objects, clip:SOURCE, vqa:SOURCE, file.py:function; for sequences "
    "dna-liver, dna-specific, utr-load, gc-window; for molecules qed, sa, logp-window, pharmacophore, dock:COMMAND; a server's "
    "http://HOST:PORT, old:file.py:function, bridge:MODULE:ATTRIBUTE; of these product(A,B), minimum(A,B), hinge(A,C), target(A,C).",
    "prompts": ".txt (one a line), .jsonl or .csv, with {red|blue} and __list__ wildcards; a bundled set (animals, "
    "animals-activities, counting, objects-colors, scenes); or a Hub dataset, org/name[:column][@split]. The bundled model has its own.",
    "pictures": "For an upscaler: a folder of originals, instead of prompts.",
    "low_res": "What the upscaler is given, a folder of the same names (default: made of the originals).",
    "degrade": "How low-resolution pictures are made: realesrgan, bsrgan-lite or bicubic.",
    "crop": "Side in pixels of the part of an original that is used (default: all of it).",
    "held_out": "Prompts for evaluation only (default: a tenth of --prompts is kept out of training).",
    "out": "The run folder, new or empty.",
    "updates": "Optimiser updates.",
    "batch": "Samples an update.",
    "micro_batch": "Samples in memory at a time.",
    "lr": "Learning rate of AdamW.",
    "weight_decay": "Weight decay of AdamW.",
    "clip": "Largest gradient norm, 0 is off.",
    "ema": "Decay of an average of the adapter, 0 is off.",
    "schedule": "Learning rate over the run: constant, linear or cosine (down to 0).",
    "rank": "LoRA rank.",
    "normalise": "none, base or running: each reward of a sum in units of its spread on the base model.",
    "ramp": "NAME=WEIGHT: what a weight of a sum goes to by the end of updates or budget, repeatable.",
    "alpha": "LoRA alpha (default: the rank).",
    "targets": "LoRA target modules, repeatable; every: attention and convolutions of a U-Net.",
    "full": "Train every weight of the denoiser instead of a LoRA.",
    "eta": "0 is deterministic; DDIM: 1 is as stochastic as DDPM; flow matching: the SDE's noise level (0.7).",
    "height": "Pixels (default: the model's own).",
    "width": "Pixels (default: the model's own).",
    "quantize": "4bit or 8bit: hold the frozen denoiser's weights in so many bits (torchao, bitsandbytes).",
    "t5": "Read the T5 text encoder (Stable Diffusion 3 can do without).",
    "scheduler": "KEY=VALUE of the scheduler's configuration to replace, repeatable: timestep_spacing=trailing, shift=3.",
    "setting": "KEY=VALUE of what the model's family alone has, repeatable: noise_level=50 of an upscaler.",
    "seed": "Seed of every random draw.",
    "budget": "AXIS=LIMIT, repeatable: seconds=600, cpu_seconds, reward_queries, reward_gradients, forwards, backwards or decodes.",
    "evaluate_every": "Updates between held-out evaluations.",
    "evaluate_prompts": "Held-out prompts at most.",
    "evaluate_steps": "Steps at deployment (default: those of training).",
    "evaluate_guidance": "Guidance at deployment (default: that of training).",
    "evaluate_eta": "Eta at deployment (default: that of training).",
    "on_alarm": "On over-optimisation: keep its best weights beside the last, stop with them, shrink (back to them, half the rate), off.",
    "watch": "A reward to measure beside the trained one, and never train on; repeatable.",
    "checkpoint_every": "Updates between checkpoints.",
    "resume": "Go on with the run in --out.",
    "overwrite": "Replace the run in --out.",
    "trackers": "tensorboard or wandb, if installed; repeatable.",
    "device": "cpu or cuda.",
    "dtype": "Of the frozen networks: float32, bfloat16.",
    "threads": "CPU threads.",
    "dry_run": "Check everything, write nothing.",
    "doctor": "Prove first that the gradient arrives (seconds).",
    "gpu": "Card sizes in GB to fit into, repeatable.",
    "guidance": "Guidance (default: the model's own).",
    "value": "What a noisy state is judged by: auto, mean, argmax, sample, soft, learned (roll-outs first), or file.py:function.",
    "roll_outs": "Plain samples that a learned value is fitted to.",
    "value_loss": "Of a learned value: auto, mean, soft or linex.",
    "timeout": "Seconds that a sample may take in workers.",
    "steps": "Denoising steps (default: the model's own).",
    "truncation": "Which steps carry a gradient: K (the last K), full, suffix-uniform, suffix-gaussian, bernoulli, bernoulli-released.",
    "detach_input": "DRTune's stop-gradient on the network's input.",
}
"""What a flag is for, by its name."""
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


def flags(
    function: Callable, skip: tuple[str, ...], help_of: Mapping[str, str], own: bool = False
) -> list[inspect.Parameter]:
    """The parameters of a function as options, but for those in `skip`. help_of: what to say of a name, where its docstring does not;
    own: it was written for this function and comes first.
    """
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
                if skip != HIDDEN and not own
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


def plain_command(
    function: Callable, help_of: Mapping[str, str], *arguments: inspect.Parameter, own: bool = False
) -> Callable:
    """A command whose flags are its function's, after these arguments; own: see `flags`."""

    told = {"command"} & set(inspect.signature(function).parameters)

    def run(**values: Any) -> None:
        function(**values, **{name: command_line() for name in told})

    options = flags(function, HIDDEN + tuple(a.name for a in arguments), help_of, own)
    run.__signature__ = inspect.Signature([*arguments, *options])  # type: ignore[attr-defined]
    run.__doc__ = (function.__doc__ or "").splitlines()[0]
    return run


def command_line() -> str:
    """What was typed, so that it can be typed again."""
    return shlex.join(["tropism", *sys.argv[1:]])
