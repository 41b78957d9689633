"""What a run asks for: prompts to train on and held out, with the pictures that an upscaler is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tropism.core import Model, UserError
from tropism.prompts.batches import split, train_and_held_out
from tropism.prompts.files import Prompt
from tropism.restore.options import preset
from tropism.restore.sets import Pictures, prompts_of


def prompts_for(settings: Mapping[str, Any], named: str | Model, model: Model) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out) of a run's settings, older ones too: its prompts, or its pictures. named: the model as the user named it.

    Raises UserError for settings that do not go together, and for what cannot be read.
    """
    pictures, low_res = settings.get("pictures"), settings.get("low_res")
    if pictures is None and low_res is None:
        train, held = train_and_held_out(settings["prompts"], settings["held_out"], named)
    elif settings["prompts"] is not None:
        raise UserError("--prompts and --pictures are two ways to say what is asked for. Give one of them.")
    elif settings["held_out"] is not None and low_res is not None:
        raise UserError(
            "--low-res gives what the training pictures are enlarged from, and of --held-out pictures that would be made by --degrade: "
            "they would not compare. Leave --held-out out (a tenth is held out), or name reference and low_res in .jsonl files."
        )
    elif settings["held_out"] is not None:
        train, held = prompts_of(pictures, low_res), prompts_of(settings["held_out"])
    else:
        train, held = split(prompts_of(pictures, low_res))
    how = settings.get("degrade", "realesrgan"), settings.get("crop", 0), settings["seed"]
    return tuple(with_pictures(p, model, *how) for p in (train, held))  # type: ignore[return-value]


def with_pictures(
    prompts: Sequence[Prompt], model: Model, degrade: str = "realesrgan", crop: int = 0, seed: int = 0
) -> list[Prompt]:
    """The prompts as they are, or for an upscaler with the pictures that they name. Raises UserError where one needs the other."""
    scale, named = getattr(model, "scale", None), [{"reference", "low_res"} & dict(p.meta).keys() for p in prompts]
    if scale is None:
        if any("low_res" in names for names in named):
            raise UserError(
                "This model draws from words, and pictures to enlarge were given. Choose an upscaler with --model, or leave --low-res out."
            )
        return list(prompts)
    if all(p.fill for p in prompts):
        return list(prompts)
    if scale != int(scale) or not all(named):
        raise UserError(
            f"This model enlarges pictures {scale:g} times, and there are none to enlarge. Give originals with --pictures DIR (for a whole "
            "scale small ones are made of them), or name a `low_res` file beside each prompt of a .jsonl file."
        )
    fill = Pictures(int(scale), replace(preset(degrade), scale=int(scale)), crop, seed)
    return [replace(p, fill=fill) for p in prompts]
