"""Reads diffusers pipelines, in part or whole: safetensors only, nothing of a stranger's code is run, one clear error a fault."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tropism.core import UserError
from tropism.quiet import quiet

NEVER = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that no chain needs."""
LIBRARIES = ("diffusers", "transformers")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
QUANTISED = {"8bit": "torchao", "4bit": "bitsandbytes"}
"""Bits of the frozen denoiser's weights, and the library that holds them so."""


# ---------------------------------------------------------------------------------------------------- what is there


def index_of(source: str | Path) -> dict[str, Any]:
    """model_index.json of a folder or hub id, as it stands. Raises UserError if it cannot be had, saying why."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline. Name the folder that "
            "pipe.save_pretrained(folder) wrote."
        )
    try:
        with quiet():
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline

            found = DiffusionPipeline.load_config(str(source))
    except (OSError, ValueError) as error:
        raise unreadable(source, error, "model_index.json") from error
    if not isinstance(found, dict) or "_class_name" not in found:
        raise UserError(
            f"model_index.json of {source} names no pipeline class. Save the pipeline again, or copy it again."
        )
    return found


def unreadable(source: str | Path, error: Exception, wanted: str = "") -> UserError:
    """One line for everything the hub and the disk can answer: which model, which file, why, and the remedy."""
    kinds = [type(e).__name__ for e in _causes(error)]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"{wanted} of {source!r}" if wanted else f"the model {str(source)!r}"
    if "trust_remote_code" in str(error):
        return own_code(source)
    if "GatedRepoError" in kinds or "gated repo" in str(error):
        return UserError(
            f"{what} could not be fetched: {source} is gated. Accept its licence at its page, then log in: hf auth login."
        )
    if "RepositoryNotFoundError" in kinds or "401" in str(error):
        return UserError(
            f"{what} could not be fetched: the hub knows no {str(source)!r}, or it is private. Check the spelling, or log in: "
            "hf auth login."
        )
    if {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"} & set(kinds):
        return UserError(
            f"{what} could not be fetched: the hub cannot be reached and it is not in the cache. Go online once "
            "(hf download ID), or name a folder that pipe.save_pretrained(folder) wrote."
        )
    known = isinstance(error, OSError | ValueError | NotImplementedError) and lines
    said = lines[0] if known else f"{type(error).__name__}: {lines[0] if lines else 'without a word'}."
    return UserError(
        f"The model {str(source)!r} could not be read: {said} It must be a diffusers "
        "folder or a hub id with safetensors weights. Check the name and the network."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def own_code(source: str | Path) -> UserError:
    return UserError(
        f"{source} can only be read by running code that comes with it, which is never done here. Choose a model whose "
        "classes are in diffusers, or write your own: --model file.py:Class."
    )


def components(source: str | Path, index: Mapping[str, Any]) -> dict[str, bool]:
    """The parts a pipeline names, and whether each is there. UserError where one needs code of its own."""
    found = {k: v for k, v in index.items() if isinstance(v, list | tuple) and len(v) == 2}
    if any(library not in (*LIBRARIES, None) for k, (library, _) in found.items() if k not in NEVER):
        raise own_code(source)
    return {k: name is not None and k not in NEVER for k, (_, name) in found.items()}


def class_of(name: str) -> Any:
    """A class of diffusers; importing it warns of image processors that are never used."""
    with quiet():
        import diffusers

        return getattr(diffusers, name)


def check_parts(source: str | Path, kind: Any, there: Mapping[str, bool], optional: Sequence[str]) -> None:
    """Raises UserError for a pipeline whose parts are not those that its class takes: mislabelled, or saved without one.

    there: {part: whether it is there}. optional: parts that may be null beside NEVER.
    """
    taken = {n: p for n, p in inspect.signature(kind.__init__).parameters.items() if n != "self"}
    foreign = [part for part, is_there in there.items() if is_there and part not in taken]
    needed = [n for n, p in taken.items() if p.default is p.empty and n not in NEVER]
    missing = [part for part in needed if not there.get(part) and not (part in optional and part in there)]
    if foreign or missing:
        odd = [f"has {', '.join(foreign)}, which that pipeline does not take"] if foreign else []
        odd += [f"has no {', '.join(missing)}"] if missing else []
        raise UserError(
            f"{source} says it is a {kind.__name__}, but {', and '.join(odd)}. Correct _class_name in its "
            "model_index.json, or save the whole pipeline again."
        )


def check_folder(folder: Path, parts: Sequence[str]) -> None:
    """Raises UserError for a part without its folder, and for weights that are only there as a pickle."""
    for part in parts:
        if not (folder / part).is_dir():
            why = "so no prompt can be read" if part.startswith("tokenizer") else "though model_index.json names it"
            raise UserError(f"{folder} has no {part} folder, {why}. Save the whole pipeline again.")
        if not any((folder / part).glob("*.safetensors")) and any((folder / part).glob("*.bin")):
            raise UserError(
                f"{folder / part} holds its weights only as a pickle (.bin), which can run code when it is "
                "read, so it is refused. If you trust it, convert it once: load it with diffusers and call "
                "pipe.save_pretrained(folder, safe_serialization=True)."
            )
        if part.startswith("tokenizer") and not any((folder / part / name).is_file() for name in VOCABULARIES):
            raise UserError(
                f"{folder / part} has no vocabulary ({', '.join(VOCABULARIES)}), so no prompt can be read. Save the whole "
                "pipeline again."
            )
        if part == "scheduler":
            _config(folder / part / "scheduler_config.json")
        if "auto_map" in _config(folder / part / "config.json"):
            raise own_code(folder)


def _config(file: Path) -> dict[str, Any]:
    """A part's configuration, {} where it has none. Raises UserError for a file that holds something else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8", "replace"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Copy the model again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no settings. Copy the model again.")
    return found


# ---------------------------------------------------------------------------------------------------- reading


def read_family(
    family: Any, source: str, device: torch.device, options: Mapping[str, Any], texts: bool, kind: Any = None
) -> Any:
    """The pipeline that a family (a subclass of Latent) reads, with its text encoders alone or with everything but them.

    options: dtype, quantize and t5, as in `Latent.load`. kind: the pipeline's class, default diffusers' own of that name.
    """
    index = index_of(source)
    name = str(index.get("_class_name"))
    if name not in family.pipelines:
        raise UserError(
            f"{source} is a {name}; {family.__name__} reads {', '.join(family.pipelines)}. "
            "Choose such a model, or write your own: --model file.py:Class."
        )
    if not options.get("t5", True) and not family.optional:
        raise UserError(f"{name} needs all of its text encoders. Leave --no-t5 out.")
    there = components(source, index)
    if Path(source).is_dir():
        check_folder(Path(source), [p for p, is_there in there.items() if is_there])
    optional = (f"text_encoder{family.optional}", f"tokenizer{family.optional}") if family.optional else ()
    left = optional if not options.get("t5", True) else ()
    of_text = lambda part: part.startswith(("text_encoder", "tokenizer"))
    parts = [p for p, is_there in there.items() if is_there and of_text(p) == texts and p not in left]
    kind = kind or class_of(name)
    check_parts(source, kind, there, optional)
    return read_pipeline(
        kind,
        source,
        parts,
        [p for p in there if p not in parts],
        dtype=options["dtype"],
        device=device,
        quantize=(options["quantize"], family.part) if options.get("quantize") and not texts else None,
    )


def read_pipeline(
    kind: Any,
    source: str | Path,
    parts: Sequence[str],
    without: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: tuple[str, str] | None = None,
) -> Any:
    """The plain pipeline of class `kind` with only its `parts`, None in place of `without`: a bag of frozen networks.

    quantize: ("4bit" or "8bit", the part it is for).
    """
    if Path(source).is_dir():
        check_folder(Path(source), parts)
    own: dict[str, Any] = dict.fromkeys(without)
    if "requires_safety_checker" in inspect.signature(kind.__init__).parameters:
        own |= {"safety_checker": None, "requires_safety_checker": False}
    if quantize:
        own["quantization_config"] = _quantisation(*quantize, device, dtype)
    try:
        with quiet():
            pipe = kind.from_pretrained(str(source), use_safetensors=True, dtype=dtype, **own)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a file that is cut off or empty can raise anything
        raise unreadable(source, error) from error
    for part in parts:
        network = getattr(pipe, part)
        if isinstance(network, nn.Module):
            _check_complete(network, part, source)
            if part == "vae" and not cast(Any, network).config.scaling_factor:
                raise UserError(f"{source}: the VAE has no scaling_factor. Correct vae/config.json.")
            network.requires_grad_(False).eval()
            if not (quantize and part == quantize[1]):
                nn.Module.to(network, device, dtype)  # diffusers' own `to` warns without a cause
    return pipe


def _check_complete(network: nn.Module, part: str, source: str | Path) -> None:
    """Raises UserError for weights that the file did not hold: they stay on the meta device."""
    absent = [name for name, p in network.named_parameters() if p.is_meta]
    if absent:
        raise UserError(
            f"{source}: the weights of {part} lack {len(absent)} tensors ({', '.join(absent[:3])}). Copy or save the model again."
        )


def _quantisation(bits: str, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    if bits not in QUANTISED:
        raise UserError(
            f"quantize is {bits!r}; it must be one of {', '.join(QUANTISED)}. Leave --quantize out for none."
        )
    library = QUANTISED[bits]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f'quantize={bits} needs {library}, which is not installed. Install it (pip install "tropism[quantize]"), or leave '
            "--quantize out."
        )
    if bits == "4bit" and device.type != "cuda":
        raise UserError(
            f"quantize=4bit needs a GPU, and the device is {device.type}. Use --quantize 8bit or --device cuda."
        )
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig, TorchAoConfig

    if bits == "4bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        config = TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig(version=2))
    return PipelineQuantizationConfig(quant_mapping={part: config})
