"""Commands for finished adapters: take one elsewhere, or mix several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.console import Console

from tropism.core import UserError
from tropism.models import lora, mixing
from tropism.models.latent import Latent
from tropism.models.load import load_model
from tropism.run import export as exporting


def export(
    run: str | Path,
    *,
    format: str = "diffusers",
    out: str | Path | None = None,
    model: str | None = None,
    strength: float = 1.0,
    push: str | None = None,
    public: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> Path | str:
    """Take a finished adapter out of its run; returns where it is.

    run: a run folder, or an adapter's. format: "diffusers", "kohya" (ComfyUI) or "fused". out: a new folder, for kohya a
    .safetensors file. model: the base, default the run's. strength: how much of the adapter. push: "org/name" sends the
    run's adapter and model card to the hub instead, private unless `public`; nothing is ever sent without it.
    Raises UserError for neither out nor push, and for whatever `run.export` refuses.
    """
    if (out is None) == (push is None):
        raise UserError("Say where the adapter shall go: --out PLACE, or --push ORG/NAME for the hub, one of them.")
    if push is not None:
        return exporting.push(run, push, private=not public)
    options = {"model": model, "strength": strength, "device": device, "dtype": dtype}
    done = exporting.export(run, format=format, out=cast(Path, out), **options)
    if done.difference is not None:
        Console(soft_wrap=True, highlight=False, markup=False).print(
            f"Read back and compared with base and adapter: largest pixel difference {done.difference:.1e}."
        )
    return done.path


def mix(adapters: Sequence[str], *, out: str | Path, model: str = "shapes") -> Path:
    """Sum the B A products of finished adapters, each "FOLDER=WEIGHT", into one adapter in `out`; returns its file.

    Raises UserError for a weight that is not a number or adapters of another base.
    """
    parts: dict[str | Path, float] = {}
    for text in adapters:
        folder, _, weight = text.rpartition("=")
        try:
            share, adapter = (float(weight) if folder else 1.0), _adapter(folder or weight)
        except ValueError as error:
            raise UserError(f"The weight in {text!r} is not a number. Write --adapter FOLDER=0.5.") from error
        if not math.isfinite(share):
            raise UserError(f"The weight in {text!r} is not finite. Write --adapter FOLDER=0.5.")
        parts[adapter] = parts.get(adapter, 0.0) + share
    if Path(out).is_file() or (Path(out).exists() and any(Path(out).iterdir())):
        raise UserError(
            f"{out} is a file or a folder that is not empty, and a mixture never writes over an adapter. Choose another --out."
        )
    loaded = load_model(model)
    if not isinstance(loaded, Latent):
        raise UserError(f"{model} is not a diffusers pipeline, and only their adapters can be mixed.")
    mixing.mix(loaded, parts)
    file = lora.save(loaded, out)
    lora.verify(loaded, out)
    return file


def _adapter(folder: str) -> Path:
    """A run folder's adapter, or the adapter folder itself."""
    inside = Path(folder) / "lora"
    return inside if inside.is_dir() else Path(folder)
