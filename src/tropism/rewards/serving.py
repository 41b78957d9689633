"""The reference reward server: any reward of this library behind HTTP, as rewards.protocol has it.

    with serving(load_reward("jpeg"), identity="jpeg") as server:
        server.serve_forever()

One request is scored at a time; nothing that comes in is executed, unpickled or written.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tropism import __version__
from tropism.core import Batch, Reward, RewardFailed, UserError, name_of, scored
from tropism.rewards import protocol
from tropism.rewards.combine import unrouted
from tropism.rewards.protocol import (
    MOST_BYTES,
    MOST_SAMPLES,
    VERSION,
    Refused,
    is_allowed,
    of_png,
    own_token,
    read_json,
    same_version,
)

PATIENCE = 60.0
"""Seconds a client may be silent in the middle of a request."""
PARALLEL = 1
"""Requests that are scored at a time; the others wait, and their clients' clocks run."""


class Server(ThreadingHTTPServer):
    """Listens at `url` and answers for one reward. identity: what the reward is made of, which `hash` stands for."""

    daemon_threads = True

    def __init__(self, reward: Reward, identity: str, address: tuple[str, int], device: str, token: str | None):
        self.reward, self.device, self.token, self.busy = reward, device, token, threading.Lock()
        self.hash = hashlib.sha256(f"{__version__} {identity}".encode()).hexdigest()
        super().__init__(address, _Handler)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{host}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


def serving(
    reward: Reward,
    *,
    identity: str,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "cpu",
) -> Server:
    """A server for a reward, not yet serving; port 0 is any free one. It asks for the token of TROPISM_REWARD_TOKEN where that is set.

    Raises UserError for a port that is taken or not allowed.
    """
    try:
        return Server(reward, identity, (host, port), device, own_token())
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The server cannot listen at {host}:{port} ({error}). Choose another --port, or 0 for any."
        ) from error


def asked(message: dict[str, Any], name: str) -> tuple[list[str], Batch, torch.Tensor]:
    """(ids, batch, pictures (B, 3, H, W) in [0, 1] or tokens (B, L)) of a request. Raises Refused."""
    same_version(message)
    if message.get("reward", name) != name:
        raise Refused(f"for another reward; this is {name!r}")
    rows = message.get("samples")
    if not (isinstance(rows, list) and 0 < len(rows) <= MOST_SAMPLES and all(isinstance(r, dict) for r in rows)):
        raise Refused(f"without a list of 1 to {MOST_SAMPLES} samples")
    ids, prompts, meta = ([r.get(n) for r in rows] for n in ("id", "prompt", "meta"))
    meta = [{} if m is None else m for m in meta]
    if not all(isinstance(t, str) for t in ids + prompts) or len(set(ids)) < len(ids):
        raise Refused("with an id or a prompt that is no text, or an id twice")
    if not all(isinstance(m, dict) for m in meta):
        raise Refused("with a meta that is no object")
    return ids, Batch(prompts, meta=meta), _samples(rows)


def _samples(rows: list[dict[str, Any]]) -> torch.Tensor:
    tokens = [r.get("tokens") for r in rows]
    if any(t is not None for t in tokens):
        whole = lambda t: isinstance(t, list) and t and all(type(i) is int and 0 <= i < 2**31 for i in t)
        if not all(whole(t) for t in tokens):
            raise Refused("with tokens that are no list of whole numbers of at least 0")
        samples = [torch.tensor(t) for t in tokens]
    else:
        samples, left = [], protocol.MOST_TOGETHER
        for row in rows:
            samples.append(of_png(row.get("png"), left))
            left -= samples[-1][0].numel()
    if len({s.shape for s in samples}) > 1:
        raise Refused("with samples of different sizes; send these apart")
    return torch.stack(samples)


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", PATIENCE
    server: Server

    def do_GET(self) -> None:
        self._answer(self._health)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _answer(self, respond: Any) -> None:
        if not is_allowed(self.headers.get("Authorization"), self.server.token):
            return self._send(401, {"error": "a bearer token is needed"})
        try:
            self._send(*respond())
        except Refused as error:
            self._send(400, {"error": f"the request is {error}"})

    def _health(self) -> tuple[int, dict[str, Any]]:
        if self.path.partition("?")[0] != "/health":
            return 404, {"error": "GET /health and POST /score are all there is"}
        told = {"name": name_of(self.server.reward), "hash": self.server.hash, "parallel": PARALLEL}
        return 200, {"version": VERSION, **told}

    def _score(self) -> tuple[int, dict[str, Any]]:
        if self.path.partition("?")[0] != "/score":
            return 404, {"error": "GET /health and POST /score are all there is"}
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return 411, {"error": "a Content-Length is needed"}
        if len(length) > 12 or int(length) > MOST_BYTES:
            return 413, {"error": f"the limit is {MOST_BYTES} bytes"}
        body = self.rfile.read(int(length))
        message = read_json(body)
        try:
            with self.server.busy, torch.no_grad():  # the pictures of one request in memory, not of all that wait
                ids, batch, samples = asked(message, name_of(self.server.reward))
                batch = unrouted(self.server.reward, batch)
                values = scored(self.server.reward, samples.to(self.server.device), batch).double().tolist()
        except RewardFailed as error:
            return 500, {"error": str(error)}
        except UserError as error:
            return 422, {"error": str(error)}
        except torch.OutOfMemoryError:
            return 503, {"error": "out of memory"}
        # null for what is not finite: JSON has no word for it
        rows = [{"id": i, "score": v if abs(v) < float("inf") else None} for i, v in zip(ids, values, strict=True)]
        return 200, {"version": VERSION, "hash": self.server.hash, "scores": rows}

    def _send(self, status: int, message: dict[str, Any]) -> None:
        text = json.dumps(message, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Connection", "close")  # what is left of a refused request is not read as the next one
        self.end_headers()
        self.wfile.write(text)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: prompts and tokens do not belong into a log."""
