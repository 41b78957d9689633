"""A judge on 127.0.0.1 that looks at the pixels: its level is the share of C's 16-px blocks that are not B's, and it checks that B is A's.

`script` holds what the next requests get instead, one each: (status, dict), (status, dict, headers), bytes, a text that the model says,
None for the honest answer, or a callable that is handed the handler. Every request is kept as it came, its pictures decoded.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import torch
from loopback import listening
from PIL import Image

BLOCK = 16


def seen(body: dict) -> list[tuple[str, np.ndarray]]:
    """[(label, pixels)] in the order of a request, each picture under the label of the line before it."""
    found, label = [], ""
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            words = part["text"].split()
            label = words[1] if words[:1] == ["Picture"] else label
        else:
            head, data = part["image_url"]["url"].split(",")
            assert head == "data:image/png;base64"
            found.append((label, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))))
    return found


def blocks(pixels: np.ndarray) -> np.ndarray:
    """(rows, columns, 16, 16, 3)"""
    rows, columns = (n // BLOCK for n in pixels.shape[:2])
    cut = pixels[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK, 3)
    return cut.swapaxes(1, 2)


def level(share: float) -> int:
    return 1 + sum(share > limit for limit in (0, 0.05, 0.25, 0.6))


def judged(pictures: dict[str, np.ndarray]) -> dict:
    """The verdict on pictures by label. Without B, blocks of C count whose mean colour is not A's; a B that is not A's is level 5."""
    if len({p.shape for p in pictures.values()}) > 1:
        return {"items": [], "score": 5, "confidence": 1}
    cut = {label: blocks(p.astype(float)) for label, p in pictures.items()}
    far = lambda x, y: np.abs(cut[x].mean((2, 3)) - cut[y].mean((2, 3))).max(-1) > 12
    if {"A", "B"} <= set(cut) and far("A", "B").any():
        return {"items": [], "score": 5, "confidence": 1}
    other = (cut["B"] != cut["C"]).any((2, 3, 4)) if "B" in cut else far("A", "C")
    rows, columns = other.shape
    items = [{"box": {"left": j / columns, "top": i / rows, "right": (j + 1) / columns, "bottom": (i + 1) / rows},
              "kind": "replaced", "description": f"block {i}, {j}", "severity": 2, "omission": False}
             for i, j in zip(*np.nonzero(other), strict=True)]  # fmt: skip
    return {"items": items, "score": level(float(other.mean())), "confidence": 0.9}


def completion(text: Any, **more) -> dict:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 50},
    }


@dataclass
class Stub:
    """respond: body -> what to answer, in the forms of `script`; honest unless told otherwise. key: asked for where set."""

    url: str = ""
    respond: Any = None
    script: list = field(default_factory=list)
    key: str | None = None
    models: list = field(default_factory=lambda: ["tiny"])
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    @property
    def pictures(self) -> list[list[tuple[str, np.ndarray]]]:
        return [seen(body) for body in self.requests]

    def honest(self, body: dict) -> str:
        return json.dumps(judged(dict(seen(body))))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def do_GET(self):
        self.stub.headers.append(dict(self.headers.items()))
        ok = self.path == "/v1/models"
        self.answer(
            (200, {"data": [{"id": m} for m in self.stub.models]}) if ok else (404, {"error": {"message": "no"}})
        )

    def do_POST(self):
        stub, body = self.stub, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.requests.append(body)
            stub.headers.append(dict(self.headers.items()))
            what = stub.script.pop(0) if stub.script else None
        if self.path != "/v1/chat/completions":
            what = (404, {"error": {"message": "no such path"}})
        elif what is None and stub.respond:
            what = stub.respond(body)
        self.answer(stub.honest(body) if what is None else what)

    def answer(self, what):
        told = self.headers.get("Authorization")
        if self.stub.key and told != f"Bearer {self.stub.key}":
            what = (401, {"error": {"message": f"no: {told}"}})
        if callable(what):
            return what(self)
        if isinstance(what, tuple):
            status, body, *more = what
            return self.send(status, json.dumps(body).encode(), **(more[0] if more else {}))
        self.send(200, what if isinstance(what, bytes) else json.dumps(completion(what)).encode())

    def send(self, status, text, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)
        self.close_connection = True

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def running():
    """A Stub at `url` until the block ends; `stop` is set then, for handlers that wait."""
    stub = Stub()
    with listening(type("Bound", (Handler,), {"stub": stub})) as url:
        stub.url = f"{url}/v1"
        try:
            yield stub
        finally:
            stub.stop.set()


class Time:
    """A clock that only its own sleep moves; `pauses` are what it was asked to sleep."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def clock(self):
        return self.now


def scene(seed=0, side=64, scale=4):
    """(reference (3, side, side), its input, reduced by areas), in whole 255ths."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, side // 16, side // 16, generator=rng).repeat_interleave(16, 1).repeat_interleave(16, 2)
    gt = ((0.15 + 0.6 * coarse + 0.1 * torch.rand(3, side, side, generator=rng)) * 255).round() / 255
    lr = torch.nn.functional.avg_pool2d(gt, scale)
    return gt, lr


def spoilt(gt, blocks, by=0.2):
    """`gt` with its first blocks of 16 px, row by row, made brighter or darker: invented in as many blocks."""
    sr, columns = gt.clone(), gt.shape[-1] // BLOCK
    for k in range(blocks):
        i, j = divmod(k, columns)
        part = sr[:, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        part += by if float(part.mean()) < 0.5 else -by
    return (sr.clamp(0, 1) * 255).round() / 255
