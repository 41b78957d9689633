"""The run folder while a run goes on: configuration, environment, metrics.jsonl, progress, and trackers when asked for."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from tropism.core import UserError
from tropism.run.optimiser import is_main
from tropism.run.progress import Progress
from tropism.run.trackers import Trackers, check

try:
    import fcntl
except ImportError:  # not POSIX: two runs in one folder are then not noticed
    fcntl = None

PRODUCTS = (
    "config.yaml",
    "scene.ply",
    "env.json",
    "metrics.jsonl",
    "metrics.lost.jsonl",
    "checkpoints",
    "lora",
    "before.png",
    "after.png",
    "before_after.png",
    "reward.png",
    "report.html",
    "README.md",
    "logs",
    "samples",
    "failed_batch",
    "best",
    "weights",
    "pictures",
    "samples.csv",
    "guided.png",
    "plain_guided.png",
    "quantiles.png",
    "sequences.png",
    "logo.png",
    "molecules.png",
    "plain_molecules.png",
    "value.safetensors",
    "side_by_side.png",
    "compare.csv",
    "dial.csv",
    "dial.png",
    *(
        "coarse",
        "fine",
        "visual.safetensors",
        "visual_prompt.png",
        "scene.safetensors",
        "turntable.gif",
        "turntable.mp4",
    ),
    *("views.png", "mesh.glb", "viewer.html", "metrics.json"),
)
_PACKAGES = ("tropism", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, platform and thread count; nothing that names a machine or a person."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class Recorder:
    """Owns a run folder. On processes other than the first it does nothing.

    config: the resolved settings, plain YAML values. resume: go on in an existing folder (an empty one starts afresh).
    overwrite: first remove what an earlier run left there, and nothing else. trackers: "tensorboard", "wandb".
    Raises UserError if the folder holds anything and neither is given, or if another run is using it.
    """

    def __init__(
        self,
        out: Path | str,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        trackers: Sequence[str] = (),
        console: Console | None = None,
    ):
        self.out, self.metrics = Path(out), Path(out) / "metrics.jsonl"
        self.console = console or Console(soft_wrap=True, highlight=False, markup=False)
        self.progress: Progress | None = None
        self.active, self._lock = is_main(), None
        self.config, self.environment = dict(config), environment()
        if not self.active:
            return
        check(trackers)
        with _writable(self.out):
            _prepare(self.out, resume, overwrite)
            self._lock = _locked(self.out / ".lock")
            if overwrite and not resume:
                _remove_products(self.out)
            self.remarks = _differences(self.out, self.config, self.environment) if resume else []
            self._begun = resume and (self.out / "env.json").exists()
            if not self._begun:
                self._write_settings()
        self.trackers = Trackers(trackers, self.out, self.config, self.say)

    def _write_settings(self) -> None:
        _write(self.out / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        _write(self.out / "env.json", json.dumps(self.environment, indent=1) + "\n")

    @contextmanager
    def showing(self, update: int, updates: int, remarks: Sequence[str] = (), word: str = "update") -> Iterator[None]:
        """Cut the metrics back to `update` (-1: all), say what there is to say; inside, show progress towards
        `updates`. A resumed run's settings replace the old ones here, once everything else has accepted them.
        """
        if not self.active:
            yield
            return
        if self._begun:
            self._write_settings()
        cut_back(self.metrics, update)
        for remark in (*self.remarks, *remarks):
            self.say(remark)
        self.progress = Progress(self.console, updates, max(update, 0), word)
        try:
            yield
        finally:
            self.progress.stop()
            self.progress = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, flushed; a number that is not finite becomes null."""
        if not self.active:
            return
        line = json.dumps(_finite(row), allow_nan=False)
        with self.metrics.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
        if self.progress:
            self.progress.show(row)
        self.trackers.log(row)

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        return read_lines(self.metrics)

    def say(self, text: str) -> None:
        """One line for the user, above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the trackers and give the folder free. Safe to call twice."""
        if self.active and self._lock is not None:
            self.trackers.close()
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------- the folder


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The folder {out} cannot be written: {error.strerror}. Free some space, or choose another --out."
        ) from error


def _prepare(out: Path, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, but a run needs a folder. Choose another --out.")
    filled = out.exists() and any(p.name != ".lock" for p in out.iterdir())
    begun = filled and {p.name for p in out.iterdir()} <= {".lock", "config.yaml"}  # killed between its first two files
    if filled and (overwrite or resume) and not begun and not (out / "env.json").exists():
        raise UserError(
            f"The folder {out} was not written by a run (it has no env.json), so it is left alone. Choose another --out."
        )
    if filled and not (resume or overwrite):
        raise UserError(
            f"The folder {out} is not empty, and a run never writes over another. Add --resume to go on with it, "
            "--overwrite to replace it, or choose another --out."
        )
    out.mkdir(parents=True, exist_ok=True)


def _locked(path: Path) -> int:
    """A lock that ends with the process that holds it, however it dies, so no stale one is ever in the way."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        raise UserError(
            f"Another run (process {owner or 'unknown'}) is using the folder {path.parent}. Wait for it or stop it, "
            "or choose another --out."
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def _remove_products(out: Path) -> None:
    for name in PRODUCTS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _differences(out: Path, config: dict, environment: dict) -> list[str]:
    """What a resumed run does otherwise than the folder's own configuration and environment say."""
    remarks, before = [], _read(out / "config.yaml", yaml.safe_load)
    keys = (before.keys() | config.keys()) - {"resume", "overwrite"}
    changed = sorted(k for k in keys if before.get(k) != config.get(k))
    if before and changed:
        remarks.append(
            "Resuming with changed settings: "
            + ", ".join(f"{k} {before.get(k)!r} -> {config.get(k)!r}" for k in changed)
            + "."
        )
    threads = _read(out / "env.json", json.loads).get("threads", environment["threads"])
    if threads != environment["threads"]:
        remarks.append(
            f"Resuming with {environment['threads']} threads instead of {threads}: the last bits of the result may "
            f"differ. Use --threads {threads} to repeat them."
        )
    return remarks


def _read(path: Path, parse: Callable[[str], Any]) -> dict:
    try:
        found = parse(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------- metrics


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parsed(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("update"), int) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a half-written last line is left out."""
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    return [row for row in map(_parsed, text.splitlines()) if row is not None]


def cut_back(path: Path, update: int) -> None:
    """Keep the lines up to `update`; the rest is appended to metrics.lost.jsonl."""
    if not path.exists():
        return
    kept, lost = [], []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        row = _parsed(line)
        (kept if row is not None and row["update"] <= update else lost).append(line)
    if lost:
        with path.with_name("metrics.lost.jsonl").open("a", encoding="utf-8") as f:
            f.write("\n".join(lost) + "\n")
        _write(path, "".join(line + "\n" for line in kept))
