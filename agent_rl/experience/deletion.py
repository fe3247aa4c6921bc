"""What is forgotten is gone: a session, all of a subject's, all of a tenant's.

One transaction takes it out of SQL and leaves tombstones, which stop what is still on its way; then Redis' heads go.
Gateways read the tombstones (`buried_since`), empty their memory and turn their journals over, so that the segment with
these records is deleted as soon as the watermark has passed it. Sessions are deleted whole: nothing is shared across
them. A tombstone holds for what was recorded before it: who was forgotten may come again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.codec import decode
from agent_rl.experience.database import empty_log
from agent_rl.experience.outbox import forget_outboxes
from agent_rl.experience.records import insert
from agent_rl.experience.store import Store
from agent_rl.experience.stream import Stream
from agent_rl.experience.tables import (
    api_keys,
    checkpoints,
    dead_letters,
    drops,
    feedback,
    lesson_uses,
    lessons,
    preferences,
    releases,
    sessions,
    tenants,
    tombstones,
    turns,
    verdicts,
)

KINDS = ("session", "subject", "tenant")
SWEPT = 100  # sessions that one sweep deletes per tenant


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was deleted, and what had learned from it: those releases are as they were, until one rolls back."""

    sessions: tuple[str, ...]  # our ids
    turns: int
    feedback: int
    lessons: int
    releases: tuple[str, ...]  # that learned from it, and those that grew out of them


async def forget(store: Store, stream: Stream, kind: str, tenant_id: str, target: str) -> Forgotten:
    """`target`: a session's id (ours or the client's), a subject, a tenant's id. Raises ValueError on another kind,
    StoreUnavailable, and StreamUnavailable when SQL has forgotten and Redis was not reached (try again)."""
    if kind not in KINDS:
        raise ValueError(f"what is forgotten is one of {', '.join(KINDS)}, not {kind!r}")
    async with store.write() as connection:
        session_ids: list[str] = list((await connection.execute(_sessions(kind, tenant_id, target))).scalars())
        turn_ids: list[str] = list(
            (await connection.execute(select(turns.c.turn_id).where(turns.c.session_id.in_(session_ids)))).scalars()
        )
        report = await _delete(connection, session_ids, turn_ids)
        graves: list[tuple[str, str]] = [("session", session_id) for session_id in session_ids]
        if kind == "tenant":
            graves.append(("tenant", tenant_id))
            await connection.execute(delete(api_keys).where(api_keys.c.tenant_id == tenant_id))
            await connection.execute(delete(tenants).where(tenants.c.tenant_id == tenant_id))
        elif kind == "subject":
            graves.append(("subject", f"{tenant_id}:{target}"))
        await _bury(connection, graves)
        await _delete_dead_letters(connection, set(graves))
    await empty_log(store.reader)
    await stream.forget(turn_ids)
    if kind == "tenant":
        await forget_outboxes(stream, tenant_id)
    return report


async def buried_since(store: Store, moment: float) -> tuple[list[tuple[str, str]], float]:
    """((kind, target) of the tombstones set since, the newest one's time)."""
    query = select(tombstones).where(tombstones.c.created_at > moment).order_by(tombstones.c.created_at)
    async with store.read() as connection:
        rows = (await connection.execute(query)).all()
    return [(row.kind, row.target_id) for row in rows], rows[-1].created_at if rows else moment


async def sweep(store: Store, stream: Stream) -> int:
    """Delete sessions that are idle for longer than their tenants keep them. Returns how many."""
    async with store.read() as connection:
        keeping = (await connection.execute(select(tenants).where(tenants.c.retention_s.is_not(None)))).all()
        due: list[tuple[str, str]] = []
        for tenant in keeping:
            idle = sessions.c.last_turn_at < time.time() - tenant.retention_s
            query = select(sessions.c.session_id).where(sessions.c.tenant_id == tenant.tenant_id, idle).limit(SWEPT)
            due += [(tenant.tenant_id, session_id) for session_id in (await connection.execute(query)).scalars()]
    for tenant_id, session_id in due:
        await forget(store, stream, "session", tenant_id, session_id)
    return len(due)


def _sessions(kind: str, tenant_id: str, target: str) -> Select[Any]:
    query = select(sessions.c.session_id).where(sessions.c.tenant_id == tenant_id)
    if kind == "tenant":
        return query
    if kind == "subject":
        return query.where(sessions.c.subject == target)
    named = select(turns.c.session_id).where(turns.c.tenant_id == tenant_id, turns.c.client_session_id == target)
    return query.where(or_(sessions.c.session_id == target, sessions.c.session_id.in_(named)))


async def _delete(connection: AsyncConnection, session_ids: Sequence[str], turn_ids: Sequence[str]) -> Forgotten:
    lesson_ids = list(
        (await connection.execute(select(lessons.c.lesson_id).where(lessons.c.target_id.in_(turn_ids)))).scalars()
    )
    learned = await _learned_from(connection, lesson_ids)
    said: ColumnElement[bool] = or_(feedback.c.turn_id.in_(turn_ids), feedback.c.session_id.in_(session_ids))
    n_said = (await connection.execute(select(func.count()).select_from(feedback).where(said))).scalar_one()
    for doomed in (
        delete(feedback).where(said),
        delete(verdicts).where(verdicts.c.turn_id.in_(turn_ids)),
        delete(preferences).where(preferences.c.turn_id.in_(turn_ids)),
        delete(drops).where(drops.c.lesson_id.in_(lesson_ids)),
        delete(lessons).where(lessons.c.lesson_id.in_(lesson_ids)),
        delete(turns).where(turns.c.turn_id.in_(turn_ids)),
        delete(sessions).where(sessions.c.session_id.in_(session_ids)),
    ):
        await connection.execute(doomed)
    return Forgotten(tuple(session_ids), len(turn_ids), n_said, len(lesson_ids), learned)


async def _learned_from(connection: AsyncConnection, lesson_ids: Sequence[str]) -> tuple[str, ...]:
    """Releases whose checkpoint, or one that it grew out of, used these lessons; oldest first."""
    used = select(lesson_uses.c.checkpoint_id).where(lesson_uses.c.lesson_id.in_(lesson_ids))
    tainted = set((await connection.execute(used)).scalars())
    if not tainted:
        return ()
    query = select(checkpoints.c.checkpoint_id, checkpoints.c.parent_id).order_by(checkpoints.c.step)
    for checkpoint_id, parent_id in (await connection.execute(query)).all():
        if parent_id in tainted:
            tainted.add(checkpoint_id)
    grown = select(releases.c.release_id).where(releases.c.checkpoint_id.in_(sorted(tainted)))
    return tuple((await connection.execute(grown.order_by(releases.c.created_at))).scalars())


async def _bury(connection: AsyncConnection, graves: Sequence[tuple[str, str]]) -> None:
    now = time.time()
    rows = [{"kind": kind, "target_id": target, "created_at": now} for kind, target in graves]
    if rows:
        statement = insert(connection, tombstones)
        again = statement.on_conflict_do_update(index_elements=["kind", "target_id"], set_={"created_at": now})
        await connection.execute(again, rows)


async def _delete_dead_letters(connection: AsyncConnection, graves: set[tuple[str, str]]) -> None:
    """Records that SQL refused hold what users said too; one that cannot be read goes if a name in it was forgotten."""
    for row in (await connection.execute(select(dead_letters))).all():
        try:
            body = decode(row.payload)
            named = {("session", body.session_id), ("tenant", body.tenant_id)}
            doomed = bool(named & graves)
        except ValueError:
            doomed = any(target.encode() in row.payload for _, target in graves)
        if doomed:
            where = (dead_letters.c.journal_id == row.journal_id) & (dead_letters.c.seq == row.seq)
            await connection.execute(delete(dead_letters).where(where))
