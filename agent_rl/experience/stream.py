"""Redis: the stream from gateways to the recorder, and the heads of running conversations. The one door to redis.

Redis may lose everything and nothing is lost: the journal sends again what SQL does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_rl.types import Arrival


@dataclass(frozen=True, slots=True)
class Head:
    """Where a conversation stands after a turn: what the next request's prompt extends."""

    turn_id: str
    session_id: str
    policy_id: str
    ids: tuple[int, ...]  # the whole prompt and the response
    n_messages: int  # messages so far, the answer included
    chain: str


class Stream:
    """One Redis connection pool, for either side."""

    def __init__(self, url: str, name: str) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    # gateway
    async def send(self, arrivals: Sequence[tuple[Arrival, Head | None, str | None]], head_ttl_s: float) -> list[str]:
        """Entries, and for turns their heads (scoped by the key given third), in one MULTI. Returns entry ids."""
        raise NotImplementedError

    async def heads(self, scope: str, chains: Sequence[str]) -> list[Head]:
        """Heads that end with the first of these chains that any head ends with; several if it is ambiguous."""
        raise NotImplementedError

    async def last_id(self) -> str | None:
        """Id of the newest entry ever added, None for an empty or missing stream: tells that Redis forgot."""
        raise NotImplementedError

    async def watermark(self, journal_id: str) -> int | None:
        raise NotImplementedError

    # recorder
    async def receive(self, consumer: str, n: int, block_s: float) -> list[tuple[str, Arrival]]:
        """(entry id, arrival): first what a dead consumer left, then new ones. Entries that cannot be read go to the
        dead-letter stream with their error."""
        raise NotImplementedError

    async def acknowledge(self, entry_ids: Sequence[str], watermarks: dict[str, int]) -> None:
        """Acknowledge, delete, and publish the watermarks."""
        raise NotImplementedError
