"""Takes a finished adapter out of its run: for diffusers, for ComfyUI, fused into its base; and to the hub, when asked.

Every export is checked against the base model first, written beside its place, read back and only then moved there.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tropism import plugin
from tropism.align.rollout import sample
from tropism.core import Draw, UserError
from tropism.models import kohya, lora, mixing, pipeline
from tropism.models.latent import Latent
from tropism.models.load import BUNDLED, family_of, load_model
from tropism.models.lora import LoraSettings
from tropism.quiet import quiet
from tropism.run.checks import finite_numbers, known, set_up
from tropism.worlds import weights

FORMATS = ("diffusers", "kohya", "fused")
SIDE = 32
"""Latent pixels a side, at most, of the pictures that judge an export."""
SENT = ("README.md", "config.yaml", "before_after.png", "reward.png")
"""What `push` sends beside the adapter."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Exported:
    """Where the export is, and how far a pixel in [0, 1] is off when it is read back (None for kohya: nothing draws it here)."""

    path: Path
    difference: float | None


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    title: str
    layers: dict[str, Tensor]
    settings: LoraSettings
    source: str
    family: type[Latent]
    config: dict[str, Any]
    options: dict[str, Any]


def export(
    run: str | Path,
    *,
    format: str = "diffusers",
    out: str | Path,
    model: str | None = None,
    strength: float = 1.0,
    device: str = "cpu",
    dtype: str = "float32",
) -> Exported:
    """Write the adapter of a run folder, or of an adapter folder, in another format; nothing is ever written over.

    format: diffusers (a folder for load_lora_weights), kohya (a file for ComfyUI and kohya's scripts) or fused (a whole
    diffusers pipeline that needs no adapter). out: a new folder; for kohya a .safetensors file, or the folder it goes to.
    model: the base, default the one in the run's config.yaml. strength: how much of the adapter, for kohya and fused.
    Raises UserError for an adapter of another base, an unknown module, a place that is taken, and an export that draws
    other pictures than base and adapter do: a pixel differs by over 1e-4 (a fused pipeline in half precision: only reported).
    """
    known(format, FORMATS, "format")
    finite_numbers(strength=strength)
    if format == "diffusers" and strength != 1:
        raise UserError(
            f"strength is {strength:g}, but a diffusers adapter gets its strength from the one who loads it. Leave --strength "
            "out, or take --format kohya or fused."
        )
    place, precision = set_up(device, dtype, None)
    adapter = _read(Path(run), model, {"device": place, "dtype": precision})
    out = Path(out).expanduser()
    if format == "kohya":
        return Exported(_kohya(adapter, out, strength), None)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(
            f"{out} is a file or a folder that is not empty; it is never written over. Choose another --out."
        )
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
    try:
        difference = _diffusers(adapter, beside) if format == "diffusers" else _fused(adapter, beside, strength)
        if out.is_dir():
            out.rmdir()
        beside.rename(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(out, difference)


def _unwritable(out: Path, error: Exception) -> UserError:
    return UserError(f"{out} cannot be written ({error}). Free some space, or choose another --out.")


# ---------------------------------------------------------------------------------------------------- what is exported


def found(run: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter's folder of a run, or an adapter's own, and the settings of config.yaml beside it, {} if there is none."""
    folder = run / "lora" if (run / "lora").is_dir() else run
    places = [folder / "config.yaml", *([folder.parent / "config.yaml"] if folder.name == "lora" else [])]
    file = next((p for p in places if p.is_file()), None)
    return folder, _mapping(file.read_text("utf-8", "replace")) if file else {}


def _read(run: Path, model: str | None, options: dict[str, Any]) -> _Adapter:
    """The adapter with the base it is for, checked against that base's shapes; no weight of the base is read."""
    folder, config = found(run)
    if folder == run and (run / "weights" / "trained.safetensors").is_file():
        raise UserError(
            f"{run} trained every weight (--full), so it has no adapter to export. Its README.md says how to load its weights."
        )
    layers, settings, _ = lora.read(folder)
    source = _source(model or config.get("model"), folder)
    family, network = _skeleton(source)
    kohya.check_fits(layers, network, folder, source)
    options = options | ({"t5": False} if config.get("t5") is False else {})
    home = folder.parent if folder.name == "lora" else run
    title, own = home.resolve().name.removesuffix(".safetensors"), dict(cast(Any, network).config)
    return _Adapter(folder, title, layers, settings, source, family, own, options)


def _mapping(text: str) -> dict[str, Any]:
    """YAML settings; none if it holds something else."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _source(model: Any, folder: Path) -> str:
    """The folder or hub id of a base model."""
    if not isinstance(model, str):
        raise UserError(f"Nothing beside {folder} says what base model the adapter is for. Name it: --model.")
    if plugin.is_spec(model):
        raise UserError(f"The base is your own class ({model}); only adapters of diffusers pipelines can be exported.")
    if model in BUNDLED:
        return str(weights.path(BUNDLED[model]))
    found = Path(model).expanduser()
    if not found.is_dir() and not _HUB_ID.fullmatch(model):
        raise UserError(f"There is no base model {model!r} here: neither a folder nor a hub id. Name it: --model.")
    return str(found) if found.is_dir() else model


def _skeleton(source: str) -> tuple[type[Latent], nn.Module]:
    """The family that reads a base, and its denoiser without any weights: names and shapes."""
    family, index = family_of(source), pipeline.index_of(source)
    with quiet():
        import diffusers

        kind = getattr(diffusers, index[family.part][1])
        config = kind.load_config(source, subfolder=family.part)
        with torch.device("meta"):
            return family, kind.from_config(config)


# ---------------------------------------------------------------------------------------------------- the formats


def _kohya(adapter: _Adapter, out: Path, strength: float) -> Path:
    file = out if out.suffix == ".safetensors" else out / f"{adapter.title}.safetensors"
    if file.exists():
        raise UserError(f"{file} is there already, and an export never writes over it. Choose another --out.")
    scaled = replace(adapter.settings, alpha=(adapter.settings.alpha or 0.0) * strength)
    tensors = kohya.kohya(adapter.layers, scaled, adapter.family)
    header = kohya.metadata(tensors, adapter.family, adapter.config, adapter.title)
    beside = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata=header)
        beside.rename(file)
    except (OSError, SafetensorError) as error:
        if beside.is_file():
            beside.unlink()
        raise _unwritable(file, error) from error
    return file


def _model(adapter: _Adapter, fused: Path | None = None) -> Latent:
    """The base with the adapter, or what the two were fused to, at a small picture size."""
    settings, source = (None, fused) if fused else (adapter.settings, adapter.source)
    model = cast(Latent, load_model(source, lora=settings, checkpointing=False, **adapter.options))
    shrink(model)
    if not fused:
        lora.load(model, adapter.folder)
    return model


def shrink(model: Latent) -> None:
    """Let it draw pictures that are small enough to judge an adapter quickly."""
    model.shape = (model.shape[0], min(model.shape[1], SIDE), min(model.shape[2], SIDE))


def _pictures(model: Latent) -> Tensor:
    batch = model.trial(["a picture", "three red circles"])
    return sample(cast(Any, model), batch, Draw(0, 0, batch.index), steps=4, guidance=3.0).float().cpu()


def _diffusers(adapter: _Adapter, out: Path) -> float:
    lora.save(model := _model(adapter), out)
    return lora.verify(model, out)


def _fused(adapter: _Adapter, out: Path, strength: float) -> float:
    model = _model(adapter)
    lora.scale(model, strength)
    expected = _pictures(model)
    kind, precision = model.pipeline, adapter.options["dtype"]
    del model  # two of them may not fit
    with quiet():
        try:
            index = pipeline.index_of(adapter.source)
            absent = dict.fromkeys(k for k, v in index.items() if isinstance(v, list | tuple) and v[1] is None)
            if adapter.options.get("t5") is False:
                absent |= dict.fromkeys(f"{part}{adapter.family.optional}" for part in ("text_encoder", "tokenizer"))
            pipe = cast(Any, kind).from_pretrained(adapter.source, use_safetensors=True, dtype=precision, **absent)
        except (OSError, ValueError, ImportError) as error:
            raise pipeline.unreadable(adapter.source, error) from error
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(adapter.folder))
            pipe.fuse_lora(lora_scale=strength)
            pipe.unload_lora_weights()
        else:
            mixing.merge(getattr(pipe, adapter.family.part), adapter.folder, strength)
        pipe.save_pretrained(out, safe_serialization=True)
    del pipe
    difference = (_pictures(_model(adapter, out)) - expected).abs().max().item()
    if difference <= (limit := 1e-4 if torch.finfo(precision).bits >= 32 else 1.0):  # a NaN is not
        return difference
    raise UserError(
        f"The fused pipeline does not draw what base and adapter draw: a pixel differs by {difference:.3g}, the limit is "
        f"{limit:g}. Nothing was kept. Try --dtype float32, or --format diffusers."
    )


# ---------------------------------------------------------------------------------------------------- the hub


def push(
    folder: str | Path, repo_id: str, *, token: str | None = None, private: bool = True, endpoint: str | None = None
) -> str:
    """Send a run's adapter, model card, pictures and settings to the hub in one commit; returns the repository's address.

    Checkpoints, samples, metrics and the environment stay here. repo_id: org/name, made if it is not there, then private
    unless said otherwise. token: default the one of `hf auth login` or HF_TOKEN. endpoint: another hub.
    Raises UserError for a run without adapter or card, and for everything the hub and the network can answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    files = _to_send(Path(folder))
    if not _HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no name for a repository. Write it as org/name: --push ORG/NAME.")
    secret = (token or get_token() or "").strip()
    if not re.fullmatch(r"[!-~]+", secret):  # also: what is no header must not come back in an error of the client's
        raise UserError(f"There is no usable token, so nothing of {folder} was sent. Log in: hf auth login.")
    added, api = [CommitOperationAdd(n, str(p)) for n, p in files.items()], HfApi(endpoint=endpoint, token=secret)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, added, commit_message="Adapter and model card, by Tropism")
        return str(url)
    except Exception as error:  # the client lets its HTTP library's own errors through, and that library changes
        raise _refused(error, repo_id, folder, secret) from None


def _to_send(folder: Path) -> dict[str, Path]:
    """{name at the hub: file}. Raises UserError for a run that has no adapter, or no card that the hub takes."""
    adapters = {f"lora/{p.name}": p for p in sorted((folder / "lora").glob("*.safetensors"))}
    card = folder / "README.md"
    if not adapters or not card.is_file():
        what = "model card (README.md)" if adapters else "adapter (lora/*.safetensors)"
        raise UserError(f"{folder} has no {what}, so there is nothing to send. Name a finished run's folder.")
    head = re.match(r"---\n(.*?)\n---\n", card.read_text("utf-8", "replace"), re.DOTALL)
    base = _mapping(head[1] if head else "").get("base_model") or []
    for name in base if isinstance(base, list) else [base]:
        if not _HUB_ID.fullmatch(str(name)) or Path(str(name)).exists():
            raise UserError(
                f"{card} names the base model {name!r}, which is no id at the hub, and the hub refuses such a card. Take the "
                "line base_model out of its head, or write the id (org/name) that the base has there."
            )
    return {name: folder / name for name in SENT if (folder / name).is_file()} | adapters


_WHY = {
    401: "the token is not valid, or there is no such place for it. Log in again: hf auth login",
    403: "this token may not write there. Take a token with write access and a name of your own or of your organisation",
    404: "there is no such place. Check the spelling of ORG/NAME",
    429: "there were too many requests. Wait a minute and send it again",
}


def _refused(error: Exception, repo_id: str, folder: str | Path, secret: str) -> UserError:
    """One line for everything that can go wrong on the way; the token is in none of them."""
    answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
    status = next((a.status_code for a in answers if a is not None), None)
    if status is None:
        why = f"it cannot be reached, or its answer makes no sense ({type(error).__name__}). Go online (without HF_HUB_OFFLINE)"
    elif status >= 500:
        why = f"the hub has a fault of its own ({status}). Send it again later"
    else:
        said = " ".join(str(error).split()).replace(secret, "***")[:200]
        why = f"{_WHY.get(status, f'it says: {said}. Mend README.md or the name')} ({status})"
    return UserError(f"{repo_id} could not be sent to the hub: {why}. What the run made is safe in {folder}.")
