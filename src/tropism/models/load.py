"""Finds a model by what the user wrote: a bundled name, a diffusers folder, a hub id, or their own `file.py:Class`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tropism import models, plugin
from tropism.core import Model, UserError
from tropism.models import masked_lm, own, pipeline
from tropism.models.latent import Latent
from tropism.worlds import molecules, utr, weights

BUNDLED = {"shapes": "shapes/model", "glyphs": "glyphs/model", "solids": "solids/model"}
ADAPTERS = {"solids": "solids/adapter"}
"""Image adapters of bundled models, read with them where no other is named."""
TOKENS = ("dna", "utr", "molecules")
"""Bundled models of token sequences."""
OWN = {"shapes": {"steps": 8, "guidance": 2.0}, "glyphs": {"steps": 10}, "solids": {"steps": 20, "guidance": 3.0}}
"""Steps and guidance of the bundled models, which their families' would not suit."""


def _own(spec: str, options: Mapping[str, Any]) -> Model:
    if options.get("full"):
        raise UserError(f"{spec} says itself what is trained, by its `trainable()`; --full is of no use. Leave it out.")
    made = plugin.load_object(spec)
    try:
        model = made() if isinstance(made, type) else made
    except TypeError as error:
        raise UserError(f"{spec} cannot be made without arguments ({error}). Give its arguments defaults.") from error
    missing = [name for name in own.NEEDED if not hasattr(model, name)]
    if not hasattr(model, "encode") and not hasattr(model, "shape"):
        missing.append("shape (of one sample's latent state)")
    if missing:
        raise UserError(f"{spec} is not a model yet: it lacks {', '.join(missing)}. See tropism.core.Model.")
    return cast(Model, own.Completed(model))


def _tokens(name: str, options: Mapping[str, Any]) -> Model:
    """A model of token sequences: a bundled one, or a file of weights.

    Raises UserError for options of picture models.
    """
    odd = [k for k in ("height", "width", "quantize", "visual") if options.get(k)]
    if odd or options.get("lora") is not None:
        raise UserError(
            f"{name} is a model of token sequences; it has no {', '.join(odd or ['LoRA to train'])}. Use it with guide."
        )
    how: dict[str, Any] = {"device": options.get("device", "cpu"), "full": bool(options.get("full"))}
    if name == "molecules":
        molecules.installed()
    how["world"] = world_of(name)
    if name == "utr":
        shape = masked_lm.Shape(tuple(utr.ALPHABET), utr.LENGTH)
        return cast(Model, masked_lm.MaskedModel(masked_lm.Independent(utr.PRIOR, shape), steps=32, **how))
    file = weights.path(f"{name}/model.safetensors") if name in TOKENS else Path(name)
    return cast(Model, masked_lm.MaskedModel(masked_lm.load(file), **how))


def is_of_tokens(source: str) -> bool:
    """Whether it names a model of token sequences: a bundled one, or a file of weights."""
    return source in TOKENS or (source.endswith(".safetensors") and Path(source).is_file())


def world_of(source: str) -> str:
    """The bundled world that a model draws from: its own name, or what a file of weights says; else the name as it is."""
    if source in TOKENS or not is_of_tokens(source):
        return source
    return masked_lm.header(source).get("world") or source


def _unknown(source: str) -> UserError:
    close = difflib.get_close_matches(source, [*BUNDLED, *TOKENS], 1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Bundled: {', '.join([*BUNDLED, *TOKENS])}."
    return UserError(
        f"There is no model {source!r}: not a bundled name, not a folder, not a hub id (org/name), not "
        f"file.py:Class. {hint}"
    )


def families() -> dict[str, type[Latent]]:
    """{diffusers pipeline class: the family that reads it}, of every file in this folder that has one."""
    found = {}
    for file in pkgutil.iter_modules(models.__path__):
        for kind in vars(importlib.import_module(f"tropism.models.{file.name}")).values():
            if isinstance(kind, type) and issubclass(kind, Latent):
                found |= dict.fromkeys(kind.pipelines, kind)
    return found


def family_of(source: str | Path) -> type[Latent]:
    """The family that reads a folder or hub id. Raises UserError for a pipeline of another class."""
    name, known = pipeline.index_of(source).get("_class_name"), families()
    if isinstance(name, list):
        raise pipeline.own_code(source)
    if name not in known:
        raise UserError(
            f"{source} is a {name}, which nothing here reads. Known are {', '.join(sorted(known))}. Choose such a model, or "
            "write your own: --model file.py:Class."
        )
    return known[name]


def load_model(source: str | Path, **options: Any) -> Model:
    """The model `source` names: "shapes", "glyphs" (an upscaler) or "solids" (which reads a picture beside the words), a folder with
    model_index.json, "org/name" on the hub, "file.py:Class", or the .safetensors file of a distilled model of tokens.

    The options are Latent.load's; a user's own class is made without arguments and none of them reaches it.
    Raises UserError if nothing of that name exists, with the nearest bundled name.
    """
    source = str(source)
    if is_of_tokens(source):
        return _tokens(source, options)
    if plugin.is_spec(source):
        return _own(source, options)
    found: str | Path = weights.path(BUNDLED[source]) if source in BUNDLED else Path(source).expanduser()
    if not Path(found).is_dir():
        if not re.fullmatch(r"[\w.-]*\w/[\w.-]+", source):
            raise _unknown(source)
        found = source
    if source in ADAPTERS and options.get("visual") is None:
        options["visual"] = weights.path(ADAPTERS[source])
    model = family_of(found).load(found, **options)
    for name, value in OWN.get(source, {}).items():
        setattr(model, name, value)
    return cast(Model, model)
