"""How much one API key may ask, counted in this gateway: requests in a minute, and answers at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from server.auth import Caller
from server.refusal import Refusal


class Limits:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}  # key → (requests left, when that was)

    def enter(self, caller: Caller) -> dict[str, str]:
        """Headers that say how much is left, none where the key has no rate. `leave` when the answer has ended.

        Raises Refusal (429) that says when to come again.
        """
        key = caller.api_key_id
        if key is None:
            return {}
        most = caller.max_concurrency
        if most is not None and self._running[key] >= most:
            raise Refusal(
                429, f"this key has {most} answers running, its limit", code="concurrency_limit", retry_after_s=1
            )
        headers = self._take(key, caller.requests_per_minute)
        self._running[key] += 1
        return headers

    def leave(self, caller: Caller) -> None:
        key = caller.api_key_id
        if key is None:
            return
        self._running[key] -= 1
        if self._running[key] <= 0:
            del self._running[key]

    def _take(self, key: str, per_minute: int | None) -> dict[str, str]:
        """From a token bucket that holds a minute's worth."""
        if per_minute is None:
            self._buckets.pop(key, None)
            return {}
        now = self._clock()
        left, then = self._buckets.get(key, (float(per_minute), now))
        left = min(float(per_minute), left + (now - then) * per_minute / 60)
        if left < 1:
            raise Refusal(
                429,
                f"this key may send {per_minute} requests a minute",
                code="rate_limit_exceeded",
                retry_after_s=(1 - left) * 60 / per_minute,
                headers=_headers(per_minute, left),
            )
        self._buckets[key] = (left - 1, now)
        return _headers(per_minute, left - 1)


def _headers(per_minute: int, left: float) -> dict[str, str]:
    """As OpenAI names them; `reset` is when the bucket is full again."""
    return {
        "x-ratelimit-limit-requests": str(per_minute),
        "x-ratelimit-remaining-requests": str(int(left)),
        "x-ratelimit-reset-requests": f"{(per_minute - left) * 60 / per_minute:.3f}s",
    }
