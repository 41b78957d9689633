"""A reward behind HTTP: `--reward http://HOST:PORT[/PATH]` or https. It may be written in any language; see rewards.protocol.

Samples are sent a few at a time, answers matched by id, and scores remembered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.connection import MOST_ANSWER, Connection
from tropism.rewards.protocol import MOST_BYTES, MOST_TOGETHER, VERSION, Refused, as_png

REMEMBERED = 100_000
"""Scores that are kept, the newest."""
MOST_PARALLEL = 64
"""Requests at a time, whatever a server says."""


class Remote:
    """The reward of a server. It has no gradient; `name` is "remote:" and the server's own name for it.

    timeout: seconds a request may take in all. retries: further attempts after a failure that may pass, with pauses of `pause` seconds,
    doubled each time, give or take a half. at_once: samples of a request, fewer where they are large. parallel: requests at a time, by
    default as many as the server says that it scores at a time, else one: a request that waits in the server uses up its own time.
    A sample that the server cannot score is NaN, as is a picture with a pixel that is not finite, which is not sent.
    Raises UserError for every failure, here already for a server that is not there or of another protocol.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        *,
        timeout: float | None = None,
        retries: int = 3,
        pause: float = 0.5,
        at_once: int = 16,
        parallel: int | None = None,
        most: int = MOST_ANSWER,
    ):
        self.connection = Connection(url, timeout=timeout, retries=retries, pause=pause, most=most)
        self.at_once, self._known = at_once, OrderedDict[bytes, float]()
        self.server, self.hash, told = self._greeted()
        self.parallel = parallel or told
        self.name, self.served = f"remote:{self.server}", (self.hash,)

    @torch.no_grad()
    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        """(B,) float64, of pictures (B, 3, H, W) in [0, 1] or tokens (B, L)."""
        tokens = not samples.is_floating_point()
        if samples.ndim != (2 if tokens else 4) or not (tokens or samples.shape[1] == 3):
            raise UserError(
                f"A reward server takes pictures (B, 3, H, W) or tokens (B, L), not {tuple(samples.shape)}."
            )
        keys, asked = list[bytes | None](), dict[bytes, dict[str, Any]]()
        for i, sample in enumerate(samples):
            if not tokens and not bool(torch.isfinite(sample).all()):
                keys.append(None)
                continue
            content = sample.tolist() if tokens else as_png(sample)
            meta = batch.meta[i] if batch.meta else {}
            key = self._key(content, batch.prompts[i], meta)
            keys.append(key)
            if key not in self._known and key not in asked:
                what = {"tokens": content} if isinstance(content, list) else {"png": base64.b64encode(content).decode()}
                asked[key] = {"prompt": batch.prompts[i], "meta": meta, **what}
        pixels = 1 if tokens else samples[0, 0].numel()
        found = self._asked(asked, min(self.at_once, max(1, MOST_TOGETHER // pixels)))
        scores = [math.nan if k is None else found[k] if k in found else self._known[k] for k in keys]
        self._remember(found)
        return torch.tensor(scores, dtype=torch.float64)

    def _key(self, content: bytes | list[int], prompt: str, meta: dict) -> bytes:
        try:
            told = json.dumps(
                [self.hash, prompt, meta, [] if isinstance(content, bytes) else content],
                sort_keys=True,
                allow_nan=False,
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The metadata of the prompt {prompt[:80]!r} cannot be sent to a reward server ({error}). Keep it to JSON values."
            ) from error
        return hashlib.sha256(told.encode() + b"\0" + (content if isinstance(content, bytes) else b"")).digest()

    def _remember(self, found: dict[bytes, float]) -> None:
        self._known.update(found)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _asked(self, samples: dict[bytes, dict[str, Any]], at_once: int) -> dict[bytes, float]:
        """{key: score} of samples by key, in requests that are neither too many samples nor too many bytes."""
        pieces = list(_pieces(samples, at_once))
        if len(pieces) < 2:
            return self._scored(pieces[0], samples) if pieces else {}
        with ThreadPoolExecutor(min(self.parallel, len(pieces))) as pool:
            answers = list(pool.map(lambda piece: self._scored(piece, samples), pieces))
        return {key: score for answer in answers for key, score in answer.items()}

    def _scored(self, keys: list[bytes], samples: dict[bytes, dict[str, Any]]) -> dict[bytes, float]:
        """{key: score} from one request; NaN for null."""
        rows = [{"id": str(i), **samples[key]} for i, key in enumerate(keys)]
        body = json.dumps({"version": VERSION, "reward": self.server, "samples": rows}).encode()
        answer = self.connection.ask("POST", "/score", body)
        if answer.get("hash", self.hash) != self.hash:
            raise UserError(
                f"The reward server {self.connection.place} has changed its reward while the run went on (its hash is another), "
                "so scores would not compare. Serve the old one again and --resume, or start a new run."
            )
        try:
            return dict(zip(keys, scores_of(answer, [row["id"] for row in rows]), strict=True))
        except Refused as error:
            raise self.connection.wrong(error) from error

    def _greeted(self) -> tuple[str, str, int]:
        """(name, hash, requests at a time) of the server, asked once: what is wrong is better said now than after pauses."""
        answer = self.connection.ask("GET", "/health", retries=0)
        found = [answer.get("name"), answer.get("hash")]
        for what, text in zip(("name", "hash"), found, strict=True):
            if not (isinstance(text, str) and 0 < len(text) <= 200 and self.connection.clean(text) == text):
                raise self.connection.wrong(Refused(f"without a {what} (a text of at most 200 letters) in /health"))
        parallel = answer.get("parallel", 1)
        if type(parallel) is not int or parallel < 1:
            raise self.connection.wrong(Refused("with a `parallel` in /health that is no whole number above 0"))
        return str(found[0]), str(found[1]), min(parallel, MOST_PARALLEL)


def _pieces(samples: dict[bytes, dict[str, Any]], at_once: int) -> Iterator[list[bytes]]:
    piece, size = [], 0
    for key, sample in samples.items():
        more = len(json.dumps(sample)) + 64
        if piece and (len(piece) == at_once or size + more > MOST_BYTES // 2):
            yield piece
            piece, size = [], 0
        piece.append(key)
        size += more
    if piece:
        yield piece


def scores_of(answer: dict[str, Any], ids: list[str]) -> list[float]:
    """Scores in the order of `ids`, NaN for null. Raises Refused unless every id has exactly one score that is a number or null."""
    rows, found = answer.get("scores"), dict[str, float]()
    if not isinstance(rows, list):
        raise Refused("without a list of scores")
    for row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("id"), str) and "score" in row):
            raise Refused(f"with a score that is no {{id, score}}: {str(row)[:80]!r}")
        name, score = row["id"], row["score"]
        if name not in ids or name in found:
            raise Refused(f"with {'two scores for' if name in found else 'a score for the unknown'} id {name[:40]!r}")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise Refused(f"with the score {str(score)[:40]!r} for id {name!r}, which is neither a number nor null")
        found[name] = _number(score)
    if missing := [i for i in ids if i not in found]:
        raise Refused(f"without a score for {len(missing)} of {len(ids)} samples, the first id {missing[0]!r}")
    return [found[i] for i in ids]


def _number(score: float | None) -> float:
    """A finite number, else NaN; numbers that no float holds count as infinite."""
    try:
        number = math.nan if score is None else float(score)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else math.nan
