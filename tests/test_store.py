"""SQL as the recorder and the gateway use it, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from nouns import answer, make_child, make_feedback, make_turn, user
from sqlalchemy import Table, func, select

from agent_rl.experience.arrays import pack_floats, pack_ids, unpack_floats, unpack_ids
from agent_rl.experience.burial import mark
from agent_rl.experience.rows import turn_of, turn_row
from agent_rl.experience.store import Refused, Store, StoreUnavailable
from agent_rl.experience.tables import arrivals, dead_letters, feedback, sessions, tombstones, turns
from agent_rl.types import Arrival, Feedback, Finish, Message, Span, ToolCall, Turn


def arriving(*bodies: Turn | Feedback, start: int = 1, journal: str = "j1") -> list[Arrival]:
    return [Arrival(journal, seq, body) for seq, body in enumerate(bodies, start)]


async def revision(store: Store, turn_id: str) -> int:
    async with store.read() as connection:
        query = select(turns.c.evidence_revision).where(turns.c.turn_id == turn_id)
        return (await connection.execute(query)).scalar_one()


async def count(store: Store, table: Table) -> int:
    async with store.read() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


def test_arrays_are_little_endian_and_nan_is_none() -> None:
    assert pack_ids((1, 258)) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert unpack_ids(b"\x01\x00\x00\x00\x02\x01\x00\x00") == (1, 258)
    assert pack_floats((None, 0.0)) == b"\x00\x00\xc0\x7f\x00\x00\x00\x00"
    assert unpack_floats(pack_floats((None, 0.0, -0.5))) == (None, 0.0, -0.5)
    with pytest.raises(OverflowError):
        pack_ids((2**31,))


def test_a_turn_comes_back_from_its_row_as_it_was() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("c1", "look", '{"at": "tea"}'),), reasoning="hm")
    turn = make_turn(
        response_ids=(5, 6, 2),
        behavior_logprobs=(-0.5, None, -0.25),
        kept_mass=(0.5, None, 1.0),
        spans=(Span("base", 0, 1), Span("r1", 1, 3, kv_mixed=True)),
        messages=(user("hi"), call, Message("tool", "hot", tool_call_id="c1")),
        tools=({"type": "function", "function": {"name": "look", "parameters": {"a": [1, None]}}},),
        finish=Finish.ABORTED,
        no_lesson="aborted",
        subject="anna",
    )
    assert turn_of(turn_row(turn)) == turn


async def test_a_batch_is_written_once_however_often_it_comes(any_store: Store) -> None:
    first = make_turn("t1")
    batch = arriving(first, make_child(first, "t2", "shorter, please"), make_feedback("f1", turn_id="t1"))
    assert await any_store.record(batch) == {"j1": 3}
    assert await any_store.record(batch) == {"j1": 3}
    assert (await count(any_store, turns), await count(any_store, feedback)) == (2, 1)
    assert await revision(any_store, "t1") == 2  # one child, one feedback
    assert await revision(any_store, "t2") == 0


async def test_the_watermark_stops_before_the_first_gap(any_store: Store) -> None:
    one, two, three, four = arriving(*(make_turn(f"t{n}") for n in (1, 2, 3, 4)))
    assert await any_store.watermark("j1") == 0
    assert await any_store.record([one]) == {"j1": 1}
    assert await any_store.record([three, four]) == {"j1": 1}
    assert await any_store.record([two, replace(two, journal_id="j2", body=make_turn("t9"))]) == {"j1": 4, "j2": 0}
    assert await any_store.watermark("j1") == 4
    async with any_store.read() as connection:
        assert (await connection.execute(select(arrivals))).all() == [("j2", 2)]


async def test_a_child_may_come_before_its_parent(any_store: Store) -> None:
    parent = make_turn("t1")
    early, late = make_child(parent, "t2", "shorter"), make_child(parent, "t3", "longer", created_at=150.0)
    title = make_child(parent, "t4", "a title for this", no_lesson="side")
    await any_store.record(arriving(early, title))
    assert await any_store.transcript("t2") is None
    await any_store.record(arriving(parent, late, start=3))
    assert await revision(any_store, "t1") == 2  # a side request says nothing of an answer
    await any_store.record(arriving(make_child(parent, "t5", "again"), start=5))
    assert await revision(any_store, "t1") == 3


async def test_feedback_may_come_before_its_turn_and_be_changed(any_store: Store) -> None:
    said = make_feedback("f1", turn_id="t1", comment="too long", created_at=200.0)
    await any_store.record(arriving(said))
    await any_store.record(arriving(make_turn("t1"), start=2))
    assert await revision(any_store, "t1") == 1
    await any_store.record(arriving(replace(said, comment="much too long", created_at=201.0), start=3))
    assert await revision(any_store, "t1") == 2
    stale = replace(said, comment="old news", created_at=199.0)  # another gateway's, delayed
    await any_store.record(arriving(stale, start=4))
    assert await revision(any_store, "t1") == 2
    async with any_store.read() as connection:
        assert (await connection.execute(select(feedback.c.comment))).scalars().all() == ["much too long"]


async def test_feedback_on_a_session_is_on_the_turn_that_was_its_last_then(any_store: Store) -> None:
    first = make_turn("t1", created_at=100.0)
    second = make_child(first, "t2", "and?", created_at=110.0)
    third = make_child(first, "t3", "later", created_at=300.0)
    unplaced = make_feedback("f1", turn_id=None, session_id="s1", created_at=200.0)
    await any_store.record(arriving(unplaced))
    await any_store.record(arriving(first, second, third, start=2))
    assert await revision(any_store, "t2") == 1
    assert await revision(any_store, "t3") == 0
    await any_store.record(arriving(replace(unplaced, feedback_id="f2", created_at=400.0), start=5))
    assert await revision(any_store, "t3") == 1


async def test_sessions_span_their_turns(any_store: Store) -> None:
    first = make_turn("t1", created_at=100.0, subject="anna", api_key_id="k1")
    await any_store.record(arriving(make_child(first, "t2", "x", created_at=130.0)))
    await any_store.record(arriving(first, start=2))
    async with any_store.read() as connection:
        row = (await connection.execute(select(sessions))).one()
    assert (row.session_id, row.created_at, row.last_turn_at) == ("s1", 100.0, 130.0)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("turn", "t1"),
        ("session", "s1"),
        ("subject", mark("acme", "anna")),
        ("name", mark("acme", "mine")),
        ("tenant", "acme"),
    ],
)
async def test_what_was_deleted_does_not_come_back(store: Store, kind: str, target: str) -> None:
    async with store.write() as connection:
        await connection.execute(tombstones.insert(), {"kind": kind, "target_id": target, "created_at": 101.0})
    other = make_turn("t2", session_id="s2", tenant_id="other", subject="anna", client_session_id="mine")
    mine = make_turn("t1", subject="anna", client_session_id="mine")
    assert await store.record(arriving(mine, other)) == {"j1": 2}
    async with store.read() as connection:
        assert (await connection.execute(select(turns.c.turn_id))).scalars().all() == ["t2"]


async def test_values_that_sql_cannot_hold_are_refused_whole(any_store: Store) -> None:
    with pytest.raises(Refused):
        await any_store.record(arriving(make_turn("t1"), make_turn("t2", shared_len=-1)))
    assert (await count(any_store, turns), await any_store.watermark("j1")) == (0, 0)
    assert await any_store.bury("j1", 1, b"record", "why") == {"j1": 1}
    async with any_store.read() as connection:
        row = (await connection.execute(select(dead_letters))).one()
    assert (row.journal_id, row.seq, row.payload, row.error) == ("j1", 1, b"record", "why")


async def test_nul_characters_are_no_reason_to_lose_a_turn(any_store: Store) -> None:
    await any_store.record(arriving(make_turn("t1", messages=(user("a\0b"),), answer=answer("\0"))))
    found = await any_store.transcript("t1")
    assert found is not None
    assert (found.messages[0].content, found.turn.answer.content) == ("a\ufffdb", "\ufffd")


async def test_a_transcript_is_put_together_from_its_parents(any_store: Store) -> None:
    first = make_turn("t1", prompt_ids=(1, 9, 2), response_ids=(5, 2), messages=(user("tea?"),), answer=answer("hot"))
    second = make_child(first, "t2", "shorter", prompt_ids=(1, 7, 2), response_ids=(6,), answer=answer("h"))
    fork = make_turn(
        "t3",
        parent_id="t2",
        shared_len=4,
        shared_messages=1,
        prompt_ids=(8,),
        messages=(user("again"),),
        response_ids=(3,),
    )
    await any_store.record(arriving(fork, second, first))
    found = await any_store.transcript("t2")
    assert found is not None
    assert found.prompt_ids == (1, 9, 2, 5, 2, 1, 7, 2)
    assert [m.content for m in found.messages] == ["tea?", "hot", "shorter"]
    assert found.turn == second
    forked = await any_store.transcript("t3")
    assert forked is not None
    assert forked.prompt_ids == (1, 9, 2, 5, 8)
    assert [m.content for m in forked.messages] == ["tea?", "again"]
    assert await any_store.transcript("t4") is None


async def test_a_turn_that_shares_more_than_there_is_is_damage(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    first = make_turn("t1")
    await store.record(arriving(first, make_child(first, "t2", "x", shared_len=6)))
    assert await store.transcript("t2") is None
    assert "shares 6 tokens and 2 messages with its parent t1, which has 5 and 2" in caplog.text


async def test_a_turn_that_is_its_own_ancestor_ends(store: Store) -> None:
    await store.record(arriving(make_turn("t1", parent_id="t1")))
    assert await store.transcript("t1") is None


async def test_what_the_gateway_looks_up(any_store: Store) -> None:
    first = make_turn("t1", created_at=100.0, chain="c")
    same = make_turn("t2", created_at=101.0, chain="c", session_id="s2")
    foreign = make_turn("t3", chain="c", tenant_id="other")
    await any_store.record(arriving(same, first, foreign, make_child(first, "t4", "x")))
    assert await any_store.find_chain("acme", "c") == [("t2", "s2"), ("t1", "s1")]
    assert await any_store.find_chain("acme", "d") == []


async def test_tenants_and_keys(any_store: Store) -> None:
    made = await any_store.ensure_tenant("acme", "Acme")
    assert (made.name, made.learn, len(made.hmac_key)) == ("Acme", True, 32)
    assert await any_store.ensure_tenant("acme", "another name") == made
    assert await any_store.tenant("nobody") is None
    key_id = await any_store.add_key("acme", "h" * 64, ["feedback", "agent"], "laptop")
    found = await any_store.key("h" * 64)
    assert found is not None
    assert (found.api_key_id, found.tenant_id, found.scopes) == (key_id, "acme", {"agent", "feedback"})
    assert await any_store.key("i" * 64) is None
    with pytest.raises(Refused):
        await any_store.add_key("acme", "h" * 64, ["admin"])


async def test_writers_wait_for_each_other(store: Store, tmp_path: Path) -> None:
    other = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'agent-rl.db'}")
    bodies = [make_turn(f"t{n}") for n in range(20)]
    here = [store.record(arriving(body, start=n, journal="a")) for n, body in enumerate(bodies, 1)]
    there = [other.record(arriving(body, start=n, journal="b")) for n, body in enumerate(bodies, 1)]
    await asyncio.gather(*here, *there)
    await other.close()
    assert await count(store, turns) == 20
    assert (await store.watermark("a"), await store.watermark("b")) == (20, 20)


async def test_sqlite_is_durable_at_commit_and_locks_at_begin(store: Store) -> None:
    async with store.write() as connection:
        assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == 2  # FULL
        assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
        assert (await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar() == 30_000
        reader = store.read()
        async with reader as beside:  # readers do not wait for a writer
            assert (await beside.execute(select(turns))).all() == []


async def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'no-such-folder' / 'x.db'}")
    with pytest.raises(StoreUnavailable):
        await Store.open(f"postgresql+asyncpg://nobody@/x?host={tmp_path}")


async def test_the_hot_queries_use_their_indexes(store: Store) -> None:
    async with store.read() as connection:
        for sql, index in (
            ("SELECT turn_id FROM turns WHERE parent_id = 'x'", "ix_turns_parent"),
            ("SELECT turn_id FROM turns WHERE tenant_id = 'x' AND chain = 'y'", "ix_turns_chain"),
            ("SELECT turn_id FROM turns WHERE session_id = 'x' ORDER BY created_at", "ix_turns_session"),
            (
                "SELECT turn_id FROM turns WHERE evidence_revision > judged_revision ORDER BY created_at LIMIT 1",
                "ix_turns_unjudged",
            ),
            (
                "SELECT * FROM lessons WHERE policy_id = 'p' AND state = 'ready' ORDER BY created_at LIMIT 8",
                "ix_lessons_ready",
            ),
        ):
            plan = (await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}")).all()
            assert index in str(plan), (sql, plan)


async def test_recording_a_batch_is_fast_enough(store: Store) -> None:
    """256 turns in one transaction: a recorder keeps up with far more than one engine answers."""
    first = make_turn("t0")
    children = [make_child(first, f"t{n}", "x", response_ids=tuple(range(200))) for n in range(1, 256)]
    before = time.monotonic()
    await store.record(arriving(first, *children))
    assert time.monotonic() - before < 5.0
    assert await revision(store, "t0") == 255
