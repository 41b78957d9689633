"""A scene turned before a camera: an animated GIF, a sheet of eight views and a film where imageio can write one."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tropism.core import UserError
from tropism.run import pictures
from tropism.scene.drawing import drawn
from tropism.scene.mesh import write_whole
from tropism.scene.threshold import like
from tropism.space.cameras import ring, view
from tropism.space.volume import Field

FRAMES, SECONDS = 60, 3.6
"""Of a turn."""
SHEET = 8
"""Views on a sheet."""


@torch.no_grad()
def turned(
    field: Field,
    frames: int = FRAMES,
    *,
    size: int = 128,
    samples: int = 64,
    elevation: float = 15.0,
    background: Tensor | float = 1.0,
) -> list[Tensor]:
    """Pictures (3, size, size) float32 in [0, 1] on the CPU of a field, from equally spaced azimuths; the first from the front, +x.

    samples: along a ray. background: a number or (3,). Raises UserError for an elevation beyond 90, or no frame.
    """
    if frames < 1:
        raise UserError(f"A turntable of {frames} frames shows nothing. Try {FRAMES}.")
    around = ring(frames, elevation).to(like(field).device)
    one = lambda i: drawn(field, around[[i]], size, samples=samples).over(background)[0].clamp(0, 1).float().cpu()
    return [one(i) for i in range(frames)]


def write_turntable(frames: Sequence[Tensor], out: Path | str) -> list[Path]:
    """turntable.gif and, where imageio with its ffmpeg is installed, turntable.mp4 in the folder `out`; returns what was written.

    frames: (3, H, W) in [0, 1], one turn, which takes 3.6 seconds; the GIF goes round for ever. For the film: pip install
    "imageio[ffmpeg]"; nothing else needs it. Files are whole or not there. Raises UserError where the disk refuses.
    """
    images, out = [_image(frame) for frame in frames], Path(out)
    film = _film(images)
    written = [write_whole(out / "turntable.gif", _gif(images))]
    return [*written, write_whole(out / "turntable.mp4", film)] if film else written


def sheet(views: Sequence[Tensor]) -> Image.Image:
    """One picture of all views of a turn, four in a row, with their azimuths and the words for them: of `turned(field, SHEET)`."""
    turns = [360 * i / len(views) for i in range(len(views))]
    return pictures.grid([[v] for v in views], [f"{a:g}°" for a in turns], [view(a, 0.0) for a in turns], columns=4)


def write_sheet(views: Sequence[Tensor], path: Path | str) -> Path:
    """`sheet` as a PNG. The file is whole or not there. Raises UserError where the disk refuses."""
    data = io.BytesIO()
    sheet(views).save(data, "PNG")
    return write_whole(Path(path), data.getvalue())


def _image(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _gif(frames: Sequence[Image.Image]) -> bytes:
    """One palette for all frames, without dithering: what stands still must not flicker."""
    some = frames[:: max(1, len(frames) // 8)]
    wide = Image.new("RGB", (frames[0].width * len(some), frames[0].height))
    for i, frame in enumerate(some):
        wide.paste(frame, (i * frame.width, 0))
    palette = wide.quantize(256, method=Image.Quantize.MEDIANCUT)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    data = io.BytesIO()
    each = 10 * round(100 * SECONDS / len(frames))  # a GIF counts in hundredths of a second
    first.save(data, "GIF", save_all=True, append_images=others, duration=max(20, each), loop=0, optimize=False)
    return data.getvalue()


def _film(frames: Sequence[Image.Image]) -> bytes | None:
    """MP4, or None where imageio or its ffmpeg is missing."""
    try:
        imageio: Any = importlib.import_module("imageio.v2")
        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # the package may be there without its program
        return None
    data = io.BytesIO()
    # Players want even sides; imageio pads to a multiple of the block.
    how = {"fps": len(frames) / SECONDS, "codec": "libx264", "macro_block_size": 2, "quality": 8}
    with imageio.get_writer(data, format="mp4", **how) as writer:
        for frame in frames:
            writer.append_data(np.asarray(frame))
    return data.getvalue()
