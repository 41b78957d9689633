"""The forms of an OpenAI-style chat completion: what is asked of its output, how pictures are sent, what its answers and refusals say."""

from __future__ import annotations

import base64
import email.utils
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tropism.core import UserError
from tropism.restore.judge_pictures import Picture
from tropism.restore.judge_prompt import SCHEMA
from tropism.restore.judge_reply import ParseError, expected_level
from tropism.rewards.connection import Answer
from tropism.rewards.protocol import Refused, own_token, read_json, sendable

KEY = "TROPISM_JUDGE_KEY"
"""The environment variable that holds a bearer key."""
FORMATS: tuple[dict[str, Any] | None, ...] = (
    {"type": "json_schema", "json_schema": {"name": "hallucinations", "strict": True, "schema": SCHEMA}},
    {"type": "json_object"},
    None,
)
"""What is asked of a server's output, in order of attempt."""


def own_key(file: str | Path | None) -> str | None:
    """The key in a file, else in the environment, else None. Raises UserError, which does not repeat it, for one that cannot be sent."""
    if file is None:
        return own_token(KEY)
    try:
        text = Path(file).expanduser().read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The key file {file} cannot be read ({type(error).__name__}). Give a text file that holds the key alone."
        ) from error
    return sendable(text, str(file)) if text else None


def said(completion: dict[str, Any]) -> tuple[str, float | None]:
    """The text of a chat completion, and the expected level where its probabilities were sent. Raises ParseError where there is no text."""
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if choice.get("finish_reason") == "length":
        raise ParseError("was cut off", str(text))
    if not isinstance(text, str):
        refusal = message.get("refusal")
        raise ParseError(f"holds no text but a refusal: {str(refusal)[:120]}" if refusal else "holds no text")
    spread = choice.get("logprobs")
    tokens = spread.get("content") if isinstance(spread, dict) else None
    return text, expected_level(tokens) if isinstance(tokens, list) else None


def as_part(part: str | Picture) -> dict[str, Any]:
    """A part of a user's message: text, or a picture as a data URL in an object, which every server takes."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(part.png).decode()}"}}


def words_of(answer: Answer) -> str:
    """What a refusal says, wherever the server puts it."""
    try:
        told = read_json(answer.body)
    except Refused:
        return answer.body.decode("utf-8", errors="replace")
    error = told.get("error", told.get("message", told.get("detail", "")))
    return str(error.get("message", error) if isinstance(error, dict) else error)


def asked_to_wait(header: str | None) -> float:
    """Seconds that a Retry-After asks for, as a number or a date; 0 where it asks for nothing that can be read."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header)) if header.strip().isdecimal() else _until(header)
    except (ValueError, TypeError):
        return 0.0


def _until(date: str) -> float:
    then = email.utils.parsedate_to_datetime(date)
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
