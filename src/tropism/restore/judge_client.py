"""A judge behind any OpenAI-style /chat/completions: vLLM, llama.cpp, Ollama or a hosted model, by one client.

Its key is read from the environment variable TROPISM_JUDGE_KEY or from a file, sent to that one host, and written nowhere.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tropism.restore.judge_ledger import Ledger, usage_of
from tropism.restore.judge_prompt import Question
from tropism.restore.judge_reply import JudgeFailed, JudgeUnavailable, ParseError, Verdict, parse
from tropism.restore.judge_wire import FORMATS, KEY, as_part, asked_to_wait, own_key, said, words_of
from tropism.rewards.connection import Answer, Passing, exchange, place_of
from tropism.rewards.protocol import Refused, read_json

MOST_ANSWER = 8 * 2**20
"""Bytes of an answer, which holds probabilities of every token where they are asked for."""
UNREAD = 2
"""Further requests after a reply that holds no score."""
WARMER = 0.3
"""The temperature of repeats that no seed tells apart, and of a request after an unreadable reply, which 0 might only repeat."""
LONGEST_PAUSE = 30.0
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "structured", "grammar", "guided")
_IMAGE_WORDS = ("image", "multimodal", "multi-modal", "vision", "mmproj")
_OF_ONE_PICTURE = (
    "context",
    "decode",
    "corrupt",
    "too large",
    "too small",
    "exceed",
    "pixel",
    "resolution",
    "dimension",
)
"""Words of a refusal that is this picture's, or this request's, and not the model's."""


@dataclass(frozen=True)
class _Spoken:
    """What a server has been found to understand. level: of FORMATS."""

    level: int = 0
    tokens: str = "max_tokens"
    left_out: frozenset[str] = frozenset()


class _Busy(Exception):
    """A failure that may pass. wait: the seconds that the server asks for."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class _Adapted(Exception):
    """The server refused a part of the request, which will be left out from now on."""


@dataclass
class _Attempts:
    """Of one question: when it began, what failed so far, and how often a reply could not be read."""

    began: float
    failures: list[str] = field(default_factory=list)
    unread: int = 0


class Endpoint:
    """A model that is asked over HTTP.

    url: up to and with /v1. model: its name there; without one, the only model that the server has. temperature, seed and max_tokens are
    sent; repeat k has the seed seed + k, and where the server refuses seeds the temperature is at least 0.3. logprobs: also read the
    score's probabilities. timeout: seconds of one request. limit: seconds of one question with all its retries and pauses. retries: after
    429, 408, 409, 5xx, no connection and no answer in time; an unreadable reply is asked for twice more. prices: see Ledger.
    sleep and clock stand in for time's own. Raises UserError for an address or key that cannot be, and as `ask` does.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 2048,
        logprobs: bool = False,
        timeout: float = 120.0,
        limit: float = 600.0,
        retries: int = 5,
        key_file: str | Path | None = None,
        prices: tuple[float, float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.place = place_of(url.rstrip("/").removesuffix("/chat/completions"), "judge", KEY)
        self.sampling: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
        self.sampling |= {"logprobs": True} if logprobs else {}
        self.timeout, self.limit, self.retries, self.sleep, self.clock = timeout, limit, retries, sleep, clock
        self.ledger, self.spoken, self._lock, self._key = Ledger(prices), _Spoken(), threading.Lock(), own_key(key_file)
        self.name = model or self._only_model()

    def ask(self, question: Question, repeat: int) -> Verdict:
        """The verdict on a question. repeat: 0, 1, ..., which of its repeats this is.

        Raises JudgeUnavailable where the server cannot be used at all, ParseError where no reply held a score, and JudgeFailed where
        it refuses this question.
        """
        return self._patiently(lambda done: self._asked(question, repeat, done))

    def models(self) -> list[str]:
        """The names of the models that the server has. Raises JudgeUnavailable."""
        return self._patiently(self._listed)

    # ------------------------------------------------------------------------------------------------ trying again

    def _patiently(self, once: Callable[[_Attempts], Any]) -> Any:
        done = _Attempts(self.clock())
        while True:
            try:
                return once(done)
            except _Adapted:
                continue
            except ParseError as error:
                done.unread += 1
                if done.unread > UNREAD:
                    raise
                self._pause(done, done.unread, 0.0, error)
            except _Busy as error:
                done.failures.append(str(error))
                if len(done.failures) > self.retries:
                    raise self._given_up(done) from error
                self._pause(done, len(done.failures), error.wait, error)

    def _pause(self, done: _Attempts, number: int, asked: float, error: Exception) -> None:
        """Wait after failure `number`, longer each time, and no less than the server asks for. Raises JudgeUnavailable beyond the limit."""
        usual = min(LONGEST_PAUSE, 0.5 * 2 ** (number - 1)) * random.SystemRandom().uniform(0.5, 1.5)
        wait = max(usual, asked)
        if self.clock() - done.began + wait >= self.limit:
            if isinstance(error, ParseError):
                raise error
            raise self._given_up(done) from error
        self.sleep(wait)

    def _given_up(self, done: _Attempts) -> JudgeUnavailable:
        times = f" {len(done.failures)} times" if len(done.failures) > 1 else ""
        return JudgeUnavailable(
            f"The judge at {self.place} failed{times}, the last time with: {done.failures[-1] if done.failures else 'no answer'}. "
            f"See that it runs and answers /models, or give it more time: limit={2 * self.limit:g}."
        )

    # ------------------------------------------------------------------------------------------------ one request

    def _asked(self, question: Question, repeat: int, done: _Attempts) -> Verdict:
        spoken = self.spoken
        body = self._body(question, repeat, done.unread, spoken)
        answer = self._sent("POST", "/chat/completions", body, done)
        if answer.status != 200:
            self._refused(answer, spoken, body)
        completion = self._object(answer)
        if error := completion.get("error"):  # some hosts wrap a failure of theirs in a 200
            code = error.get("code") if isinstance(error, dict) else None
            self._refused(replace(answer, status=code if isinstance(code, int) else 400), spoken, body)
        usage = usage_of(completion)
        self.ledger.reply(usage)
        text, expected = said(completion)
        candidate = next(p for p in question.pictures if p.label == "C")
        return replace(parse(text, (candidate.width, candidate.height)), expected=expected, usage=usage)

    def _sent(self, method: str, path: str, body: dict[str, Any] | None, done: _Attempts) -> Answer:
        left = self.limit - (self.clock() - done.began)
        if left <= 0:
            raise self._given_up(done)
        data = None if body is None else json.dumps(body).encode()
        self.ledger.request()
        try:
            timeout = min(self.timeout, left)
            answer = exchange(self.place, method, path, data, self._key, timeout=timeout, most=MOST_ANSWER)
        except Passing as error:
            raise _Busy(self._clean(error)) from error
        except Refused as error:
            raise JudgeFailed(
                f"The answer of the judge at {self.place} is {error}. Give it less to say: max_tokens=1024."
            ) from error
        return replace(answer, body=answer.body.replace(self._key.encode(), b"***")) if self._key else answer

    def _body(self, question: Question, repeat: int, unread: int, spoken: _Spoken) -> dict[str, Any]:
        """The request: what the server was found not to understand is left out."""
        temperature = self.sampling["temperature"]
        if unread or "seed" in spoken.left_out:
            temperature = max(WARMER, temperature)
        wanted = {"temperature": temperature, "seed": self.sampling["seed"] + repeat + 1000 * unread}
        wanted |= {"logprobs": True, "top_logprobs": 10} if "logprobs" in self.sampling else {}
        wanted = {name: value for name, value in wanted.items() if name.removeprefix("top_") not in spoken.left_out}
        shape = FORMATS[spoken.level]
        wanted |= {} if shape is None else {"response_format": shape}
        content = [as_part(part) for part in question.parts()]
        messages = [{"role": "user", "content": content}]
        return {"model": self.name, "messages": messages, spoken.tokens: self.sampling["max_tokens"], **wanted}

    def _object(self, answer: Answer) -> dict[str, Any]:
        try:
            return read_json(answer.body)
        except Refused as error:
            text = answer.body.decode("utf-8", errors="replace")
            raise ParseError(
                f"is {error} and so no chat completion", text, "Give the address of an API, up to /v1."
            ) from error

    def _only_model(self) -> str:
        names = self.models()
        if len(names) != 1:
            found = ", ".join(names[:8]) or "none"
            raise JudgeUnavailable(
                f"The judge at {self.place} has {len(names)} models: {found}. Name one of them: model=NAME."
            )
        return names[0]

    def _listed(self, done: _Attempts) -> list[str]:
        answer = self._sent("GET", "/models", None, done)
        if answer.status != 200:
            self._refused(answer, self.spoken, {})
        rows = self._object(answer).get("data")
        return (
            [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else []
        )

    # ------------------------------------------------------------------------------------------------ refusals

    def _refused(self, answer: Answer, spoken: _Spoken, body: dict[str, Any]) -> None:
        """Raises what a status other than success means."""
        status, words = answer.status, self._clean(words_of(answer))
        if status in (400, 422, 500, 501) and self._adapted(words.lower(), spoken, body):
            raise _Adapted
        if status >= 500 or status in (408, 409, 429):
            raise _Busy(f"status {status}{words and f': {words}'}", asked_to_wait(answer.headers.get("retry-after")))
        if 300 <= status < 400:
            where = self._clean(answer.headers.get("location"))
            raise JudgeUnavailable(
                f"The judge at {self.place} sends elsewhere, to {where} (status {status}), and redirects are not followed. "
                "Give that address if you trust it."
            )
        if status in (401, 403):
            how = "refused the key in" if self._key else "asks for a key; set"
            raise JudgeUnavailable(
                f"The judge at {self.place} {how} the environment variable {KEY} (status {status}): {words}"
            )
        of_pictures, of_one = (any(w in words.lower() for w in told) for told in (_IMAGE_WORDS, _OF_ONE_PICTURE))
        if status in (400, 422) and of_pictures and not of_one:
            raise JudgeUnavailable(
                f"The model {self.name!r} at {self.place} takes no pictures, or not so many: {words}. Serve a vision-language model "
                "(llama.cpp: with --mmproj; vLLM: with --limit-mm-per-prompt)."
            )
        kind = JudgeUnavailable if status in (404, 405) else JudgeFailed
        raise kind(
            f"The judge at {self.place} refused the request, status {status}: {words}. Compare its address and model name with /models."
        )

    def _adapted(self, words: str, spoken: _Spoken, body: dict[str, Any]) -> bool:
        """Whether the server's words name a part of the request that can be left out; if so it is, from now on.

        Nothing is changed where another request has already led to a change since this one was built.
        """
        now = spoken
        if "response_format" in body and any(word in words for word in _FORMAT_WORDS):
            now = replace(spoken, level=spoken.level + 1)
        elif "max_tokens" in body and "max_tokens" in words and "max_completion_tokens" in words:
            now = replace(spoken, tokens="max_completion_tokens")
        else:
            named = next((name for name in ("logprobs", "seed", "temperature") if name in body and name in words), None)
            now = replace(spoken, left_out=spoken.left_out | {named}) if named else spoken
        with self._lock:
            self.spoken = now if self.spoken == spoken else self.spoken
        return now != spoken

    def _clean(self, text: Any) -> str:
        """A server's words in one line, without the key that they may repeat."""
        line = "".join(c if c.isprintable() else " " for c in str(text))
        return (line.replace(self._key, "***") if self._key else line)[:400].strip()
