"""Idle sessions close, and what nothing followed in them is settled, on SQLite and on PostgreSQL."""

from __future__ import annotations

import time

import pytest
from nouns import make_child, make_feedback, make_turn, make_verdict
from recorded import Recorded
from sqlalchemy import select

from agent_rl.experience import lessons
from agent_rl.experience.closing import ENDED, close_idle
from agent_rl.experience.store import Store
from agent_rl.experience.tables import sessions, verdicts


@pytest.fixture
async def record(any_store: Store) -> Recorded:
    await any_store.ensure_tenant("acme", "Acme")
    return Recorded(any_store)


async def closed(store: Store) -> set[str]:
    async with store.read() as connection:
        query = select(sessions.c.session_id).where(sessions.c.closed_at.is_not(None))
        return set((await connection.execute(query)).scalars())


async def settled(store: Store) -> list[tuple[str, int, int | None, str]]:
    async with store.read() as connection:
        query = select(verdicts.c.turn_id, verdicts.c.revision, verdicts.c.score, verdicts.c.reason)
        rows = await connection.execute(query.order_by(verdicts.c.turn_id, verdicts.c.revision))
        return [tuple(row) for row in rows]


async def test_an_idle_session_closes_and_its_last_answer_is_settled(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1")
    title = make_child(turn, "t3", "name this chat", no_lesson="side")
    busy = make_turn("t9", session_id="s9", created_at=time.time())
    await record(turn, make_child(turn, "t2", "shorter"), title, busy)
    assert await close_idle(any_store, 60.0) == ["s1"]
    assert await close_idle(any_store, 60.0) == []
    assert await closed(any_store) == {"s1"}
    assert await settled(any_store) == [("t2", 0, None, ENDED)]


async def test_the_longest_idle_close_first(any_store: Store, record: Recorded) -> None:
    await record(*(make_turn(f"t{n}", session_id=f"s{n}", created_at=100.0 - n) for n in range(3)))
    assert [await close_idle(any_store, 60.0, n=2) for _ in range(3)] == [["s2", "s1"], ["s0"], []]


async def test_a_later_turn_opens_a_session_again(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1")
    await record(turn)
    await close_idle(any_store, 60.0)
    await record(make_child(turn, "t2", "shorter", created_at=time.time()))
    assert await closed(any_store) == set()
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert (found.transcript.turn.turn_id, found.revision) == ("t1", 1)
    assert await close_idle(any_store, 60.0) == []


async def test_feedback_after_the_end_is_a_new_revision(any_store: Store, record: Recorded) -> None:
    await record(make_turn("t1"))
    await close_idle(any_store, 60.0)
    await record(make_feedback("f1", turn_id=None, session_id="s1", created_at=time.time()))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert await lessons.settle(any_store, found, make_verdict(found), method="user_hindsight") is not None
    assert await closed(any_store) == {"s1"}
    assert await settled(any_store) == [("t1", 0, None, ENDED), ("t1", 1, -1, "")]
