"""Checkpoints that survive a kill at any moment: atomic, hashed, and without pickle.

A checkpoint is a folder `step-000100` of safetensors and JSON files, a manifest with the sha256 of each, and a marker
COMPLETE with the sha256 of the manifest. It is written under a temporary name, flushed to the disk and renamed, so a
folder of that name is either whole or damaged by someone else, and the hashes tell. Nothing else in it is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.core import UserError

_STEP = re.compile(r"step-(\d{6,12})")
_FILE = re.compile(r"[a-z0-9_]+\.(safetensors|json)")


class Damaged(Exception):
    """A checkpoint folder that must not be used; the text says why."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `update` updates: tensors by file and name, JSON values, and remarks about skipped folders."""

    update: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict
    remarks: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------- writing


def save(folder: Path, update: int, tensors: dict[str, dict[str, Tensor]], values: dict, *, keep: int = 3) -> Path:
    """Write `folder`/step-NNNNNN atomically and keep the newest `keep` of them.

    tensors: {"weights": {name: tensor}, ...}, one safetensors file each. values: JSON values, in state.json.
    Raises OSError or SafetensorError (for example a full disk); older checkpoints are then untouched and the half-written one is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary, final = folder / f".tmp-{update:06d}", folder / f"step-{update:06d}"
    try:
        temporary.mkdir()
        _write_files(temporary, tensors, {"update": update, **values})
        if final.exists():
            final.rename(folder / f".tmp-old-{update:06d}")
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(folder)
    _prune(folder, update, keep)
    return final


def _write_files(folder: Path, tensors: dict[str, dict[str, Tensor]], values: dict) -> None:
    for name, group in tensors.items():
        _write_tensors(folder / f"{name}.safetensors", group)
    _write_text(folder / "state.json", json.dumps(values, sort_keys=True))
    manifest = {p.name: _sha256(p) for p in sorted(folder.iterdir())}
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    _write_text(folder / "COMPLETE", _sha256(folder / "manifest.json"))
    _sync_folder(folder)


def _write_tensors(path: Path, group: dict[str, Tensor]) -> None:
    assert _FILE.fullmatch(path.name), path.name
    copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in group.items()}
    save_file(copies, path)
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written. The run's lock makes this process the only writer."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def _prune(folder: Path, update: int, keep: int) -> None:
    """Drop all but the newest `keep`. What claims to be newer than this update was found damaged: it goes."""
    steps = _steps(folder)
    ahead = sum(int(p.name[5:]) > update for p in steps)
    for old in steps[:ahead] + steps[ahead + max(1, keep) :]:
        # renamed first, so that a kill half-way through leaves no folder that looks like a checkpoint
        aside = old.rename(folder / f".tmp-drop-{old.name}")
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- reading


def _steps(folder: Path) -> list[Path]:
    """The checkpoint folders, newest first; links and other names are not ours."""
    found = [p for p in folder.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint whose hashes match, or None; `remarks` names each newer one that was skipped."""
    remarks: list[str] = []
    for step in _steps(folder):
        try:
            loaded = load(step)
        except Damaged as error:
            remarks.append(f"Checkpoint {step.name} is damaged ({error}) and was skipped.")
            continue
        return Checkpoint(loaded.update, loaded.tensors, loaded.values, tuple(remarks))
    return Checkpoint(0, {}, {}, tuple(remarks)) if remarks else None


def load(step: Path) -> Checkpoint:
    """Read one checkpoint folder after checking every hash. Raises Damaged."""
    try:
        names = _verified(step)
        values = json.loads((step / "state.json").read_text("utf-8"))
        tensors = {Path(n).stem: load_file(step / n) for n in names if n.endswith(".safetensors")}
    except (OSError, ValueError, SafetensorError) as error:
        raise Damaged(str(error)) from error
    if values.get("update") != int(step.name[5:]):
        raise Damaged("its number is not the one saved in it")
    return Checkpoint(values.pop("update"), tensors, values)


def _verified(step: Path) -> list[str]:
    """The names in the manifest, each a plain file name with the hash it should have."""
    if not (step / "COMPLETE").is_file():
        raise Damaged("no COMPLETE marker")
    if (step / "COMPLETE").read_text("utf-8").strip() != _sha256(step / "manifest.json"):
        raise Damaged("manifest.json: sha256 differs")
    manifest = json.loads((step / "manifest.json").read_text("utf-8"))
    for name, digest in manifest.items():
        if not _FILE.fullmatch(name) or (step / name).is_symlink():
            raise Damaged(f"manifest.json names {name!r}, which is not a file of a checkpoint")
        if _sha256(step / name) != digest:
            raise Damaged(f"{name}: sha256 differs")
    if "state.json" not in manifest:
        raise Damaged("state.json is missing from the manifest")
    return list(manifest)


# ---------------------------------------------------------------------------------------------------- full disk


def is_full(error: OSError | SafetensorError) -> bool:
    """Whether an error means that the disk, or the user's share of it, is full; safetensors says so in words only."""
    if isinstance(error, OSError):
        return error.errno in (ENOSPC, EDQUOT)
    return any(words in str(error) for words in (f"os error {ENOSPC}", f"os error {EDQUOT}", "No space left"))


def full_disk(folder: Path, error: OSError | SafetensorError) -> UserError:
    """The one message a full disk gets; what was complete before stays on the disk."""
    kept = next((p.name for p in _steps(folder)), None)
    return UserError(
        f"No space left on the disk while writing {getattr(error, 'filename', None) or folder.parent}. The run stopped; "
        + (
            f"the checkpoint {kept} and all metrics before it are kept. "
            if kept
            else "no checkpoint was complete yet. "
        )
        + "Free some space and run the same command with --resume."
    )
