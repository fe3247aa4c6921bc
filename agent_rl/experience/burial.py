"""Tombstones: what was deleted, so that a record of it that is still on its way does not bring it back.

    session  one of our sessions          name     a session, as its tenant asked for it: pending ones too
    turn     one turn                     subject  an end user, or the key that stands for one
    tenant   all of a tenant's            late     no target: the session of a turn that came too late

A tombstone holds for what was recorded before it, so that who was forgotten may come again; a tenant's for good, until
a tenant of its name is made anew. Names that clients chose are kept as hashes, under their tenant.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.database import insert
from agent_rl.experience.tables import tenants, tombstones
from agent_rl.types import Feedback, Turn

Grave = tuple[str, str]  # (kind, target)
Body = TypeVar("Body", bound=Turn | Feedback)
FOR_GOOD = float("inf")


def mark(tenant_id: str, name: str) -> str:
    """What a tombstone calls a name that a client chose."""
    return hashlib.sha256(f"{tenant_id}\0{name}".encode()).hexdigest()


def graves_of(body: Turn | Feedback) -> set[Grave]:
    """The tombstones that would cover this record."""
    tenant_id = body.tenant_id
    graves = {("tenant", tenant_id)}
    if body.turn_id:
        graves.add(("turn", body.turn_id))
    if body.session_id:
        graves |= {("session", body.session_id), ("name", mark(tenant_id, body.session_id))}
    if isinstance(body, Turn):
        if body.client_session_id:
            graves.add(("name", mark(tenant_id, body.client_session_id)))
        if subject := body.subject or body.api_key_id:
            graves.add(("subject", mark(tenant_id, subject)))
    return graves


async def bury(connection: AsyncConnection, graves: Iterable[Grave]) -> None:
    """Last in its transaction: gateways look for newer ones than they know."""
    now = time.time()
    rows = [{"kind": kind, "target_id": target, "created_at": now} for kind, target in sorted(set(graves))]
    if rows:
        again = insert(connection, tombstones).on_conflict_do_update(
            index_elements=["kind", "target_id"], set_={"created_at": now}
        )
        await connection.execute(again, rows)


async def alive(connection: AsyncConnection, bodies: Sequence[Body]) -> list[Body]:
    """The records of which nothing was deleted since they were made."""
    names = sorted({target for body in bodies for _, target in graves_of(body)})
    found = (await connection.execute(select(tombstones).where(tombstones.c.target_id.in_(names)))).all()
    buried = {(row.kind, row.target_id): row.created_at for row in found}
    buried_tenants = [target for kind, target in buried if kind == "tenant"]
    if buried_tenants:
        query = select(tenants.c.tenant_id).where(tenants.c.tenant_id.in_(buried_tenants))
        there = set((await connection.execute(query)).scalars())
        buried |= {("tenant", tenant_id): FOR_GOOD for tenant_id in buried_tenants if tenant_id not in there}
    return [b for b in bodies if all(buried.get(grave, 0.0) < b.created_at for grave in graves_of(b))]
