"""SQL, the truth: what arrived, and what of it is asked for by those who serve.

`Store` is one database (SQLite or PostgreSQL) with short transactions; on SQLite every writing one begins immediate.
What lessons and lineages need is in `lessons.py` and `lineage.py`, as functions that take a Store.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, fields
from uuid import uuid4

from sqlalchemy import RowMapping, or_, select
from sqlalchemy.exc import SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_rl.experience import database, records
from agent_rl.experience.database import Refused, StoreUnavailable, migrate
from agent_rl.experience.rows import deployment_of, policy_of, turn_of
from agent_rl.experience.tables import api_keys, deployments, journals, policies, tenants, turns
from agent_rl.types import Arrival, Deployment, Message, Policy, Transcript

__all__ = ["ApiKey", "Refused", "Store", "StoreUnavailable", "Tenant", "migrate"]

DEEPEST = 10_000  # turns of one conversation; what lies deeper is damage, not a conversation

log = logging.getLogger("agent_rl.store")


@dataclass(frozen=True, slots=True)
class ApiKey:
    api_key_id: str
    tenant_id: str
    scopes: frozenset[str]
    key_hash: str
    revoked_at: float | None = None  # unix seconds; in the future for a key that was rotated
    requests_per_minute: int | None = None  # None: no limit
    max_concurrency: int | None = None
    label: str = ""
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Tenant:
    tenant_id: str
    name: str
    learn: bool
    hmac_key: bytes
    unstored: str = "learn"  # what `store: false` means: learn (as ever) | keep (no lesson) | discard (no record)
    policies: str = "shared"  # whose lessons teach the model `default`: shared (the server's) | own | subject
    retention_s: float | None = None  # sessions idle for longer are deleted; None: never


class Store:
    """Every method raises StoreUnavailable while SQL is down, and Refused for values that it cannot hold."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._reader = engine
        self._writer = database.writer(engine)

    @classmethod
    async def open(cls, url: str) -> Store:
        """Connect. The schema must be at head (`migrate`); raises RuntimeError that says what to run if it is not."""
        store = cls(database.connect(url))
        try:
            async with store.read() as connection:
                await connection.run_sync(database.check_revision)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        await self._reader.dispose()

    @property
    def reader(self) -> AsyncEngine:
        """The connections themselves, for what no transaction can do."""
        return self._reader

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A reading transaction."""
        return _transaction(self._reader)

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A writing transaction: immediate on SQLite, committed at the end of the block. No model work inside."""
        return _transaction(self._writer)

    # ----------------------------------------------------------------------------------- the recorder's
    async def record(self, arrivals: Sequence[Arrival]) -> dict[str, int]:
        """Write a batch in one transaction; a second delivery changes nothing, tombstoned targets are passed over.

        Turns raise the evidence revision of their parent (and take over children that came first), feedback that of
        its turn (a session's feedback: of the session's last turn). Returns journal id → new watermark.
        """
        async with self.write() as connection:
            return await records.write_arrivals(connection, arrivals)

    async def bury(self, journal_id: str, seq: int, payload: bytes, error: str) -> dict[str, int]:
        """Keep a record that cannot be read or written as a dead letter. Returns journal id → new watermark."""
        async with self.write() as connection:
            return await records.bury(connection, journal_id, seq, payload, error)

    async def watermark(self, journal_id: str) -> int:
        """Every record of this journal up to this seq is in SQL; 0 if none is."""
        async with self.read() as connection:
            query = select(journals.c.watermark).where(journals.c.journal_id == journal_id)
            return (await connection.execute(query)).scalar() or 0

    # ----------------------------------------------------------------------------------- the gateway's
    async def ensure_tenant(self, tenant_id: str, name: str) -> Tenant:
        """The tenant, made with a key of its own for prefix chains if it is not there."""
        row = {"tenant_id": tenant_id, "name": name, "hmac_key": secrets.token_bytes(32), "created_at": time.time()}
        async with self.write() as connection:
            await connection.execute(records.insert(connection, tenants).on_conflict_do_nothing(), row)
        tenant = await self.tenant(tenant_id)
        assert tenant is not None
        return tenant

    async def tenant(self, tenant_id: str) -> Tenant | None:
        async with self.read() as connection:
            row = (await connection.execute(select(tenants).where(tenants.c.tenant_id == tenant_id))).one_or_none()
            return tenant_of(row._mapping) if row else None

    async def add_key(
        self, tenant_id: str, key_hash: str, scopes: Sequence[str], label: str = "", **limits: int | None
    ) -> str:
        """Returns the api_key_id. `limits`: requests_per_minute, max_concurrency. Raises Refused if this key is there
        already."""
        row = {
            "api_key_id": uuid4().hex,
            "tenant_id": tenant_id,
            "key_hash": key_hash,
            "label": label,
            "scopes": sorted(scopes),
            "created_at": time.time(),
            **limits,
        }
        async with self.write() as connection:
            await connection.execute(api_keys.insert(), row)
        return str(row["api_key_id"])

    async def key(self, key_hash: str) -> ApiKey | None:
        """None if there is none or it is revoked."""
        in_force = or_(api_keys.c.revoked_at.is_(None), api_keys.c.revoked_at > time.time())
        async with self.read() as connection:
            query = select(api_keys).where(api_keys.c.key_hash == key_hash, in_force)
            row = (await connection.execute(query)).mappings().one_or_none()
            return key_of(row) if row else None

    async def policies(self, tenant_id: str | None = None) -> list[Policy]:
        """Oldest first, those of subjects too; None: of every tenant."""
        query = select(policies).order_by(policies.c.created_at, policies.c.policy_id)
        if tenant_id is not None:
            query = query.where(policies.c.tenant_id == tenant_id)
        async with self.read() as connection:
            return [policy_of(row) for row in (await connection.execute(query)).mappings()]

    async def named_policies(self, tenant_id: str) -> list[Policy]:
        """Those that a client may name: none of a subject's alone."""
        query = select(policies).where(policies.c.tenant_id == tenant_id, policies.c.subject.is_(None))
        async with self.read() as connection:
            return [policy_of(row) for row in (await connection.execute(query)).mappings()]

    async def deployment(self, policy_id: str) -> Deployment | None:
        async with self.read() as connection:
            query = select(deployments).where(deployments.c.policy_id == policy_id)
            row = (await connection.execute(query)).mappings().one_or_none()
            return deployment_of(row) if row else None

    async def transcript(self, turn_id: str) -> Transcript | None:
        """The turn with its whole past, walked up through its parents; None if the turn or a parent is not there."""
        async with self.read() as connection:
            return await transcript_of(connection, turn_id)

    async def find_chain(self, tenant_id: str, chain: str) -> list[tuple[str, str]]:
        """(turn_id, session_id) of the turns that end with this message chain, at most four, newest first."""
        query = (
            select(turns.c.turn_id, turns.c.session_id)
            .where(turns.c.tenant_id == tenant_id, turns.c.chain == chain)
            .order_by(turns.c.created_at.desc(), turns.c.turn_id)
            .limit(4)
        )
        async with self.read() as connection:
            return [(row.turn_id, row.session_id) for row in await connection.execute(query)]


def tenant_of(row: RowMapping) -> Tenant:
    return Tenant(**{field.name: row[field.name] for field in fields(Tenant)})


def key_of(row: RowMapping) -> ApiKey:
    values = {field.name: row[field.name] for field in fields(ApiKey)}
    return ApiKey(**values | {"scopes": frozenset(row["scopes"])})


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """The one boundary where the database's errors become ours."""
    try:
        async with engine.begin() as connection:
            yield connection
    except StatementError as error:
        if database.refuses(error):
            raise Refused(f"SQL refuses these values: {error.orig or error}") from error
        raise StoreUnavailable(f"SQL cannot be used now: {error.orig}") from error
    except (SQLAlchemyError, OSError) as error:
        raise StoreUnavailable(f"SQL cannot be used now: {error}") from error


async def transcript_of(connection: AsyncConnection, turn_id: str) -> Transcript | None:
    """See `Store.transcript`. A damaged record, which shares more of its parent than there is, is logged and None."""
    start = select(turns.c.turn_id, turns.c.parent_id).where(turns.c.turn_id == turn_id)
    walk = start.add_columns((turns.c.shared_len * 0).label("depth")).cte("walk", recursive=True)
    parent = turns.alias("parent")
    walk = walk.union_all(
        select(parent.c.turn_id, parent.c.parent_id, walk.c.depth + 1).where(
            parent.c.turn_id == walk.c.parent_id, walk.c.depth < DEEPEST
        )
    )
    query = select(turns).join(walk, walk.c.turn_id == turns.c.turn_id).order_by(walk.c.depth.desc())
    line = [turn_of(row) for row in (await connection.execute(query)).mappings()]
    if not line or line[0].parent_id is not None:
        return None
    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    for turn in line:
        if turn.shared_len > len(ids) or turn.shared_messages > len(messages):
            log.error(
                "turn %s is damaged: it shares %d tokens and %d messages with its parent %s, which has %d and %d",
                *(turn.turn_id, turn.shared_len, turn.shared_messages, turn.parent_id, len(ids), len(messages)),
            )
            return None
        prompt_ids, request = ids[: turn.shared_len] + turn.prompt_ids, messages[: turn.shared_messages] + turn.messages
        ids, messages = prompt_ids + turn.response_ids, (*request, turn.answer)
    return Transcript(turn, prompt_ids, request)
