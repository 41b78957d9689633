"""Pictures from files as a restoration needs them, and back into files: every usual kind, of any size that memory holds.

What a viewer would show is what is read: turned as the EXIF orientation says, transparent parts over white, grey as three equal
channels. Where that changes or loses something, `Picture.notes` says so once. The decoded pixels stay as the file has them (4 bytes a
pixel at most) and become numbers a window at a time, so a picture of 20,000 x 20,000 pixels costs 1.6 GB and not 5; results are
written row by row for the same reason.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tropism.core import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
MOST_PIXELS = 500_000_000
"""Larger pictures are refused before they are decoded; 20,000 x 20,000 are 400 million."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _WIDTH, _BITS, _WHITE = 274, 256, 258, 262
_BAND = 4_000_000
"""Pixels that become numbers, or bytes, at once."""
_lock = threading.Lock()


class UnreadablePicture(UserError):
    """What is wrong with one picture file, and no matter of the others."""


class Picture:
    """A decoded picture file: `height` and `width` in pixels as a viewer shows them, `notes` on what reading changed.

    `profile` is the file's RGB colour profile (ICC) or None; pixels are never converted by it, so a result that keeps it keeps its colours.
    """

    def __init__(self, image: Image.Image, path: Path, notes: tuple[str, ...], profile: bytes | None):
        self._image, self.path, self.notes, self.profile = image, path, notes, profile
        self.width, self.height = image.size

    def window(self, top: int, left: int, height: int, width: int) -> Tensor:
        """(1, 3, height, width) float32 in [0, 1]: the part whose upper left corner is (left, top)."""
        inside = 0 <= top <= top + height <= self.height and 0 <= left <= left + width <= self.width
        assert inside and height and width, (top, left, height, width)
        pixels = _colours(self._image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()

    def whole(self) -> Tensor:
        """(1, 3, H, W) float32 in [0, 1], 12 bytes a pixel."""
        out, rows = torch.empty(1, 3, self.height, self.width), max(1, _BAND // self.width)
        for y in range(0, self.height, rows):
            out[..., y : y + rows, :] = self.window(y, 0, min(rows, self.height - y), self.width)
        return out


def read(path: str | Path, most: int = MOST_PIXELS) -> Picture:
    """Decode a picture file. most: pixels beyond which it is refused, before anything is decoded.

    Raises UserError for what is no picture, is cut short or damaged, is too large, or has values without a known range.
    """
    path = Path(path)
    with _opened(path, most) as image:
        orientation, notes, profile = _orientation(image), _told(image), image.info.get("icc_profile")
        image.load()
        _check_values(image, path)
        notes = (*notes, *_told_of_pixels(image))
        if image.format == "TIFF":  # Pillow has turned it while it decoded, and then forgets the tag
            orientation = _orientation(image)
        turned = image.transpose(_TURNS[orientation]) if orientation > 1 else image
        fits = isinstance(profile, bytes) and profile[16:20] == b"RGB " and image.mode[:1] not in "LIF1"
        return Picture(turned, path, notes, profile if fits else None)


def size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture file as a viewer shows it, read from its first bytes. Raises UserError as `read` does."""
    with _opened(Path(path), MOST_PIXELS) as image:
        return _shown_size(image)


def _shown_size(image: Image.Image) -> tuple[int, int]:
    raw = image.size
    if image.format == "TIFF":  # newer Pillows have swapped the sides of a turned TIFF already
        raw = (image.tag_v2[_WIDTH], image.tag_v2[_WIDTH + 1])  # pyright: ignore[reportAttributeAccessIssue]
    return (raw[1], raw[0]) if _orientation(image) >= 5 else (raw[0], raw[1])


def _orientation(image: Image.Image) -> int:
    """1 to 8; a PNG that tells it only after its pixels is taken as it stands, since sizes are asked of files not yet decoded."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in _TURNS else 1


@contextmanager
def _opened(path: Path, most: int) -> Iterator[Image.Image]:
    """A file whose header is read and whose size is allowed. Failures become a UserError, also those of the body."""
    try:
        with _lock, _without_pillows_limit(), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > most:
                raise UnreadablePicture(
                    f"{path} has {image.width:,} x {image.height:,} pixels, {image.width * image.height / 1e6:,.0f} million, and "
                    f"{most / 1e6:,.0f} million are the most. Cut it into parts first, e.g. magick {path.name} -crop 10000x10000 "
                    "+repage part-%02d.png"
                )
            yield image
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"There is not enough memory to decode {path}. Cut it into parts, or close what else runs."
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow refuses pictures above 179 million pixels by a global; ours is asked instead. Nor does it warn of odd metadata."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _unreadable(path: Path, error: Exception) -> UnreadablePicture:
    if not path.exists():
        return UnreadablePicture(f"There is no picture {path}. Give the path of a file.")
    if path.is_dir():
        return UnreadablePicture(f"{path} is a folder. Give the path of one picture.")
    if path.stat().st_size == 0:
        return UnreadablePicture(f"{path} is empty (0 bytes), perhaps an interrupted download. Fetch or save it again.")
    if isinstance(error, UnidentifiedImageError):
        return UnreadablePicture(
            f"{path} is not a PNG, JPEG, TIFF, WebP or BMP file that can be read, or one of a kind of pixels that no "
            f"viewer agrees on, such as 32-bit colour TIFF. Convert it: magick {path.name} -depth 8 {path.stem}.png"
        )
    if isinstance(error, PermissionError):
        return UnreadablePicture(f"{path} may not be read. Allow it: chmod u+r {path}")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UnreadablePicture(f"{path} is damaged or cut short: {reason[:200]}. Fetch or save it again.")


# ---------------------------------------------------------------------------------------------------- what the pixels mean


def _told(image: Image.Image) -> tuple[str, ...]:
    """Notes that the header is enough for."""
    notes = []
    if _orientation(image) > 1:
        notes.append("turned as its EXIF orientation says")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        notes.append(f"the first of its {getattr(image, 'n_frames', 1)} frames")
    if image.mode[:1] not in "IF" and _bits(image) == 16:
        notes.append("16 bits a channel read as 8")
    return tuple(notes)


def _bits(image: Image.Image) -> int:
    """Bits a channel in the file, which Pillow does not tell; 8 for all but PNG and TIFF."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS, (8,)))  # pyright: ignore[reportAttributeAccessIssue]
    if image.format != "PNG":
        return 8
    file = image.fp  # pyright: ignore[reportAttributeAccessIssue]
    place = file.tell()
    file.seek(24)  # in a PNG's first chunk
    depth = file.read(1)[0]
    file.seek(place)
    return depth


def _told_of_pixels(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.mode == "CMYK":
        notes.append("CMYK turned into RGB without a colour profile")
    if _sees_through(image):
        notes.append("transparent parts laid over white")
    return tuple(notes)


def _sees_through(image: Image.Image) -> bool:
    """Whether any pixel may be less than opaque."""
    if image.mode[:1] in "IF":
        return isinstance(image.info.get("transparency"), int)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return bool(image.getextrema()[-1][0] < 255)  # pyright: ignore[reportIndexIssue]
    marked = image.info.get("transparency")
    return marked is not None and not (isinstance(marked, bytes) and min(marked, default=255) == 255)


def _check_values(image: Image.Image, path: Path) -> None:
    """Refuse pixels whose white nobody can know."""
    if image.mode in ("LAB", "HSV") or (image.mode == "I" and image.format != "PNG"):
        raise UnreadablePicture(
            f"{path} has {image.mode} pixels. Convert it: magick {path.name} -depth 8 {path.stem}.png"
        )
    if image.format == "TIFF" and image.mode[:1] == "I" and image.tag_v2.get(_WHITE) == 0:  # pyright: ignore[reportAttributeAccessIssue]
        raise UnreadablePicture(
            f"{path} keeps its white as 0 in 16 bits, which is not read. Convert it: magick {path.name} {path.stem}.png"
        )
    if image.mode == "F":
        low, high = image.getextrema()
        if not (low >= 0 and high <= 1):  # pyright: ignore[reportOperatorIssue]
            raise UnreadablePicture(
                f"{path} has float pixels from {low:.4g} to {high:.4g}, and only 0 to 1 has a known white. Scale them, or "
                "save 8 or 16 bits."
            )


def _colours(image: Image.Image) -> np.ndarray:
    """(h, w, 3) float32 in [0, 1] of a part in any mode that passed `_check_values`."""
    if image.mode.startswith(("I", "F")):
        raw = np.array(image)
        grey = raw.astype(np.float32) / (1 if image.mode == "F" else 65535)
        if _sees_through(image):
            grey[raw == image.info["transparency"]] = 1
        return np.repeat(grey[..., None], 3, 2)
    if _sees_through(image):
        pixels = np.array(image.convert("RGBA")).astype(np.float32) / 255
        return pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
    return np.array(image.convert("RGB")).astype(np.float32) / 255


# ---------------------------------------------------------------------------------------------------- saving


def save(image: Tensor, path: str | Path, profile: bytes | None = None) -> None:
    """Write (3, H, W) or (1, 3, H, W) in [0, 1] as an 8-bit PNG that is there whole or not at all. Raises UserError as `png` does."""
    rows = image if image.ndim == 4 else image[None]
    with png(path, rows.shape[-2], rows.shape[-1], profile) as write:
        write(rows)


@contextmanager
def png(
    path: str | Path, height: int, width: int, profile: bytes | None = None, made: str = ""
) -> Iterator[Callable[[Tensor], None]]:
    """An 8-bit PNG file, row by row: the block is given `write`, which takes (1, 3, n, width) in [0, 1] from top to bottom.

    profile: an RGB colour profile. made: how it was made, in ASCII, which `made_by` reads.

    The file takes its name when the block ends without an exception and all rows are there; until then, and after one, whatever had that
    name stays. Raises UserError for another suffix than .png, for pixels that are not finite, and where the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(
            f"Pictures are saved as PNG, which loses nothing. Give a name that ends in .png, not {path.name}."
        )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(unfinished, "wb")  # noqa: SIM115
        with file:
            write, finish = _png_rows(file, path, height, width, profile, made)
            yield write
            finish()
        with _written(path):
            os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


_MADE = "tropism"


def made_by(path: Path) -> str:
    """How a file of `png` was made; "" for a file that does not tell, or cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return str(image.info.get(_MADE, ""))
    except (OSError, ValueError, SyntaxError):
        return ""


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Choose another place with --out."
        ) from error


def _png_rows(file: BinaryIO, path: Path, height: int, width: int, profile: bytes | None, made: str):
    """(write, finish) of one PNG file; rows are filtered by the one above (PNG's filter 2), which is one subtraction a row."""
    packed, above, left = zlib.compressobj(6), np.zeros((1, 3 * width), np.uint8), [height]

    def chunk(kind: bytes, data: bytes) -> None:
        with _written(path):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    def write(rows: Tensor) -> None:
        assert rows.shape[:2] == (1, 3) and rows.shape[3] == width and rows.shape[2] <= left[0], rows.shape
        for band in rows.split(max(1, _BAND // width), 2) if rows.shape[2] else ():
            write_band(band)

    def write_band(rows: Tensor) -> None:
        nonlocal above
        if not bool(torch.isfinite(rows).all()):
            raise UserError(
                "The result has pixels that are not finite numbers. Run the model in float32 (--dtype float32)."
            )
        pixels = (rows[0].detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        pixels = pixels.reshape(len(pixels), -1)
        filtered = np.full((len(pixels), 1 + 3 * width), 2, np.uint8)
        filtered[:, 1:] = pixels - np.concatenate([above, pixels[:-1]])
        chunk(b"IDAT", packed.compress(filtered.tobytes()))
        above, left[0] = pixels[-1:].copy(), left[0] - len(pixels)

    def finish() -> None:
        assert left[0] == 0, f"{left[0]} rows are missing"
        chunk(b"IDAT", packed.flush())
        chunk(b"IEND", b"")

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    if profile:
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile))
    if made:
        chunk(b"tEXt", _MADE.encode() + b"\0" + made.encode("ascii"))
    return write, finish
