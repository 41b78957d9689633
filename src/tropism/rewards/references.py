"""The reference pictures that a batch brings along, and a bounded store of what a network saw in them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tropism.core import Batch, UserError

Reference = tuple[Hashable, Callable[[], Tensor]]
"""A key that another picture does not have, and what gives the picture (3, H, W) in [0, 1]."""


def check_references(name: str, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError if a prompt has no reference picture. name: of the reward that wants it."""
    for prompt, known in zip(prompts, meta, strict=True):
        if not known.get("reference"):
            raise UserError(
                f"The reward {name} compares with a reference picture and the batch has none for {prompt[:60]!r}. Give one a "
                'prompt: in a .jsonl file {"prompt": "a cat", "reference": "cat.png"}, in Python Batch(prompts, reference=pictures).'
            )


def references_of(batch: Batch, name: str) -> list[Reference]:
    """Of every row: batch.reference (B, 3, H, W), or the file that batch.meta[i]["reference"] names. Raises UserError if there is none."""
    if batch.reference is not None:
        return [of_tensor(picture) for picture in batch.reference]
    check_references(name, batch.prompts, batch.meta or [{}] * len(batch))
    return [of_file(str(m["reference"])) for m in batch.meta or []]


def of_tensor(picture: Tensor) -> Reference:
    """A picture (3, H, W); its key is a digest of its numbers."""
    data = picture.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return (hashlib.blake2b(data, digest_size=16).digest(), tuple(picture.shape), picture.dtype), lambda: picture


def of_file(file: str) -> Reference:
    """A picture file; its key changes when the file does. Raises UserError, also when it is read, for a file that is no picture."""
    try:
        found = Path(file).stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return (file, found.st_mtime_ns, found.st_size), lambda: read_picture(file)


def read_picture(file: str) -> Tensor:
    """(3, H, W) in [0, 1] as a viewer shows it: turned as EXIF says, on white where it is transparent, 16 bits scaled.

    Raises UserError for a file that is no picture.
    """
    try:
        with Image.open(file) as opened:
            shown = ImageOps.exif_transpose(opened)
            if shown.mode.startswith("I"):
                shown = Image.fromarray(
                    np.round(np.asarray(shown, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)
                )
            if shown.has_transparency_data:
                shown = shown.convert("RGBA")
                shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
            pixels = np.array(shown.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _unreadable(file: str, error: Exception) -> UserError:
    return UserError(f"The reference picture {file} cannot be read: {error}. Give a PNG or JPEG file.")


class Kept:
    """Lists of tensors by key, at most `most` bytes of them; what was used longest ago goes first."""

    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self._lists: OrderedDict[Hashable, list[Tensor]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What is kept under the key, made first if it is not there; a list larger than `most` is made and not kept."""
        if key in self._lists:
            self._lists.move_to_end(key)
            return self._lists[key]
        made = make()
        self._lists[key], self.bytes = made, self.bytes + _size(made)
        while self.bytes > self.most:
            self.bytes -= _size(self._lists.popitem(last=False)[1])
        return made

    def __len__(self) -> int:
        return len(self._lists)


def _size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
