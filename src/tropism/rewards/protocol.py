"""What a reward server and its client say to each other: JSON and PNG bytes, never pickle.

POST /score  {"version": 1, "reward": name, "samples": [{"id", "prompt", "meta", "png": base64 or "tokens": [ints]}]}
         ->  {"version": 1, "hash", "scores": [{"id", "score": number, or null where a sample cannot be scored}]}
GET /health  -> {"version": 1, "name", "hash", "parallel": requests that are scored at a time, 1 if absent}
An answer of status 400 or above is {"error": text}.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tropism.core import UserError

VERSION = 1
TOKEN = "TROPISM_REWARD_TOKEN"
"""The environment variable that holds a bearer token, the client's and the server's; it is never written anywhere."""
MOST_SAMPLES = 256
"""Of one request."""
MOST_BYTES = 64 * 2**20
"""Of one request."""
MOST_PIXELS = 4096 * 4096
"""Of one picture."""
MOST_TOGETHER = 2 * MOST_PIXELS
"""Pixels of all pictures of one request: black ones are some bytes each and would fill any memory once they are unpacked."""


class Refused(ValueError):
    """A message that is not of this form: the text says what is wrong."""


def own_token(variable: str = TOKEN) -> str | None:
    """The token of the environment, None without one. Raises UserError, which does not repeat it, for one that no header can hold."""
    token = os.environ.get(variable) or None
    return None if token is None else sendable(token, variable)


def sendable(token: str, where: str) -> str:
    """`token`, which was found at `where`. Raises UserError, which does not repeat it, where no header can hold it."""
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            f"The token in {where} holds spaces, line breaks or letters beyond ASCII. Set it anew, without them."
        )
    return token


def is_allowed(header: str | None, token: str | None) -> bool:
    """Whether an Authorization header holds the token, compared in constant time."""
    return token is None or hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode())


def read_json(text: bytes) -> dict[str, Any]:
    """An object of JSON, which may hold NaN and Infinity as Python writes them. Raises Refused."""
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise Refused(f"JSON, but a {type(found).__name__} instead of an object")
    return found


def same_version(message: dict[str, Any]) -> None:
    """Raises Refused for another version of this protocol."""
    if message.get("version") != VERSION:
        raise Refused(f"of protocol version {str(message.get('version'))[:20]!r}; this is version {VERSION}")


def as_png(picture: Tensor) -> bytes:
    """A picture (3, H, W) in [0, 1] as a PNG of 8 bits a channel."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def of_png(text: Any, left: int | None = None) -> Tensor:
    """The picture (3, H, W) in [0, 1], float32, of a PNG in base64. left: pixels that its request may still hold.

    Raises Refused, for a picture that is too large before it is unpacked.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Refused(f"a picture of {image.width} x {image.height} pixels; the limit is {MOST_PIXELS}")
            if left is not None and image.width * image.height > left:
                raise Refused(f"of more than {MOST_TOGETHER} pixels in all; send fewer pictures at a time")
            pixels = np.array(image.convert("RGB"))
    except Refused:
        raise
    except (TypeError, ValueError, OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise Refused(f"a picture that is no PNG in base64 ({str(error)[:80]})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
