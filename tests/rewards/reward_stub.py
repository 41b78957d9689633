"""A reward server on 127.0.0.1 that misbehaves as told, written without the library's own server.

It scores a picture by its mean red byte. `respond(request number, ids, scores)` gives the answer: a dict (sent as JSON), bytes,
(status, dict), or a callable that is handed the handler and does as it likes. Every request's headers and body are kept.
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
from loopback import listening
from PIL import Image


def red(sample: dict) -> float:
    if "tokens" in sample:
        return float(sum(sample["tokens"]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sample["png"]))))
    return float(pixels[..., 0].mean())


def honest(number: int, ids: list[str], scores: list[float]) -> Any:
    return {"version": 1, "scores": [{"id": i, "score": s} for i, s in zip(ids, scores, strict=True)]}


@dataclass
class Stub:
    """health: what GET /health answers, None for 404. token: asked for where set."""

    url: str = ""
    respond: Any = honest
    health: Any = field(default_factory=lambda: {"version": 1, "name": "red", "hash": "a1"})
    token: str | None = None
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running():
    """A Stub that listens at `url` until the block ends; `stop` is set then, for handlers that wait."""
    stub, lock = Stub(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.keep()
            self.answer((404, {"error": "nothing here"}) if stub.health is None else stub.health)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.requests.append(body)
                number = len(stub.requests)
            self.keep()
            ids, scores = [s["id"] for s in body["samples"]], [red(s) for s in body["samples"]]
            self.answer(stub.respond(number, ids, scores))

        def keep(self):
            stub.headers.append(dict(self.headers.items()))
            stub.paths.append(self.path)

        def answer(self, what):
            if stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
                what = (401, {"error": f"no: {self.headers.get('Authorization')}"})
            if callable(what):
                return what(self)
            status, what = what if isinstance(what, tuple) else (200, what)
            self.send(status, what if isinstance(what, bytes) else json.dumps(what).encode())

        def send(self, status, text, length=None, **more):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) if length is None else length))
            for name, value in more.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
            self.close_connection = True

        def log_message(self, *_):
            """Say nothing."""

    with listening(Handler) as stub.url:
        try:
            yield stub
        finally:
            stub.stop.set()
