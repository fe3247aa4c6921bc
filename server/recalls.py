"""Turns that a later request names by id: the newest from memory, where SQL may not have them yet, else from SQL."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from agent_rl.experience.store import Store, StoreUnavailable
from agent_rl.types import Message, Turn
from server.auth import Caller
from server.refusal import Refusal

MOST = 256
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.0)  # for a turn that another gateway has just answered


@dataclass(frozen=True, slots=True)
class Recalled:
    messages: tuple[Message, ...]  # all of the request's
    turn: Turn

    @property
    def session_id(self) -> str:
        """As the client knows it."""
        return self.turn.client_session_id or self.turn.session_id


class Recalls:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent: OrderedDict[str, Recalled] = OrderedDict()

    def remember(self, known: Recalled) -> None:
        self._recent[known.turn.turn_id] = known
        while len(self._recent) > MOST:
            self._recent.popitem(last=False)

    async def find(self, turn_id: str, caller: Caller) -> Recalled:
        """Raises Refusal: 404 unless the turn is there, retrievable and the caller's own; 503 while SQL is away."""
        known = self._recent.get(turn_id) or await self._recorded(turn_id)
        if known is None or not known.turn.retrievable or not _may_see(caller, known.turn):
            raise Refusal(404, f"there is no turn {turn_id} that can be gone back to", code="turn_not_found")
        return known

    def forget(self, session_ids: Collection[str]) -> None:
        for turn_id, known in list(self._recent.items()):
            if known.turn.session_id in session_ids:
                del self._recent[turn_id]

    async def _recorded(self, turn_id: str) -> Recalled | None:
        for pause_s in PAUSES_S:
            try:
                found = await self._store.transcript(turn_id)
            except StoreUnavailable as error:
                raise Refusal(503, "the database does not answer; try again", retry_after_s=2) from error
            if found:
                return Recalled(found.messages, found.turn)
            await asyncio.sleep(pause_s)
        return None


def _may_see(caller: Caller, turn: Turn) -> bool:
    """Its own key, or an admin of its tenant."""
    own = turn.api_key_id == caller.api_key_id or "admin" in caller.scopes
    return own and turn.tenant_id == caller.tenant.tenant_id
