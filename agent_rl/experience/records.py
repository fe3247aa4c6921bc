"""What one batch of arrivals does to SQL, inside the recorder's transaction.

Order does not matter: a child may come before its parent, feedback before its turn, and anything twice. A turn's
evidence revision is the number of its children that follow it plus the number of its feedback upserts.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, FromClause, case, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience import burial
from agent_rl.experience.database import Refused
from agent_rl.experience.database import insert as insert
from agent_rl.experience.rows import feedback_row, turn_row
from agent_rl.experience.tables import (
    arrivals,
    dead_letters,
    feedback,
    journals,
    json_length,
    policies,
    sessions,
    turns,
)
from agent_rl.types import Arrival, Feedback, Turn


def of_the_conversation(turn: FromClause = turns) -> ColumnElement[bool]:
    """Turns that are no title, summary or warm-up."""
    return or_(turn.c.no_lesson.is_(None), turn.c.no_lesson != "side")


def follows(child: FromClause, parent: FromClause) -> ColumnElement[bool]:
    """Turns that count as what followed their parent: of the conversation, and holding the parent's answer unaltered.

    A fork whose past was altered or compacted shares fewer messages than the parent has, and says nothing of it.
    """
    all_of_it = parent.c.shared_messages + json_length(parent.c.messages) + 1
    its_child = child.c.parent_id == parent.c.turn_id
    return its_child & of_the_conversation(child) & (child.c.shared_messages == all_of_it)


async def write_arrivals(connection: AsyncConnection, batch: Sequence[Arrival]) -> dict[str, int]:
    """Everything that `batch` says and SQL does not have yet. Returns journal id → new watermark."""
    fresh = await _not_seen(connection, batch)
    answered, spoken = await _not_deleted(connection, fresh)
    said = [await _upsert_feedback(connection, body) for body in spoken]
    new = await _insert_turns(connection, answered)
    await _make_subject_policies(connection, new)
    await _upsert_sessions(connection, new)
    await _place_session_feedback(connection, {body.session_id for body in [*new, *said] if body and body.session_id})
    await _raise_evidence(connection, new, [body for body in said if body])
    return await pass_seqs(connection, [(arrival.journal_id, arrival.seq) for arrival in batch])


async def bury(connection: AsyncConnection, journal_id: str, seq: int, payload: bytes, error: str) -> dict[str, int]:
    """Keep a record that cannot be written as a turn or feedback, and let the watermark pass it."""
    row = {"journal_id": journal_id, "seq": seq, "payload": payload, "error": error, "created_at": time.time()}
    await connection.execute(insert(connection, dead_letters).on_conflict_do_nothing(), row)
    return await pass_seqs(connection, [(journal_id, seq)])


async def pass_seqs(connection: AsyncConnection, seqs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Note that these records are in SQL; each watermark rises to the last record before the first gap."""
    by_journal: dict[str, set[int]] = defaultdict(set)
    for journal_id, seq in seqs:
        by_journal[journal_id].add(seq)
    marks = {}
    for journal_id, arrived in sorted(by_journal.items()):
        before = mark = await _watermark(connection, journal_id)
        beyond = set(await _beyond(connection, journal_id))
        while mark + 1 in arrived or mark + 1 in beyond:
            mark += 1
        if mark > before:
            where = journals.c.journal_id == journal_id
            await connection.execute(update(journals).where(where).values(watermark=mark))
            gone = (arrivals.c.journal_id == journal_id) & (arrivals.c.seq <= mark)
            await connection.execute(delete(arrivals).where(gone))
        if waiting := [{"journal_id": journal_id, "seq": s} for s in sorted(arrived - beyond) if s > mark]:
            await connection.execute(insert(connection, arrivals).on_conflict_do_nothing(), waiting)
        marks[journal_id] = mark
    return marks


async def _watermark(connection: AsyncConnection, journal_id: str) -> int:
    """The journal's watermark, its row locked: two recorders must not both move it."""
    row = {"journal_id": journal_id, "watermark": 0}
    await connection.execute(insert(connection, journals).on_conflict_do_nothing(), row)
    query = select(journals.c.watermark).where(journals.c.journal_id == journal_id).with_for_update()
    return int((await connection.execute(query)).scalar_one())


async def _beyond(connection: AsyncConnection, journal_id: str) -> Sequence[int]:
    query = select(arrivals.c.seq).where(arrivals.c.journal_id == journal_id)
    return (await connection.execute(query)).scalars().all()


async def _not_seen(connection: AsyncConnection, batch: Sequence[Arrival]) -> list[Arrival]:
    """Arrivals that are not in SQL yet, each once, in the order of their journals."""
    unseen: dict[tuple[str, int], Arrival] = {}
    for journal_id in sorted({arrival.journal_id for arrival in batch}):
        mark = await _watermark(connection, journal_id)
        beyond = set(await _beyond(connection, journal_id))
        mine = [a for a in batch if a.journal_id == journal_id and a.seq > mark and a.seq not in beyond]
        unseen.update({(a.journal_id, a.seq): a for a in sorted(mine, key=lambda a: a.seq)})
    return list(unseen.values())


async def _not_deleted(connection: AsyncConnection, fresh: Sequence[Arrival]) -> tuple[list[Turn], list[Feedback]]:
    """The records of which nothing was deleted. A turn that comes too late takes what was said of it along, and
    gateways hear of it, so that neither their memory, Redis nor their journals keep it."""
    answered = [arrival.body for arrival in fresh if isinstance(arrival.body, Turn)]
    recorded = await burial.alive(connection, answered)
    kept = {turn.turn_id for turn in recorded}
    late = {turn.turn_id: turn.session_id for turn in answered if turn.turn_id not in kept}
    if late:
        await connection.execute(delete(feedback).where(feedback.c.turn_id.in_(sorted(late))))
        await burial.bury(connection, [grave for t, s in late.items() for grave in (("turn", t), ("late", s))])
    said = [arrival.body for arrival in fresh if isinstance(arrival.body, Feedback)]
    return recorded, await burial.alive(connection, said)


async def _insert_turns(connection: AsyncConnection, batch: Sequence[Turn]) -> list[Turn]:
    """Those of the batch that were not there."""
    if not batch:
        return []
    statement = insert(connection, turns).on_conflict_do_nothing().returning(turns.c.turn_id)
    try:
        rows = [turn_row(turn) for turn in batch]
    except OverflowError as error:
        raise Refused(f"a token id does not fit in 32 bits: {error}") from error
    result = await connection.execute(statement, rows)
    inserted = set(result.scalars())
    return [turn for turn in batch if turn.turn_id in inserted]


async def _make_subject_policies(connection: AsyncConnection, new: Sequence[Turn]) -> None:
    """A policy `parent:mark` is its subject's alone; its row comes with the first turn."""
    firsts = {turn.policy_id: turn for turn in new if ":" in turn.policy_id}
    there = select(policies.c.policy_id).where(policies.c.policy_id.in_(sorted(firsts)))
    known = set((await connection.execute(there)).scalars()) if firsts else set()
    for policy_id, turn in sorted(firsts.items()):
        if policy_id in known:
            continue
        parent_id, _, mark = policy_id.partition(":")
        parent = (await connection.execute(select(policies).where(policies.c.policy_id == parent_id))).one_or_none()
        if parent is None:
            raise Refused(f"turn {turn.turn_id} is of the policy {policy_id}, but there is no policy {parent_id}")
        row = {
            "policy_id": policy_id,
            "tenant_id": turn.tenant_id,
            "name": f"{parent.name}@{mark}",
            "base_hash": parent.base_hash,
            "subject": turn.subject or turn.api_key_id,
            "created_at": turn.created_at,
        }
        await connection.execute(insert(connection, policies).on_conflict_do_nothing(), row)


async def _upsert_feedback(connection: AsyncConnection, said: Feedback) -> Feedback | None:
    """None if something newer of this id is there already. An upsert never moves to another turn."""
    statement = insert(connection, feedback)
    kept = {"feedback_id", "tenant_id", "turn_id", "session_id"}
    changed = {column.name: statement.excluded[column.name] for column in feedback.c if column.name not in kept}
    newer = statement.excluded.created_at >= feedback.c.created_at
    upsert = statement.on_conflict_do_update(index_elements=["feedback_id", "tenant_id"], set_=changed, where=newer)
    kept_ids = upsert.returning(feedback.c.turn_id, feedback.c.session_id)
    row = (await connection.execute(kept_ids, feedback_row(said))).one_or_none()
    if row is None:
        return None
    return Feedback(said.feedback_id, said.tenant_id, said.created_at, turn_id=row.turn_id, session_id=row.session_id)


async def _upsert_sessions(connection: AsyncConnection, new: Sequence[Turn]) -> None:
    rows: dict[str, dict[str, object]] = {}
    for turn in sorted(new, key=lambda turn: turn.created_at):
        row = rows.setdefault(
            turn.session_id,
            {
                "session_id": turn.session_id,
                "tenant_id": turn.tenant_id,
                "client_session_id": turn.client_session_id,
                "api_key_id": turn.api_key_id,
                "subject": turn.subject,
                "created_at": turn.created_at,
            },
        )
        row["last_turn_at"] = turn.created_at
    if not rows:
        return
    statement = insert(connection, sessions)
    there, coming = sessions.c, statement.excluded
    first = case((coming.created_at < there.created_at, coming.created_at), else_=there.created_at)
    last = case((coming.last_turn_at > there.last_turn_at, coming.last_turn_at), else_=there.last_turn_at)
    statement = statement.on_conflict_do_update(
        index_elements=["session_id"], set_={"created_at": first, "last_turn_at": last, "closed_at": None}
    )
    await connection.execute(statement, [rows[session_id] for session_id in sorted(rows)])


async def _place_session_feedback(connection: AsyncConnection, session_ids: set[str]) -> None:
    """Feedback on a session is feedback on the turn that was its last when it was given."""
    last = (
        select(turns.c.turn_id)
        .where(
            turns.c.session_id == feedback.c.session_id,
            turns.c.tenant_id == feedback.c.tenant_id,
            turns.c.created_at <= feedback.c.created_at,
            of_the_conversation(),
        )
        .order_by(turns.c.created_at.desc())
        .limit(1)
        .scalar_subquery()
    )
    unplaced = feedback.c.turn_id.is_(None) & feedback.c.session_id.in_(sorted(session_ids))
    if session_ids:
        await connection.execute(update(feedback).where(unplaced).values(turn_id=last))


async def _raise_evidence(connection: AsyncConnection, new: Sequence[Turn], said: Sequence[Feedback]) -> None:
    """Count everything for the turns of this batch; for turns from before, add what this batch brings."""
    ids = {turn.turn_id for turn in new}
    child = turns.alias("child")
    children = select(func.count()).where(follows(child, turns)).scalar_subquery()
    spoken = (
        select(func.count())
        .where(feedback.c.turn_id == turns.c.turn_id, feedback.c.tenant_id == turns.c.tenant_id)
        .scalar_subquery()
    )
    if ids:
        everything = update(turns).where(turns.c.turn_id.in_(sorted(ids)))
        await connection.execute(everything.values(evidence_revision=children + spoken))
    followed = select(turns.c.turn_id).join(child, follows(child, turns)).where(child.c.turn_id.in_(sorted(ids)))
    more = Counter((await connection.execute(followed)).scalars())
    more.update(await _turns_of(connection, said))
    for turn_id, n in sorted(more.items()):
        if turn_id not in ids:
            raised = update(turns).where(turns.c.turn_id == turn_id)
            await connection.execute(raised.values(evidence_revision=turns.c.evidence_revision + n))


async def _turns_of(connection: AsyncConnection, said: Sequence[Feedback]) -> list[str]:
    """The turn of each feedback that has one, sessions' feedback placed by now."""
    found = []
    for one in said:
        key = (feedback.c.feedback_id == one.feedback_id) & (feedback.c.tenant_id == one.tenant_id)
        turn_id = (await connection.execute(select(feedback.c.turn_id).where(key))).scalar_one()
        found += [turn_id] if turn_id else []
    return found
