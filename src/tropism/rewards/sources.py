"""Where a catalogue reward's weights come from: a transformers folder, a hub id, or a file in its authors' own layout.

Every failure is one line: what could not be read, why, and what to give instead.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.core import UserError
from tropism.quiet import quiet

NOT_CONFIRMED = "not confirmed"
OWN = "Apache-2.0, as this library"
OFFLINE = "A hub id needs a network the first time; a folder does not."


@dataclass(frozen=True)
class About:
    """What a reward says of itself, `about`; whether it has a gradient is `differentiable` on the reward, and tested.

    range: the lowest and highest value it can take (where it takes any: -inf and NaN are samples that have none). size: the side, in
    pixels, that its network sees, None if it sees a picture at its own, or none. licence: of the weights, or of what computes it; "not
    confirmed" where nobody here has read it. source: whose weights or formula.
    """

    range: tuple[float, float]
    size: int | None
    licence: str
    source: str


def configuration(source: str, kinds: tuple[str, ...], what: str, example: str) -> Any:
    """The configuration of a transformers folder or hub id whose model_type is one of `kinds`. Raises UserError."""
    from transformers import AutoConfig

    try:
        with quiet():
            found = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise unreadable(source, what, error, example) from error
    if found.model_type not in kinds:
        raise UserError(
            f"'{source}' holds no {what}: its model_type is '{found.model_type}', which this reward cannot use. "
            f"Give one of type {' or '.join(kinds)}, such as {example}."
        )
    return found


def pretrained(kind: Any, source: str, what: str, example: str) -> Any:
    """`kind.from_pretrained(source)` in float32, every weight of it read from the file. Raises UserError.

    transformers fills missing weights with random numbers and a warning; a judge with random weights is refused here.
    """
    try:
        with quiet():
            model, report = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise unreadable(source, what, error, example) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"'{source}' holds no whole {what}: {len(missing)} weights are missing, {missing[0]} among them. "
            f"Give the whole model, such as {example}."
        )
    return model


def tokenizer_of(source: str, what: str, example: str) -> Any:
    """The tokenizer of a folder or hub id. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            words = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable(source, f"{what} with a tokenizer", error, example) from error
    if set(words.get_vocab()) <= set(words.all_special_tokens):  # what transformers makes of a folder without one
        raise unreadable(source, f"{what} with a tokenizer", OSError("its vocabulary is empty."), example)
    return words


def unreadable(source: str, what: str, error: Exception, example: str) -> UserError:
    if refused := _refused(source, error):
        return refused
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"No {what} could be read from '{source}': {reason} Give a folder, or a hub id such as {example}. {OFFLINE}"
    )


def _refused(source: str, error: BaseException) -> UserError | None:
    """What to say where the hub does not give a repository, and None for every other error."""
    kinds, cause = set[str](), error
    while cause is not None and len(kinds) < 10:
        kinds.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in kinds or "access a gated repo" in str(error):
        return UserError(
            f"'{source}' could not be fetched: it is gated. Accept its licence at its page, then log in: hf auth login."
        )
    if "RepositoryNotFoundError" in kinds or "not a valid model identifier" in str(error):
        return UserError(
            f"'{source}' could not be fetched: there is no folder and on the hub no such repository, or it is private. Check the "
            "spelling, or log in: hf auth login."
        )
    return None


# ---------------------------------------------------------------------------------------------------- weight files


def read_weights(source: str, name: str) -> dict[str, Tensor]:
    """The tensors of a published weight file that is not in transformers' layout, on the CPU.

    source: the file itself, a folder that holds `name`, or a hub id whose file `name` is fetched. A .safetensors file is
    read as it is. Any other is read by torch.load(weights_only=True), which runs no code, and is written once as
    safetensors to the cache folder (`cache_folder`), its SHA-256 in the name and in the header. Nothing else that is
    pickled is ever read. Raises UserError for a file that is missing, is no weight file, or cannot be fetched.
    """
    file = find_file(source, name)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    digest = _sha256(file)
    converted = cache_folder() / f"{file.stem}-{digest[:16]}.safetensors"
    if not _is_conversion_of(converted, digest):
        _convert(file, converted, digest)
    return _safetensors(converted)


def cache_folder() -> Path:
    """Where converted weights are kept: tropism/weights below $XDG_CACHE_HOME, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tropism" / "weights"


def find_file(source: str, name: str) -> Path:
    """The local path of `source` if it is a file, of `name` in it if it is a folder, else of `name` from the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        beside = [path / name, (path / name).with_suffix(".safetensors")]
        found = [file for file in beside if file.is_file()]
        if not found:
            raise UserError(f"The folder {source} holds neither {beside[0].name} nor {beside[1].name}. Put one there.")
        return found[0]
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or source.count("/") != 1:
        raise UserError(f"There is no weight file {source}. Give the path of {name}, its folder, or a hub id.")
    return _fetched(source, name)


def _fetched(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:
        if refused := _refused(source, error):
            raise refused from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} could not be fetched from the hub id '{source}': {reason} Download it where there is a network and "
            f"give the file's path."
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # the library's own error type is not an OSError
        raise UserError(f"{file} is no safetensors file: {error}. Fetch it again.") from error


def _is_conversion_of(file: Path, digest: str) -> bool:
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as stored:
            return (stored.metadata() or {}).get("sha256") == digest
    except Exception:  # cut off half-way: it is written again
        return False


def _convert(file: Path, converted: Path, digest: str) -> None:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{file} cannot be read as plain tensors: {reason} A file that runs code when it is read is refused; give "
            "one of tensors only (.pt, .pth, .safetensors)."
        ) from error
    tensors = _tensors(loaded)
    if not tensors:
        raise UserError(f"{file} holds no tensors by name. Give a file with a state dict.")
    converted.parent.mkdir(parents=True, exist_ok=True)
    unfinished = converted.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, unfinished, {"sha256": digest, "file": file.name})
    os.replace(unfinished, converted)


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, bare or as the entry "state_dict" of a checkpoint."""
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    # Copies, because safetensors refuses tensors that share memory.
    return {name: t.detach().clone().contiguous() for name, t in inner.items() if isinstance(t, Tensor)}


def fill(module: nn.Module, state: dict[str, Tensor], source: str, what: str) -> nn.Module:
    """`module` with the weights of `state`, in float32; entries it has no place for are left out.

    Raises UserError where one is missing or has another shape: the file is of another architecture.
    """
    wanted = module.state_dict()
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    if wrong:
        raise UserError(
            f"{source} is not the weights of {what}: {len(wrong)} of {len(wanted)} are missing or of another shape, "
            f"{wrong[0]} among them. Give the published file."
        )
    module.load_state_dict({name: state[name].float() for name in wanted})
    return module
