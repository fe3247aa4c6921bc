"""SQL, the truth: what arrived, and what of it is asked for by those who serve.

`Store` is one database (SQLite or PostgreSQL) with short transactions; on SQLite every writing one begins immediate.
What lessons and lineages need is in `lessons.py` and `lineage.py`, as functions that take a Store.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.types import Arrival, Deployment, Policy, Transcript


@dataclass(frozen=True, slots=True)
class ApiKey:
    api_key_id: str
    tenant_id: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Tenant:
    tenant_id: str
    name: str
    learn: bool
    hmac_key: bytes


class Store:
    @classmethod
    async def open(cls, url: str) -> Store:
        """Connect. The schema must be at head (`migrate`); raises RuntimeError that says what to run if it is not."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A reading transaction."""
        raise NotImplementedError

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A writing transaction: immediate on SQLite, committed at the end of the block. No model work inside."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------- the recorder's
    async def record(self, arrivals: Sequence[Arrival]) -> dict[str, int]:
        """Write a batch in one transaction; a second delivery changes nothing, tombstoned targets are passed over.

        Turns raise the evidence revision of their parent (and take over children that came first), feedback that of
        its turn (a session's feedback: of the session's last turn). Returns journal id → new watermark.
        """
        raise NotImplementedError

    async def watermark(self, journal_id: str) -> int:
        """Every record of this journal up to this seq is in SQL; 0 if none is."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------- the gateway's
    async def ensure_tenant(self, tenant_id: str, name: str) -> Tenant:
        raise NotImplementedError

    async def tenant(self, tenant_id: str) -> Tenant | None:
        raise NotImplementedError

    async def add_key(self, tenant_id: str, key_hash: str, scopes: Sequence[str], label: str = "") -> str:
        """Returns the api_key_id."""
        raise NotImplementedError

    async def key(self, key_hash: str) -> ApiKey | None:
        """None if there is none or it is revoked."""
        raise NotImplementedError

    async def policy(self, tenant_id: str, name: str) -> Policy | None:
        raise NotImplementedError

    async def policies(self, tenant_id: str | None = None) -> list[Policy]:
        raise NotImplementedError

    async def deployment(self, policy_id: str) -> Deployment | None:
        raise NotImplementedError

    async def transcript(self, turn_id: str) -> Transcript | None:
        """The turn with its whole past, walked up through its parents; None if the turn or a parent is not there."""
        raise NotImplementedError

    async def find_chain(self, tenant_id: str, chain: str) -> list[tuple[str, str]]:
        """(turn_id, session_id) of the turns that end with this message chain, at most a few."""
        raise NotImplementedError

    async def session_turns(self, session_id: str) -> list[str]:
        """Turn ids of a session, oldest first."""
        raise NotImplementedError


async def migrate(url: str) -> None:
    """Bring a database to the newest revision of `migrations/`."""
    raise NotImplementedError
