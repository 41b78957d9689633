"""Commands for finished adapters: take one elsewhere, or mix several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import yaml
from rich.console import Console

from tropism.core import UserError
from tropism.models import lora, mixing
from tropism.models.latent import Latent
from tropism.models.load import load_model
from tropism.run import export as exporting
from tropism.run.checks import set_up


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


def mix(
    adapters: Sequence[str],
    *,
    out: str | Path,
    model: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Sum the B A products of finished adapters, each "FOLDER=WEIGHT", into one adapter in `out`; returns its file.

    model: the base, default the one that the runs name. A config.yaml beside the mixture names it and the parts, so that it can be
    exported and mixed again. The mixture is read back into a plain diffusers pipeline and compared.
    Raises UserError for a weight that is not a number, runs that name no base or several, and adapters of another base.
    """
    parts: dict[str | Path, float] = {}
    bases: dict[str, None] = {}
    with_t5 = False
    for text in adapters:
        folder, weight = _weighted(text)
        adapter, config = exporting.found(Path(folder))
        parts[adapter] = parts.get(adapter, 0.0) + weight
        with_t5 = with_t5 or config.get("t5") is not False
        bases |= dict.fromkeys([str(config["model"])] if config.get("model") else [])
    if Path(out).is_file() or (Path(out).exists() and any(Path(out).iterdir())):
        raise UserError(
            f"{out} is a file or a folder that is not empty, and a mixture never writes over an adapter. Choose another --out."
        )
    if model is None and len(bases) != 1:
        for adapter in parts:
            lora.read(adapter)  # says so if it is not there
        what = (
            f"The runs name several base models ({', '.join(bases)})" if bases else "No run says what its base model is"
        )
        raise UserError(f"{what}. Mix adapters of one base, and name it: --model.")
    base, (place, precision) = model or next(iter(bases)), set_up(device, dtype, None)
    loaded = load_model(base, device=place, dtype=precision, t5=with_t5)
    if not isinstance(loaded, Latent):
        raise UserError(f"{base} is not a diffusers pipeline, and only their adapters can be mixed.")
    mixing.mix(loaded, parts)
    exporting.shrink(loaded)
    file = lora.save(loaded, out)
    difference = lora.verify(loaded, out)
    named = {"model": base, "t5": with_t5, "mixture": {str(folder): weight for folder, weight in parts.items()}}
    (Path(out) / "config.yaml").write_text(yaml.safe_dump(named, sort_keys=False), "utf-8")
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"Read back into a plain pipeline and compared: largest pixel difference {difference:.1e}."
    )
    return file


def _weighted(text: str) -> tuple[str, float]:
    """ "FOLDER=WEIGHT", or a folder alone, whose weight is 1."""
    folder, _, weight = text.rpartition("=")
    try:
        share = float(weight) if folder else 1.0
    except ValueError as error:
        raise UserError(f"The weight in {text!r} is not a number. Write --adapter FOLDER=0.5.") from error
    if not math.isfinite(share):
        raise UserError(f"The weight in {text!r} is not finite. Write --adapter FOLDER=0.5.")
    return folder or weight, share
