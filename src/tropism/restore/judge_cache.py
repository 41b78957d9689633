"""Replies by the content of their questions, so that a number can be computed again without asking anybody.

A key holds the prompt's version, the model, the sampling, the repeat and every picture's pixels, and not the host: the same model
elsewhere is the same judge.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tropism.restore.judge_prompt import VERSION, Question
from tropism.restore.judge_reply import JudgeUnavailable, ParseError, Verdict, parse


class CacheMiss(JudgeUnavailable):
    """A reply that is not in a cache which nothing may be added to."""


def described(question: Question, model: str, sampling: dict[str, Any], repeat: int) -> dict[str, Any]:
    """All that a reply depends on, in JSON values. Pictures stand in the order in which they are shown."""
    pictures = [
        {"label": p.label, "role": p.role, "size": [p.width, p.height], "sha256": p.sha256} for p in question.pictures
    ]
    return {
        "prompt": VERSION,
        "mode": question.mode,
        "model": model,
        "sampling": sampling,
        "repeat": repeat,
        "pictures": pictures,
    }


def key_of(description: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Cache:
    """A folder with one JSON file per key, each written whole or not at all. A damaged one counts as absent, and is written anew.

    only: nothing may be asked; then `get` raises CacheMiss for what is not there.
    """

    def __init__(self, folder: str | Path, only: bool = False):
        self.folder, self.only = Path(folder), only

    def get(self, key: str, size: tuple[int, int] = (1, 1)) -> Verdict | None:
        """The verdict of a reply that was put here, read from its text anew; None without one. size: as in `parse`."""
        found = _read(self._file(key), key, size)
        if found is None and self.only:
            raise CacheMiss(
                f"The cache {self.folder} holds no whole reply {key[:16]}, and nothing may be asked. Give the judge's address and "
                "leave cache_only out, or the cache that the scores were made with."
            )
        return found

    def put(self, key: str, description: dict[str, Any], verdict: Verdict) -> None:
        """Keep a reply: its raw text beside what was asked. Raises JudgeUnavailable where it cannot be written."""
        entry = {"key": key, **description, "raw": verdict.raw, "expected": verdict.expected}
        entry |= {"usage": list(verdict.usage) if verdict.usage else None}
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(entry, indent=1))
        except OSError as error:
            raise JudgeUnavailable(
                f"The cache {self.folder} cannot be written: {error}. Give a folder with room that is yours."
            ) from error

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _read(file: Path, key: str, size: tuple[int, int]) -> Verdict | None:
    try:
        entry = json.loads(file.read_text("utf-8"))
        if entry["key"] != key:
            return None
        expected, usage = entry["expected"], entry["usage"]
        verdict = parse(entry["raw"], size)
        return replace(
            verdict,
            expected=None if expected is None else float(expected),
            usage=(int(usage[0]), int(usage[1])) if usage else None,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, ParseError):
        return None


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it holds all of `text` or what it held before, whoever else writes it."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
