"""When an answer ends: an end token, a stop string, or the limit, in that order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from server.engines.contract import SamplingParams, length_reached


class Stopper:
    """Decides after each token of one answer whether it was the last.

    A stop string is looked for in the text of the last few tokens alone: it began with one of them, for a token is at
    least one byte.
    """

    def __init__(self, params: SamplingParams, eos_ids: Iterable[int], decode: Callable[[list[int]], str]) -> None:
        self.limit = params.max_new_tokens
        self.stop_ids = frozenset() if params.ignore_eos else frozenset({*eos_ids, *params.stop_token_ids})
        self.stop = [s for s in params.stop if s]
        self.tail = max((len(s.encode()) for s in self.stop), default=0) + 1
        self.decode = decode

    def reason(self, ids: Sequence[int]) -> dict[str, Any] | None:
        """SGLang's finish_reason if `ids`, all that was sampled, are a whole answer."""
        if ids[-1] in self.stop_ids:
            return {"type": "stop", "matched": ids[-1]}
        if self.stop:
            text = self.decode(list(ids[-self.tail :]))
            for stop in self.stop:
                if stop in text:
                    return {"type": "stop", "matched": stop}
        return length_reached(self.limit) if len(ids) >= self.limit else None
