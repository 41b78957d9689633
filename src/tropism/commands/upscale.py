"""The command that enlarges photographs."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from tropism.core import Model, UserError
from tropism.models import lora
from tropism.models.latent import Latent
from tropism.models.load import load_model
from tropism.restore.judge_cache import write_whole
from tropism.restore.pairs import pictures_of
from tropism.restore.pictures import UnreadablePicture, made_by
from tropism.run import export
from tropism.run.checks import at_least_one, finite_numbers, not_negative, overrides, set_up
from tropism.run.progress import clock
from tropism.run.upscaling import Upscaled, Upscaler, check_colour, heat_of, upscaled


def upscale(
    source: str | Path,
    *,
    out: str | Path,
    model: str | Model | None = None,
    adapter: str | Path | None = None,
    strength: float = 1.0,
    prompt: str = "",
    negative: str = "",
    samples: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    setting: Sequence[str] = (),
    colour: str = "none",
    tile: int = 256,
    context: int = 16,
    blend: int = 16,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
) -> list[Upscaled]:
    """Enlarge photographs with a generative upscaler, and say how much of them may be made up.

    source: a picture or a folder of pictures. out: for one picture the PNG file, else a folder; what is there already is left alone.
    model: an upscaler, named as for `align`; default the one that the adapter was trained on. adapter: a run of align, or an adapter's
    folder. strength: how much of the adapter, 0 is the model without it, 1 as trained. prompt: what the picture shows, for models that
    read words. negative: what it must not show. samples: pictures drawn of each; from two on their differences tell what is made up, as
    expected error and as NAME-doubt.png. setting: "KEY=VALUE" of the model's family, such as noise_level=50; default those that the
    adapter was trained with. colour: "none", or tones taken from the source by "adain" or "wavelet". tile: side of the parts that large
    pictures are done in, in pixels of the source. context: how far a part sees around itself. blend: over how many pixels it fades
    into the next. overwrite: make again what is there.
    Raises UserError for anything that cannot be; a folder's pictures are read one by one as their turn comes, and the error for those
    that cannot be read comes after the others are done.
    """
    asked = dict(locals())
    at_least_one(samples=samples, steps=steps, tile=tile)
    not_negative(seed=seed, context=context, strength=strength)
    finite_numbers(guidance=guidance, strength=strength)
    check_colour(colour)
    files = pictures_of(source)
    places = _places(Path(source), files, Path(out))
    if over := [p for f, p in zip(files, places, strict=True) if p.exists() and p.samefile(f)]:
        raise UserError(f"{over[0]} would be written over itself. Choose another --out.")
    machine = set_up(device, dtype, threads)
    named = model is None or isinstance(model, str)
    if not named and (adapter or setting or strength != 1):
        raise UserError(
            "adapter, strength and setting are for a model that is named. Load them into the one you give, or name it."
        )
    trained = export.found(Path(adapter)) if adapter else (None, {})
    loaded = _model(cast(Any, model), trained, strength, setting, machine) if named else cast(Model, model)
    steps = int(steps or _deployed(trained[1], "steps") or getattr(loaded, "steps", 50))
    weight = guidance if guidance is not None else _deployed(trained[1], "guidance")
    weight = getattr(loaded, "guidance", 1.0) if weight is None else weight
    getattr(loaded, "check_request", lambda *_: None)(guidance, [negative])
    loaded.process.times(steps, getattr(loaded, "shape", (1, 1, 1)))
    upscaler = Upscaler(loaded, steps, weight, prompt, negative, seed, samples, colour)
    own = {"model": model if named else type(model).__name__, "steps": steps, "guidance": weight}
    how = {n: asked[n] for n in MADE_WITH} | own
    found, failed = [], []
    for file, place in zip(files, places, strict=True):
        if place.exists() and (samples == 1 or heat_of(place).exists()) and not overwrite:
            _say(f"{place} is there already{_otherwise(place, how)}; --overwrite makes it anew.")
            continue
        try:
            parts = {"tile": tile, "context": context, "blend": blend, "wait": _waiting(file.name)}
            found.append(upscaled(upscaler, file, place, **parts, made=_plain(how)))
        except UnreadablePicture as error:
            if len(files) == 1:
                raise
            _say(str(error))
            failed.append(file.name)
            continue
        for line in (told(found[-1]), *(f"{file.name}: {note}." for note in found[-1].notes)):
            _say(line)
        if samples > 1 and len(files) > 1:
            _add_to_table(Path(out) / "upscale.csv", found[-1])
    _raise_of(failed, len(files))
    return found


def _raise_of(failed: Sequence[str], total: int) -> None:
    """The error that ends a folder with pictures that cannot be read."""
    if failed:
        raise UserError(
            f"{len(failed)} of {total} pictures cannot be enlarged, what is wrong is said above: {', '.join(failed[:8])}"
            f"{' ...' if len(failed) > 8 else ''}. The others are done."
        )


def _waiting(name: str, every: float = 10.0) -> Callable[[float], None]:
    """Says how far a picture is, every so many seconds."""
    began = last = time.monotonic()

    def say(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done and now - last >= every:
            last = now
            _say(f"{name}  {done:.0%}  {clock((now - began) * (1 - done) / done)} left")

    return say


def _say(line: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(line)


MADE_WITH = ("model", "adapter", "strength", "prompt", "negative", "seed", "steps", "guidance", "setting", "colour")
MADE_WITH += ("tile", "context", "blend", "dtype")
"""Arguments that a picture depends on."""


def _plain(how: Mapping[str, Any]) -> str:
    """What a picture is made with, as the file keeps it: of folders the last two names, since pictures are passed on."""
    short = lambda v: "/".join(Path(v).parts[-2:]) if isinstance(v, Path | str) and v and Path(v).exists() else v
    return json.dumps({n: short(v) if n in ("model", "adapter") else v for n, v in how.items()}, default=list)


def _otherwise(place: Path, how: Mapping[str, Any]) -> str:
    """In what the picture that is there was made otherwise than would be now; "" where it was not, or does not tell."""
    try:
        before = json.loads(made_by(place))
    except ValueError:
        return ""
    now = json.loads(_plain(how))
    odd = [f"{n} {before.get(n)} instead of {v}" for n, v in now.items() if before.get(n) != v]
    return f", made with {', '.join(odd)}" if odd else ""


def told(done: Upscaled) -> str:
    """A finished picture in a line."""
    text = f"{done.source.name} -> {done.out}, {done.width} x {done.height} pixels"
    if done.doubt is None:
        return text
    if done.psnr is not None and math.isinf(done.psnr):
        return f"{text}; its samples are all alike, so they tell nothing of what is made up"
    return (
        f"{text}; if the model is a fair sampler, {done.doubt:.3f} of the range is the expected error and {done.psnr:.1f} dB the "
        f"expected PSNR; red in {done.heat.name if done.heat else ''} is made up"
    )


def _places(source: Path, files: Sequence[Path], out: Path) -> list[Path]:
    """Where each picture goes. Raises UserError for two of one name, and a file where a folder is needed."""
    if source.is_file() and out.suffix.lower() == ".png":
        return [out]
    if source.is_file() and out.suffix and not out.is_dir():
        raise UserError(
            f"Pictures are written as PNG, which loses nothing: give --out NAME.png or a folder, not {out.name}."
        )
    if out.is_file():
        raise UserError(f"{out} is a file, and several pictures need a folder. Choose another --out.")
    places = [out / f"{file.stem}.png" for file in files]
    if twice := [p.name for p in places if places.count(p) > 1]:
        raise UserError(f"Two pictures of {source} would both be called {twice[0]}. Rename one of them.")
    return places


def _deployed(config: Mapping[str, Any], name: str) -> Any:
    """What a run's held-out pictures were drawn with: its own setting for evaluation, else that of training; None of no run."""
    own = config.get(f"evaluate_{name}")
    return {**config, **(config.get("options") or {})}.get(name) if own is None else own


def _model(
    model: str | None,
    trained: tuple[Path | None, Mapping[str, Any]],
    strength: float,
    setting: Sequence[str],
    place: tuple[Any, Any],
) -> Model:
    """The upscaler with its adapter at a strength, its chain as the adapter was trained. trained: the adapter's folder and settings.

    Raises UserError for a model that draws from words alone.
    """
    folder, config = trained
    base = model or config.get("model")
    if not base:
        raise UserError(
            "Say which model enlarges: --model stabilityai/stable-diffusion-x4-upscaler, a folder, or file.py:Class."
        )
    settings = lora.read(folder)[1] if folder else None
    own = overrides(setting or config.get("setting", ()), "--setting noise_level=50")
    given: dict[str, Any] = {"settings": own} if own else {}
    if config:
        given |= {"scheduler": overrides(config.get("scheduler") or ()), "eta": _deployed(config, "eta") or 0.0}
    loaded = load_model(base, device=place[0], dtype=place[1], lora=settings, **given)
    if not hasattr(loaded, "scale"):
        raise UserError(f"{base} draws from words; it enlarges nothing. Choose an upscaler with --model.")
    if folder:
        lora.load(cast(Latent, loaded), folder)
        lora.scale(cast(Latent, loaded), strength)
    elif strength != 1:
        raise UserError(
            f"--strength {strength:g} is for an adapter, and there is none. Name it with --adapter, or leave it out."
        )
    return loaded


COLUMNS = ("file", "out", "width", "height", "doubt", "expected_psnr")


def _add_to_table(file: Path, done: Upscaled) -> None:
    """The table with this picture's row, in place of an older one; rows of pictures that were done before stay."""
    rows = []
    if file.exists():
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row[:1] not in (["file"], [done.source.name])]
    new = (done.source.name, done.out.name, done.width, done.height, done.doubt, done.psnr)
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows, new])
    write_whole(file, text.getvalue())
