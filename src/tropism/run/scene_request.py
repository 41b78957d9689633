"""What a scene is made with, read and checked before anything is written: the model and its adapter, the rewards."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from tropism.core import Model, Reward, UserError
from tropism.models.load import BUNDLED, TOKENS, is_of_tokens, load_model
from tropism.models.lora import LoraSettings
from tropism.rewards.load import check_prompts, require_gradient
from tropism.run.request import read_reward
from tropism.run.sculpt import read_prompt
from tropism.scene.vp3d import prompt_batch
from tropism.worlds import solids, solids_oracle

EXACT = "solids-exact"
"""The exact denoiser of the solids world, bundled."""
TRAINED = "solids"
"""The bundled network of that world; it knows one solid at a time."""
OWN: dict[str, Any] = {"reward": ["solids-text"], "consistency": "solids-visual", "watch": ["solids-judge"]}
"""Of the solids world, where nothing is said."""
NONE = "none"


def of_solids(model: str | Model) -> bool:
    """Whether a model draws the solids world, whose truth is known."""
    return model in (EXACT, TRAINED) or isinstance(model, solids_oracle.OracleModel)


def strength_of(model: str | Model) -> float:
    """How much a visual prompt counts where nothing is said."""
    return 2.0 if model == TRAINED else 0.5


def guidance_of(model: str | Model, loaded: Model) -> float:
    """Of the distillation where nothing is said: the model's own, and for the bundled network more than it draws best with."""
    return 7.5 if model == TRAINED else getattr(loaded, "guidance", 7.5)


def check_sees(model: Model, settings: Mapping[str, Any], kept: Path | None) -> None:
    """Raises UserError for words the model cannot read, a reference that cannot be, and a model without an adapter where one is needed.

    kept: where a resumed scene has its visual prompt, which then is not read again.
    """
    batch = prompt_batch(settings["prompt"], 1, negative=settings["negative"])
    model.encode(batch)
    if settings["reference"] is None and settings["candidates"] == 0:
        return
    again = settings["reference"] is None or (kept is not None and kept.exists())
    v = torch.ones(3, 8, 8) if again else read_prompt(settings["reference"], (8, 8)).picture
    try:
        model.encode(replace(batch, visual=v[None], visual_scale=torch.ones(1)))
    except UserError as error:
        raise UserError(f"{error} Give it as --adapter; or do without a picture: --candidates 0.") from error


def model_of(
    model: str | Model, prompt: str, adapter: str | Path | None, method: str, device: torch.device, dtype: torch.dtype
) -> Model:
    """The model of a scene. Raises UserError for what a bundled one cannot do or does not know."""
    if of_solids(model):
        _check_words(prompt, one=model == TRAINED)
    if model == EXACT:
        if adapter or method == "vsd":
            what = "no image adapter" if adapter else "no score network of its own to train (vsd)"
            raise UserError(f"{EXACT} is exact: it has {what}. Leave that out, or give another --model.")
        if not any(solids_oracle.kept_in().glob("solids-*")):
            say = Console(soft_wrap=True, highlight=False).print
            say(f"Drawing the pictures that the exact denoiser knows; kept in {solids_oracle.kept_in()}.")
        return cast(Model, solids_oracle.exact(prompt, dtype=dtype, device=device))
    if not isinstance(model, str):
        return model
    if is_of_tokens(model):
        raise UserError(f"{model} is a model of token sequences, and a scene needs pictures. Try --model solids.")
    if model not in (*BUNDLED, *TOKENS) and (close := difflib.get_close_matches(model, [EXACT], 1, 0.8)):
        raise UserError(f"There is no model {model!r}. Did you mean {close[0]!r}?")
    trained = LoraSettings() if method == "vsd" else None
    return load_model(model, device=device, dtype=dtype, lora=trained, **({"visual": adapter} if adapter else {}))


def _check_words(prompt: str, one: bool) -> None:
    """Raises UserError for words that the solids world does not know, for a view, and for two solids where one is what is known."""
    asked = solids.parse(prompt)
    if asked.view:
        raise UserError(
            f"The prompt names a view, {asked.view}. Leave it out: every view is asked for with its own word."
        )
    if one and len(asked.solids) > 1:
        raise UserError(f"{TRAINED} was trained on single solids. For two side by side: --model {EXACT}.")


def terms_of(settings: Mapping[str, Any], world: bool) -> dict[str, Any]:
    """Reward, consistency and watched rewards, read and checked; the solids world has its own where nothing is said.

    One of its scenes with two solids has none: its networks read one.
    """
    own = OWN if world and len(solids.parse(settings["prompt"]).solids) == 1 else {}
    asked = {n: settings[n] or own.get(n, ()) for n in OWN}
    seen = settings["candidates"] > 0 or settings["reference"] is not None
    if settings["consistency"] not in (None, NONE) and not seen:
        raise UserError(
            "Consistency compares with a visual prompt, and --candidates 0 leaves none. Leave one of the two out."
        )
    found: dict[str, Any] = {"reward": None, "consistency": None}
    for name in found:
        if asked[name] and asked[name] not in (NONE, [NONE], (NONE,)) and (seen or name == "reward"):
            found[name] = read_reward(asked[name])
            _follows(found[name], settings["noises"] if name == "reward" else 0)
    if settings["noises"] and found["reward"] is None:
        raise UserError(f"There is no reward to weigh {settings['noises']} noises by. Name one with --reward.")
    found["watch"] = [read_reward(w) for w in asked["watch"] if w != NONE]
    for reward in (found["reward"], *found["watch"]):
        if reward is not None:
            check_prompts(reward, [settings["prompt"]])
    return found


def _follows(reward: Reward, noises: int) -> None:
    """Raises UserError for a reward without the gradient that it would be followed by."""
    try:
        if not noises:
            require_gradient(reward, "a scene")
    except UserError as error:
        raise UserError(f"{error} Here it can weigh noises instead: --noises 4.") from error
