"""What is forgotten is gone: a session, all of a subject's, all of a tenant's.

Redis' heads go first, since without Redis nothing is forgotten; then one transaction takes it out of SQL and leaves
tombstones (`burial.py`), which stop what is still on its way; then the weights of policies that nobody else taught.
Each gateway looks for new tombstones, empties its memory and turns its journal over, so that the segment with these
records is deleted as soon as the watermark has passed it. Sessions are deleted whole: nothing is shared across them.

Left are: ids in `lesson_uses`, `audit` and tombstones, and what PostgreSQL keeps of deleted rows until it vacuums.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.burial import Grave, bury, graves_of, mark
from agent_rl.experience.codec import decode
from agent_rl.experience.database import Refused, empty_log
from agent_rl.experience.outbox import forget_outboxes
from agent_rl.experience.store import Store
from agent_rl.experience.stream import Stream
from agent_rl.experience.tables import (
    api_keys,
    checkpoints,
    dead_letters,
    deployments,
    drops,
    episodes,
    exams,
    feedback,
    lesson_uses,
    lessons,
    policies,
    preferences,
    releases,
    sessions,
    steps,
    tenants,
    tombstones,
    turns,
    verdicts,
)
from agent_rl.experience.tenancy import OPERATOR

NAMED = {"session": "name", "subject": "subject", "tenant": "tenant"}  # kind → its tombstone's
CHUNK = 500  # sessions in one statement
SWEPT = 500  # sessions that one sweep deletes


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was deleted, and what had learned from it. Releases of policies that others teach too are as they were,
    until one rolls back; policies that nobody else taught are deleted with all their weights."""

    sessions: tuple[str, ...]  # our ids
    turns: int
    feedback: int
    lessons: int
    releases: tuple[str, ...]  # that learned from it, and those that grew out of them
    policies: tuple[str, ...]  # ids of those that went with it


async def forget(store: Store, stream: Stream, kind: str, tenant_id: str, target: str) -> Forgotten:
    """`target`: a session's id (ours or the client's), a subject (an end user, or the id of a key that stands for one),
    a tenant's id. What is recorded of it later, but was said before, is dropped.

    Raises Refused, and StoreUnavailable or StreamUnavailable where it is to be tried again.
    """
    if kind not in NAMED:
        raise Refused(f"what is forgotten is one of {', '.join(NAMED)}, not {kind!r}")
    if kind == "tenant" and target == OPERATOR:
        raise Refused(f"the operator's own tenant {OPERATOR!r} cannot be deleted")
    async with store.read() as connection:
        turn_ids = await _turns_of(connection, await _ids(connection, _sessions(kind, tenant_id, target)))
    await stream.forget(turn_ids)
    if kind == "tenant":
        await forget_outboxes(stream, tenant_id)
    async with store.write() as connection:
        session_ids = await _ids(connection, _sessions(kind, tenant_id, target))
        learned = await _learned_from(connection, session_ids)
        counts, graves = await _delete_sessions(connection, tenant_id, session_ids)
        if kind == "tenant":
            counts["feedback"] += await _delete_tenant(connection, tenant_id)
        graves.add((NAMED[kind], tenant_id if kind == "tenant" else mark(tenant_id, target)))
        await _delete_dead_letters(connection, graves, target)
        doomed = await _policies(connection, kind, tenant_id, target)
        folders = await _delete_policies(connection, doomed)
        await bury(connection, graves)
    await asyncio.to_thread(_delete_folders, folders)
    await empty_log(store.reader)
    said = (counts["turns"], counts["feedback"], counts["lessons"])
    return Forgotten(tuple(session_ids), *said, learned, tuple(doomed))


async def sweep(store: Store, stream: Stream) -> int:
    """Delete sessions that are idle for longer than their tenants keep them, `SWEPT` at most. Returns how many."""
    query = select(sessions.c.tenant_id, sessions.c.session_id).join(
        tenants, tenants.c.tenant_id == sessions.c.tenant_id
    )
    query = query.where(sessions.c.last_turn_at < time.time() - tenants.c.retention_s).limit(SWEPT)
    by_tenant: dict[str, list[str]] = defaultdict(list)
    async with store.read() as connection:
        for tenant_id, session_id in (await connection.execute(query)).all():
            by_tenant[tenant_id].append(session_id)
        turn_ids = await _turns_of(connection, [s for session_ids in by_tenant.values() for s in session_ids])
    if not by_tenant:
        return 0
    await stream.forget(turn_ids)
    async with store.write() as connection:
        buried: set[Grave] = set()
        for tenant_id, session_ids in by_tenant.items():
            _, graves = await _delete_sessions(connection, tenant_id, session_ids)
            buried |= graves
        await bury(connection, buried)
    await empty_log(store.reader)
    return sum(len(session_ids) for session_ids in by_tenant.values())


async def buried_since(store: Store, moment: float) -> list[tuple[str, str, float]]:
    """(kind, target, when) of the tombstones set since, oldest first."""
    query = select(tombstones).where(tombstones.c.created_at > moment).order_by(tombstones.c.created_at)
    async with store.read() as connection:
        return [(row.kind, row.target_id, row.created_at) for row in (await connection.execute(query)).all()]


# ------------------------------------------------------------------------------------------------------ what goes


def _sessions(kind: str, tenant_id: str, target: str) -> Select[Any]:
    query = select(sessions.c.session_id).where(sessions.c.tenant_id == tenant_id)
    if kind == "tenant":
        return query
    if kind == "subject":
        key = sessions.c.subject.is_(None) & (sessions.c.api_key_id == target)
        return query.where(or_(sessions.c.subject == target, key))
    return query.where(or_(sessions.c.session_id == target, sessions.c.client_session_id == target))


async def _ids(connection: AsyncConnection, query: Select[Any]) -> list[str]:
    return list((await connection.execute(query)).scalars())


async def _turns_of(connection: AsyncConnection, session_ids: Sequence[str]) -> list[str]:
    found = []
    for some in _chunks(session_ids):
        found += await _ids(connection, select(turns.c.turn_id).where(turns.c.session_id.in_(some)))
    return found


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """A statement takes a limited number of values."""
    return (ids[at : at + CHUNK] for at in range(0, len(ids), CHUNK))


async def _delete_sessions(
    connection: AsyncConnection, tenant_id: str, session_ids: Sequence[str]
) -> tuple[Counter[str], set[Grave]]:
    """(rows deleted by table, the tombstones that they need)."""
    counts: Counter[str] = Counter()
    graves: set[Grave] = {("session", session_id) for session_id in session_ids}
    for some in _chunks(session_ids):
        its_turns = select(turns.c.turn_id).where(turns.c.session_id.in_(some))
        its_lessons = select(lessons.c.lesson_id).where(lessons.c.target_id.in_(its_turns))
        graves |= {("turn", turn_id) for turn_id in await _ids(connection, its_turns)}
        said = or_(feedback.c.turn_id.in_(its_turns), feedback.c.session_id.in_(some))
        for table, where in (
            (feedback, (feedback.c.tenant_id == tenant_id) & said),
            (verdicts, verdicts.c.turn_id.in_(its_turns)),
            (preferences, preferences.c.turn_id.in_(its_turns)),
            (drops, drops.c.lesson_id.in_(its_lessons)),
            (lessons, lessons.c.target_id.in_(its_turns)),
            (turns, turns.c.session_id.in_(some)),
            (sessions, sessions.c.session_id.in_(some)),
        ):
            counts[table.name] += (await connection.execute(delete(table).where(where))).rowcount
    return counts, graves


async def _delete_tenant(connection: AsyncConnection, tenant_id: str) -> int:
    """The tenant, its keys, and what it said of turns that never came; returns how much of that."""
    for table in (api_keys, tenants):
        await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
    return (await connection.execute(delete(feedback).where(feedback.c.tenant_id == tenant_id))).rowcount


async def _delete_dead_letters(connection: AsyncConnection, graves: set[Grave], target: str) -> None:
    """Records that SQL refused hold what users said too; one that cannot be read goes where it holds the name."""
    for row in (await connection.execute(select(dead_letters))).all():
        try:
            doomed = bool(graves_of(decode(row.payload)) & graves)
        except ValueError:
            doomed = target.encode() in row.payload
        if doomed:
            where = (dead_letters.c.journal_id == row.journal_id) & (dead_letters.c.seq == row.seq)
            await connection.execute(delete(dead_letters).where(where))


# ---------------------------------------------------------------------------------------- what had learned from it


async def _learned_from(connection: AsyncConnection, session_ids: Sequence[str]) -> tuple[str, ...]:
    """Releases whose checkpoint, or one that it grew out of, used a lesson of these sessions; oldest first."""
    tainted: set[str] = set()
    for some in _chunks(session_ids):
        its_turns = select(turns.c.turn_id).where(turns.c.session_id.in_(some))
        used = select(lesson_uses.c.checkpoint_id).join(lessons, lessons.c.lesson_id == lesson_uses.c.lesson_id)
        tainted.update(await _ids(connection, used.where(lessons.c.target_id.in_(its_turns)).distinct()))
    if not tainted:
        return ()
    line = select(checkpoints.c.checkpoint_id, checkpoints.c.parent_id).order_by(checkpoints.c.step)
    for checkpoint_id, parent_id in (await connection.execute(line)).all():
        if parent_id in tainted:
            tainted.add(checkpoint_id)
    grown = select(releases.c.release_id, releases.c.checkpoint_id)
    grown = grown.order_by(releases.c.created_at, releases.c.release_id)
    return tuple(row.release_id for row in (await connection.execute(grown)).all() if row.checkpoint_id in tainted)


async def _policies(connection: AsyncConnection, kind: str, tenant_id: str, target: str) -> list[str]:
    """Those that nobody else taught: the tenant's own, or the subject's."""
    if kind == "session":
        return []
    query = select(policies.c.policy_id).where(policies.c.tenant_id == tenant_id).order_by(policies.c.policy_id)
    return await _ids(connection, query if kind == "tenant" else query.where(policies.c.subject == target))


async def _delete_policies(connection: AsyncConnection, policy_ids: Sequence[str]) -> set[Path]:
    """Everything of these policies; returns the folders of their weights. The publisher unloads them."""
    folders: set[Path] = set()
    for some in _chunks(policy_ids):
        for table in (checkpoints, releases):
            folders.update(map(Path, await _ids(connection, select(table.c.path).where(table.c.policy_id.in_(some)))))
        its_releases = select(releases.c.release_id).where(releases.c.policy_id.in_(some))
        await connection.execute(delete(exams).where(exams.c.release_id.in_(its_releases)))
        of_the_learning = (drops, lesson_uses, lessons, preferences, episodes, steps)
        for table in (*of_the_learning, releases, checkpoints, deployments, policies):
            await connection.execute(delete(table).where(table.c.policy_id.in_(some)))
    return folders


def _delete_folders(folders: Iterable[Path]) -> None:
    """Those that are on this machine."""
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
