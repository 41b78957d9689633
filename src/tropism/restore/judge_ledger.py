"""What judging has cost: requests, tokens, and money where the user names the price."""

from __future__ import annotations

import math
import threading
from typing import Any

from tropism.core import UserError


class Ledger:
    """Counts of this process, over all threads. prices: (input, output) in any currency per million tokens, None where unknown.

    requests: sent, failures included. replies: answers of a model that were paid for, unreadable ones included. uncounted: those of
    them whose server told no tokens. cached: replies that were read from the cache instead. Raises UserError for prices below 0.
    """

    def __init__(self, prices: tuple[float, float] | None = None):
        if prices is not None and not all(math.isfinite(p) and p >= 0 for p in prices):
            raise UserError(
                f"The prices are {prices}; they are numbers of at least 0, per million tokens in and out. Try (2.5, 10)."
            )
        self.prices = prices
        self.requests = self.replies = self.uncounted = self.cached = self.tokens_in = self.tokens_out = 0
        self._lock = threading.Lock()

    def request(self) -> None:
        with self._lock:
            self.requests += 1

    def reply(self, usage: tuple[int, int] | None) -> None:
        """usage: tokens read and written, None where the server did not say."""
        with self._lock:
            self.replies += 1
            self.uncounted += usage is None
            self.tokens_in += usage[0] if usage else 0
            self.tokens_out += usage[1] if usage else 0

    def hit(self) -> None:
        with self._lock:
            self.cached += 1

    @property
    def cost(self) -> float | None:
        """In the currency of the prices; None without them, or while any reply's tokens are unknown: then it is not known either."""
        if self.prices is None or self.uncounted:
            return None
        return (self.tokens_in * self.prices[0] + self.tokens_out * self.prices[1]) / 1e6

    def as_json(self) -> dict[str, Any]:
        """Plain values for a report."""
        names = ("requests", "replies", "uncounted", "cached", "tokens_in", "tokens_out", "cost")
        return {name: getattr(self, name) for name in names} | {"prices": list(self.prices) if self.prices else None}


def usage_of(answer: dict[str, Any]) -> tuple[int, int] | None:
    """Tokens read and written of a chat completion; None where it does not tell both."""
    told = answer.get("usage")
    counts = [told.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(told, dict) else []
    whole = [c for c in counts if isinstance(c, int) and not isinstance(c, bool) and c >= 0]
    return (whole[0], whole[1]) if len(whole) == 2 else None
