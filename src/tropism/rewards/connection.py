"""Requests to a reward server that end in time, are tried again where that can help, and never tell the token to anyone else."""

from __future__ import annotations

import http.client
import math
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tropism.core import UserError
from tropism.rewards.protocol import TOKEN, VERSION, Refused, own_token, read_json, same_version

TIMEOUT = "TROPISM_REWARD_TIMEOUT"
"""The environment variable that holds the seconds a request may take, 120 without it."""
MOST_SECONDS = 86_400.0
MOST_ANSWER = 2**20
"""Bytes of an answer: some hundred are enough for a sample."""


class Passing(Exception):
    """A failure that may pass: no connection, no answer in time, half an answer, a busy or broken server."""


@dataclass(frozen=True)
class Answer:
    """What a server sent back, whatever its status. Names of headers are in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Place:
    """Where a server listens. base: the path before /score and /health. query: with its question mark, or ""."""

    scheme: str
    host: str
    port: int | None
    base: str
    query: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.base}"


def place_of(url: str, what: str = "reward", variable: str = TOKEN) -> Place:
    """The parts of an address. Raises UserError for one that cannot be, or that holds a secret, which would be written into config.yaml.

    what: whose address it is; variable: where a secret belongs instead, for the messages.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(
            f"The address of the {what} cannot be read ({error}). Write http://HOST:PORT[/PATH]."
        ) from error
    secret = [k for k, _ in parse_qsl(parts.query, keep_blank_values=True) if _is_secret(k.lower())]
    if parts.username is not None or secret:
        raise UserError(
            f"The {what}'s address holds a secret{f' ({secret[0]})' if secret else ''}, and addresses are written into the run folder. "
            f"Leave it out and set the environment variable {variable}; it is sent as a bearer token."
        )
    if (
        parts.scheme not in ("http", "https")
        or not host
        or parts.fragment
        or not (url.isascii() and url.isprintable())
        or " " in url
    ):
        raise UserError(f"{url!r} is no address of a {what} server. Write http://HOST:PORT[/PATH].")
    return Place(parts.scheme, host, port, parts.path.rstrip("/"), f"?{parts.query}" if parts.query else "")


def _is_secret(key: str) -> bool:
    """Whether the value of such a key should not be written down."""
    parts = ("token", "key", "secret", "pass", "auth", "credential", "session")
    return any(part in key for part in parts) or key in ("sig", "signature", "pwd", "code")


def own_timeout() -> float:
    """Seconds a request may take. Raises UserError for what is no number above 0."""
    text = os.environ.get(TIMEOUT) or "120"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MOST_SECONDS:
        raise UserError(
            f"{TIMEOUT} is {text!r}; it must be a number of seconds above 0, at most a day. Try {TIMEOUT}=120."
        )
    return seconds


class Connection:
    """A server to ask. timeout: seconds a request may take in all, each retry anew. most: bytes of an answer.

    retries: further attempts after a failure that may pass, with pauses of `pause` seconds, doubled each time, give or take a half.
    """

    def __init__(self, url: str, *, timeout: float | None, retries: int, pause: float, most: int):
        self.place, self.timeout = place_of(url), own_timeout() if timeout is None else timeout
        self.retries, self.pause, self.most, self._token = retries, pause, most, own_token()
        self.requests = 0

    def ask(self, method: str, path: str, body: bytes | None = None, retries: int | None = None) -> dict[str, Any]:
        """A checked answer. Raises UserError, after `retries` further attempts (default: the connection's own)."""
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                answer = read_json(self._once(method, path, body))
                same_version(answer)
                return answer
            except Refused as error:
                raise self.wrong(error) from error
            except Passing as error:
                if attempt == retries:
                    times = f" {retries + 1} times" if retries else ""
                    raise UserError(
                        f"The reward server {self.place} failed{times}: {self.clean(error)}. "
                        f"See that it runs and answers {path}, or give it more time by {TIMEOUT}=300."
                    ) from error
            time.sleep(self.pause * 2**attempt * random.SystemRandom().uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, body: bytes | None) -> bytes:
        """The bytes of an answer of status 200. Raises Passing, Refused, or UserError where trying again cannot help."""
        self.requests += 1
        answer = exchange(self.place, method, path, body, self._token, timeout=self.timeout, most=self.most)
        if answer.status != 200:
            self._explain(answer.status, answer.headers.get("location"), answer.body)
        if (
            "content-length" not in answer.headers and "transfer-encoding" not in answer.headers
        ):  # it ended with the connection
            try:
                read_json(answer.body)
            except Refused as error:
                raise Passing(f"an answer that did not tell its length is {error}; it may be cut off") from error
        return answer.body.replace(self._token.encode(), b"***") if self._token else answer.body

    def _explain(self, status: int, location: str | None, answer: bytes) -> None:
        """Raises what an answer that is no success means."""
        try:
            said = f": {self.clean(read_json(answer).get('error', ''))}"
        except Refused:
            said = ""
        if status >= 500 or status == 429:
            raise Passing(f"status {status}{said}")
        if status in (401, 403):
            how = "refused the token in" if self._token else "asks for a token; set"
            raise UserError(f"The reward server {self.place} {how} the environment variable {TOKEN} (status {status}).")
        if 300 <= status < 400:
            raise UserError(
                f"The reward server {self.place} sends elsewhere, to {self.clean(location)} (status {status}), and redirects are not "
                "followed. Give that address as --reward if you trust it."
            )
        raise UserError(
            f"The reward server {self.place} refused the request, status {status}{said}. Compare it with `tropism serve`."
        )

    def clean(self, text: Any) -> str:
        """A server's words in one line, without the token that it may repeat."""
        line = "".join(c if c.isprintable() else " " for c in str(text))
        return (line.replace(self._token, "***") if self._token else line)[:400]

    def wrong(self, error: Refused) -> UserError:
        """What to say of an answer that breaks the protocol."""
        return UserError(
            f"The answer of the reward server {self.place} is {self.clean(error)}. "
            f"Compare it with `tropism serve`, which speaks version {VERSION}."
        )


def exchange(
    place: Place, method: str, path: str, body: bytes | None, token: str | None, *, timeout: float, most: int
) -> Answer:
    """One request and its answer, within `timeout` seconds in all; redirects are not followed. token: a bearer token, told to nobody else.

    Raises Passing, and Refused for an answer of more than `most` bytes.
    """
    headers = {"Accept": "application/json", "Connection": "close", "User-Agent": "tropism"}
    headers |= {"Content-Type": "application/json"} if body is not None else {}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = kind(place.host, place.port, timeout=timeout)
    with at_most(timeout, connection):
        connection.request(method, place.base + path + place.query, body, headers)
        response = connection.getresponse()
        text = _read(response, most)
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, text)


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    """The whole body. Raises Refused where it is too long."""
    expected = response.length
    answer = b"" if expected is not None and expected > most else response.read(most + 1)
    if len(answer) > most or (expected or 0) > most:
        raise Refused(f"longer than {most} bytes")
    if expected is not None and len(answer) < expected:
        raise Passing(f"it sent {len(answer)} of {expected} bytes")
    return answer


@contextmanager
def at_most(seconds: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """A connection that ends after so many seconds in all: a socket's own limit starts anew with every byte. Its failures are Passing."""
    late = threading.Event()
    end = threading.Timer(seconds, lambda: None)
    try:
        connection.connect()
        held = connection.sock  # the connection lets go of it while its answer is still read

        def cut() -> None:
            late.set()
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

        end = threading.Timer(seconds, cut)
        end.daemon = True
        end.start()
        yield
        if late.is_set():  # what was read until then may look whole
            raise Passing("cut")
    except (OSError, http.client.HTTPException, Passing) as error:
        slow = late.is_set() or isinstance(error, TimeoutError)
        said = str(error) or type(error).__name__
        raise Passing(f"no answer within {seconds:g} s" if slow else said) from error
    finally:
        end.cancel()
        connection.close()
