"""The end of sessions: one without a turn for a while is closed, and its answers that nothing followed are settled.

A later turn opens its session again, later feedback makes a new revision of the evidence: nothing ends for good.
"""

from __future__ import annotations

import time

from sqlalchemy import Integer, Text, false, literal, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.records import insert
from agent_rl.experience.store import Store
from agent_rl.experience.tables import sessions, turns, verdicts

ENDED = "the session ended and nothing followed"


async def close_idle(store: Store, idle_s: float, n: int = 256) -> list[str]:
    """Close up to n sessions whose last turn began more than `idle_s` seconds ago, longest idle first; their ids.

    Each of their turns that nothing followed, and that could have been a lesson, gets a verdict without a score.
    """
    now = time.time()
    idle = select(sessions.c.session_id).where(sessions.c.closed_at.is_(None), sessions.c.last_turn_at < now - idle_s)
    idle = idle.order_by(sessions.c.last_turn_at).limit(n)
    async with store.read() as connection:
        if (await connection.execute(idle.limit(1))).first() is None:
            return []
    async with store.write() as connection:
        ended = list((await connection.execute(idle.with_for_update(skip_locked=True))).scalars())
        closing = update(sessions).where(sessions.c.session_id.in_(ended))
        await connection.execute(closing.values(closed_at=now))
        await _settle_unfollowed(connection, ended, now)
    return ended


async def _settle_unfollowed(connection: AsyncConnection, session_ids: list[str], now: float) -> None:
    """Revision 0 is a turn without evidence: whatever comes later is judged as revision 1."""
    unfollowed = select(
        turns.c.turn_id,
        literal(0, Integer),
        literal("rules", Text),
        null(),
        null(),
        false(),
        literal(ENDED, Text),
        literal(now),
    ).where(turns.c.session_id.in_(session_ids), turns.c.evidence_revision == 0, turns.c.no_lesson.is_(None))
    names = ["turn_id", "revision", "source", "score", "hint", "related", "reason", "created_at"]
    settling = insert(connection, verdicts).from_select(names, unfollowed)
    await connection.execute(settling.on_conflict_do_nothing())
