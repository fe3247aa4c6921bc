"""What SQL knows of a turn and of what followed it, put together for the judge and the learner. Reads only."""

from __future__ import annotations

from itertools import takewhile

from sqlalchemy import ColumnElement, RowMapping, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.records import follows
from agent_rl.experience.rows import feedback_of, turn_of
from agent_rl.experience.store import transcript_of
from agent_rl.experience.tables import feedback, lessons, preferences, turns, verdicts
from agent_rl.types import Evidence, Feedback, Lesson, Message, Transcript, Turn, Verdict


def subject_of(turn: Turn) -> str:
    """Whose preferences a turn's feedback is: the end user's, else the key's."""
    return turn.subject or turn.api_key_id or ""


def standing_of(turn: Turn) -> ColumnElement[bool]:
    """What stands for the turn's subject. A policy may be shared: two tenants' subjects of one name are two."""
    whose = (preferences.c.tenant_id == turn.tenant_id) & (preferences.c.subject == subject_of(turn))
    return whose & (preferences.c.policy_id == turn.policy_id) & preferences.c.retracted_at.is_(None)


async def evidence_of(connection: AsyncConnection, turn_id: str, revision: int) -> Evidence | None:
    """None if the turn or a part of its past is not there."""
    transcript = await transcript_of(connection, turn_id)
    if transcript is None:
        return None
    followed_by = await _followed_by(connection, transcript)
    said = await _feedback(connection, transcript.turn)
    standing = await _standing(connection, transcript.turn)
    return Evidence(transcript, revision, followed_by, said, standing)


async def lesson_of(connection: AsyncConnection, row: RowMapping) -> Lesson | None:
    """A row of `lessons` with the evidence as it is now; None if its turn is not there any more."""
    evidence = await evidence_of(connection, row["target_id"], row["revision"])
    key = (verdicts.c.turn_id == row["target_id"]) & (verdicts.c.revision == row["revision"])
    verdict = (await connection.execute(select(verdicts).where(key))).mappings().one_or_none()
    if evidence is None or verdict is None:
        return None
    return Lesson(
        lesson_id=row["lesson_id"],
        policy_id=row["policy_id"],
        turn_id=row["target_id"],
        revision=row["revision"],
        method=row["method"],
        verdict=verdict_of(verdict),
        evidence=evidence,
        attempts=row["attempts"],
    )


async def lessons_of(connection: AsyncConnection, lesson_ids: list[str]) -> list[Lesson | None]:
    """In the order of the ids."""
    query = select(lessons).where(lessons.c.lesson_id.in_(lesson_ids))
    rows = {row["lesson_id"]: row for row in (await connection.execute(query)).mappings()}
    return [await lesson_of(connection, rows[lesson_id]) for lesson_id in lesson_ids]


def verdict_of(row: RowMapping) -> Verdict:
    names = ("turn_id", "revision", "source", "score", "hint", "related", "reason")
    return Verdict(**{name: row[name] for name in names})


async def _followed_by(connection: AsyncConnection, transcript: Transcript) -> tuple[Message, ...]:
    """What was said right behind the turn's answer, by the earliest child that follows it."""
    child = turns.alias("child")
    query = select(child).join(turns, follows(child, turns)).where(turns.c.turn_id == transcript.turn.turn_id)
    for row in (await connection.execute(query.order_by(child.c.created_at, child.c.turn_id))).mappings():
        if said := tuple(takewhile(lambda message: message.role != "assistant", turn_of(row).messages)):
            return said
    return ()


async def _feedback(connection: AsyncConnection, turn: Turn) -> tuple[Feedback, ...]:
    """Everything said of the turn and not taken back, oldest first."""
    query = select(feedback).where(
        feedback.c.turn_id == turn.turn_id,
        feedback.c.tenant_id == turn.tenant_id,
        feedback.c.retracted.is_(False),
    )
    rows = await connection.execute(query.order_by(feedback.c.created_at, feedback.c.feedback_id))
    return tuple(feedback_of(row) for row in rows.mappings())


async def _standing(connection: AsyncConnection, turn: Turn) -> tuple[str, ...]:
    query = select(preferences.c.text).where(standing_of(turn))
    return tuple((await connection.execute(query.order_by(preferences.c.created_at, preferences.c.text))).scalars())
