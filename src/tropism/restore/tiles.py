"""A picture of any size through a function that takes a small one: overlapping tiles, mixed where they meet.

Neighbouring tiles share `2 context + blend` pixels. The outer `context` pixels of a tile, where the function did not see what it would
have seen in the whole picture, are thrown away; over the `blend` pixels in the middle one tile fades into the next. So a function
whose output looks at most `context` pixels around itself gives what it gives of the whole picture, and one that looks further gets a
smooth change instead of an edge. Tiles are of one size; the last ends with the picture, and what they share is spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.restore.pictures import Picture, png

Window = Callable[[int, int, int, int], Tensor]
"""(top, left, height, width) of a part -> its pixels (B, C, height, width)."""


def fade(n: int) -> Tensor:
    """(n,) float32, the weights of the second tile over the n pixels where it takes over: 1/2 in the middle, rising inside (0, 1).

    Whole multiples of 2^-20, so that w + (1 - w) is exactly 1 in any precision above half.
    """
    ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return ((ramp * 2**20).round() / 2**20).float()


def places(length: int, tile: int, context: int, blend: int, step: int = 1) -> tuple[list[int], list[tuple[int, int]]]:
    """(where tiles start, where each fades into the next as (first, past the last)) along a side of `length` pixels.

    Tiles start at multiples of `step`; the last one is up to step - 1 pixels shorter for it.
    """
    if length <= tile:
        return [0], []
    shared, last = 2 * context + blend, math.ceil((length - tile) / step)
    gaps = math.ceil(last / ((tile - shared) // step))
    starts = [step * round(i * last / gaps) for i in range(gaps + 1)]
    middles = [(b + a + tile - blend) // 2 for a, b in pairwise(starts)]
    return starts, [(m, m + blend) for m in middles]


def tiled(
    function: Callable[[Tensor], Tensor], images: Tensor, *, tile: int = 512, context: int = 32, blend: int = 32
) -> Tensor:
    """A function of pictures (B, C, h, w) -> (B, C', k h, k w) over pictures (B, C, H, W), tile by tile: (B, C', k H, k W).

    The size k comes from the function's own output, a whole number. tile: the side of a part in pixels; context and blend as above.
    Gradients pass. Memory is the output, a row of tiles, and what the function takes for one. Raises UserError as `strips` does.
    """
    assert images.ndim == 4, images.shape

    def window(top: int, left: int, height: int, width: int) -> Tensor:
        return images[..., top : top + height, left : left + width]

    height, width = images.shape[-2:]
    out, at = torch.empty(0), 0
    for rows in strips(function, window, height, width, tile=tile, context=context, blend=blend):
        if not at:
            k = rows.shape[-1] // width
            out = rows.new_empty(*rows.shape[:2], k * height, k * width)
        out[..., at : at + rows.shape[-2], :] = rows
        at += rows.shape[-2]
        del rows
    return out


def upscaled(
    function: Callable[[Tensor], Tensor],
    picture: Picture,
    path: str | Path,
    *,
    tile: int = 512,
    context: int = 32,
    blend: int = 32,
    step: int = 1,
    tell: Callable[[Tensor], None] | None = None,
    made: str = "",
) -> None:
    """A picture file through a function (1, 3, h, w) -> (1, C, k h, k w) into the PNG file `path`, a row of tiles at a time.

    The first three channels are written; made: see `pictures.png`. tell: called with every piece of all channels, (1, C, rows, k W),
    from top to bottom. Beside the picture that takes 4 C k^2 bytes for every pixel of such a row: 2 GB for 20,000 x 512 pixels, C = 3
    and k = 4. The file is there when all of it is right, and has the picture's colour profile.
    Raises UserError as `strips` and `pictures.png` do.
    """
    sizes = {"tile": tile, "context": context, "blend": blend, "step": step}
    pieces = strips(function, picture.window, picture.height, picture.width, **sizes)
    first = next(pieces)
    k = first.shape[-1] // picture.width
    with png(path, k * picture.height, k * picture.width, picture.profile, made) as write:
        while True:
            write(first[:, :3])
            if tell:
                tell(first)
            del first  # or the row of tiles that it is a part of would stay while others are made
            if (first := next(pieces, None)) is None:
                break


def strips(
    function: Callable[[Tensor], Tensor],
    window: Window,
    height: int,
    width: int,
    *,
    tile: int = 512,
    context: int = 32,
    blend: int = 32,
    step: int = 1,
) -> Iterator[Tensor]:
    """What `tiled` gives, from top to bottom in full-width pieces (B, C', rows, k W), so that a file can take them one by one.

    window reads a part of the picture, height and width are the picture's. Tiles start at multiples of step. The function
    runs in the caller's gradient mode.
    Raises UserError for a tile too small for what its neighbours share, and for a function whose output is no whole multiple of its input.
    """
    least = 2 * context + 3 * blend + 2 * step
    if context < 0 or blend < 1 or (tile < least and max(height, width) > tile):
        raise UserError(
            f"Tiles of {tile} px are too small for a context of {context} and a blend of {blend} px; they need {least}. "
            f"Use tiles of {least} px or less of the other two (context at least 0, blend at least 1)."
        )
    tops, fades = places(height, tile, context, blend, step)
    held: Tensor | None = None  # the rows of the strip above that fade into the strip to come
    for i, top in enumerate(tops):
        strip, k = _strip(function, window, top, min(tile, height - top), width, (tile, context, blend, step))
        begin = fades[i - 1][0] if i else 0
        if held is not None:
            yield _mixed(held, strip[..., (begin - top) * k : (begin - top + blend) * k, :], -2)
            begin += blend
        end = fades[i][0] if i < len(fades) else height
        yield strip[..., (begin - top) * k : (end - top) * k, :]
        held = strip[..., (end - top) * k : (end - top + blend) * k, :].clone() if i < len(fades) else None
        del strip


def _strip(
    function, window: Window, top: int, rows: int, width: int, sizes: tuple[int, int, int, int]
) -> tuple[Tensor, int]:
    """One row of tiles, mixed: (B, C', k rows, k width), and k."""
    tile, _, blend, _ = sizes
    lefts, fades = places(width, *sizes)
    strip, k = torch.empty(0), 0
    for i, left in enumerate(lefts):
        part = window(top, left, rows, min(tile, width - left))
        out = function(part)
        k = _times(part, out, k)
        if i == 0:
            strip = out.new_empty(*out.shape[:2], rows * k, width * k)
        begin = fades[i - 1][0] if i else 0
        end = fades[i][1] if i < len(fades) else width
        if i:
            zone = slice(begin * k, (begin + blend) * k)
            strip[..., zone] = _mixed(strip[..., zone], out[..., (begin - left) * k : (begin - left + blend) * k], -1)
            begin += blend
        strip[..., begin * k : end * k] = out[..., (begin - left) * k : (end - left) * k]
    return strip, k


def _mixed(first: Tensor, second: Tensor, side: int) -> Tensor:
    """One fades into the other along a side: first + w (second - first), which of two equal pixels is that pixel, bit for bit."""
    weights = fade(first.shape[side]).to(first)
    return torch.lerp(first, second, weights if side == -1 else weights[:, None])


def _times(part: Tensor, out: Tensor, before: int) -> int:
    """How many times larger the function's output is; `before` is what the tiles before it said, 0 for none."""
    k = out.shape[-1] // part.shape[-1] if out.ndim == 4 else 0
    right = out.ndim == 4 and len(out) == len(part) and out.shape[-2:] == (k * part.shape[-2], k * part.shape[-1])
    if not right or k < 1 or before not in (0, k):
        raise UserError(
            f"The model made {tuple(out.shape)} of a tile {tuple(part.shape)}; tiles need an output that is the same whole "
            f"number of times larger{f', {before} as before,' if before else ''} on both sides. Give a tile size that it keeps, "
            "such as a multiple of 64."
        )
    return k
