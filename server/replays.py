"""Answers that may be asked for again: a retry of a request gets what its first try got, sampled once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection

from server.answering import Answering

WINDOW_S = 120.0  # SDKs give up within it
MOST = 256  # answers that have ended and are kept for it


class Replays:
    """Within one gateway. Keys hold tenant and API key."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str | None, ...], Answering] = OrderedDict()  # oldest first

    def find(self, key: tuple[str | None, ...]) -> Answering | None:
        """The first try, running or well ended; one that failed or was left by its client is asked anew."""
        self._forget_old()
        known = self._known.get(key)
        return None if known is None or known.failed or known.abandoned else known

    def add(self, key: tuple[str | None, ...], answering: Answering) -> None:
        self._known.pop(key, None)
        self._known[key] = answering
        self._forget_old()

    def forget(self, session_ids: Collection[str]) -> None:
        for key, known in list(self._known.items()):
            if known.place is not None and known.place.session_id in session_ids:
                del self._known[key]

    def _forget_old(self) -> None:
        excess, now = len(self._known) - MOST, time.monotonic()
        for key, known in list(self._known.items()):
            if excess <= 0 and now - known.began < WINDOW_S:
                return
            if known.over or now - known.began >= WINDOW_S:
                del self._known[key]
                excess -= 1
