"""The stream and the shipper against a real Redis, one that restarts and forgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nouns import make_child, make_feedback, make_turn
from redis import Redis
from servers import RedisServer, redis_server

from agent_rl.experience import stream as streams
from agent_rl.experience.codec import decode
from agent_rl.experience.journal import Journal
from agent_rl.experience.shipper import Shipper
from agent_rl.experience.stream import Head, Stream, StreamForgot, StreamUnavailable
from agent_rl.types import Arrival, Turn

NAME = "agent-rl:turns"


@pytest.fixture
async def stream(redis_url: str) -> AsyncIterator[Stream]:
    stream = Stream(redis_url, NAME)
    yield stream
    await stream.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def head_of(turn: Turn, *ids: int) -> Head:
    return Head(turn.turn_id, turn.session_id, turn.policy_id, ids, 2, turn.chain)


def bare(*seqs: int, journal: str = "j1") -> list[tuple[Arrival, None, None]]:
    return [(Arrival(journal, seq, make_turn(f"t{seq}")), None, None) for seq in seqs]


async def seqs(stream: Stream, n: int = 100) -> list[int]:
    return [delivery.seq for delivery in await stream.receive(n, 0.01)]


# ------------------------------------------------------------------------------------------------- the stream


async def test_what_is_sent_is_received_in_order_and_gone_when_acknowledged(stream: Stream, redis: Redis) -> None:
    said = make_feedback()
    await stream.send([(Arrival("j1", 1, make_turn("t1")), None, None), (Arrival("j1", 2, said), None, None)], 60)
    first, second = await stream.receive(10, 0.01)
    assert (first.journal_id, first.seq, decode(first.body)) == ("j1", 1, make_turn("t1"))
    assert (second.seq, decode(second.body)) == (2, said)
    assert await stream.receive(10, 0.01) == []
    await stream.acknowledge([first.entry_id, second.entry_id], {"j1": 2})
    assert (redis.xlen(NAME), redis.xpending(NAME, "recorder")["pending"]) == (0, 0)
    assert await stream.progress("j1") == (2, 2)
    assert await stream.progress("j2") == (None, None)


async def test_what_a_dead_recorder_left_is_taken_over(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    await stream.send(bare(1, 2, 3), 60)
    assert await seqs(stream, 2) == [1, 2]
    assert await seqs(stream) == [3]
    assert await seqs(stream) == []  # not yet: the other recorder may still be writing
    monkeypatch.setattr(streams, "CLAIM_AFTER_S", 0.0)
    assert await seqs(stream) == [1, 2, 3]


async def test_entries_that_were_deleted_while_unacknowledged_are_passed_over(
    stream: Stream, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = await stream.send(bare(1, 2), 60)
    assert await seqs(stream) == [1, 2]
    redis.xdel(NAME, first)
    monkeypatch.setattr(streams, "CLAIM_AFTER_S", 0.0)
    assert await seqs(stream) == [2]


async def test_what_belongs_to_no_journal_is_a_dead_letter_with_its_error(stream: Stream, redis: Redis) -> None:
    redis.xadd(NAME, {"hello": "world"})
    redis.xadd(NAME, {"journal": "j1", "seq": "one", "body": "x"})
    await stream.send(bare(1), 60)
    assert await seqs(stream) == [1]
    dead = [fields for _, fields in redis.xrange(f"{NAME}:dead")]
    assert dead[0] == {"hello": "world", "error": "KeyError: b'journal'"}
    assert dead[1]["error"].startswith("ValueError: invalid literal for int()")
    assert redis.xlen(NAME) == 1  # the one that waits for its acknowledgement


async def test_a_sender_learns_that_redis_forgot(stream: Stream, redis: Redis) -> None:
    await stream.send(bare(1, 2), 60)
    await stream.send(bare(3), 60, after=2)
    with pytest.raises(StreamForgot, match="was sent journal j1 up to 2 and has it up to 3"):
        await stream.send(bare(4), 60, after=2)
    redis.flushall()
    with pytest.raises(StreamForgot, match="has it up to 0"):
        await stream.send(bare(4), 60, after=3)
    assert redis.xlen(NAME) == 0


async def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    stream = Stream(f"unix://{tmp_path / 'none.sock'}", NAME)
    for attempt in (stream.send(bare(1), 60), stream.receive(1, 0.01), stream.heads("k", ["c"]), stream.progress("j")):
        with pytest.raises(StreamUnavailable):
            await attempt
    await stream.close()


# -------------------------------------------------------------------------------------------------- the heads


async def test_heads_are_found_by_scope_and_longest_chain(stream: Stream) -> None:
    one, two = make_turn("t1", chain="c1"), make_turn("t2", chain="c2")
    await stream.send([(Arrival("j1", 1, one), head_of(one, 1, 9, 2, 5, 2), "key-a")], 60)
    await stream.send([(Arrival("j1", 2, two), head_of(two, 7), "key-a")], 60)
    assert await stream.heads("key-a", ["c9", "c2", "c1"]) == [head_of(two, 7)]
    assert await stream.heads("key-a", ["c1"]) == [Head("t1", "s1", "p1", (1, 9, 2, 5, 2), 2, "c1")]
    assert await stream.heads("key-b", ["c1"]) == []
    assert await stream.heads("key-a", []) == []


async def test_two_conversations_that_end_alike_are_both_found(stream: Stream) -> None:
    turns = [make_turn(f"t{n}", chain="c") for n in range(20)]
    for seq, turn in enumerate(turns, 1):
        await stream.send([(Arrival("j1", seq, turn), head_of(turn, seq), "key")], 60)
    assert [head.turn_id for head in await stream.heads("key", ["c"])] == [f"t{n}" for n in range(19, 11, -1)]


async def test_heads_live_as_long_as_they_are_told_and_parents_two_minutes(stream: Stream, redis: Redis) -> None:
    parent = make_turn("t1", chain="c1")
    child = make_child(parent, "t2", "shorter", chain="c2")
    await stream.send([(Arrival("j1", 1, parent), head_of(parent, 1), "key")], 3600)
    assert 3590 < redis.ttl(f"{NAME}:head:t1") <= 3600
    await stream.send([(Arrival("j1", 2, child), head_of(child, 1, 2), "key")], 3600)
    assert 110 < redis.ttl(f"{NAME}:head:t1") <= 120
    assert 3590 < redis.ttl(f"{NAME}:head:t2") <= 3600
    await stream.send([(Arrival("j1", 3, make_turn("t3", chain="c3")), head_of(parent, 1), "key")], 0.05)
    await asyncio.sleep(0.1)
    assert await stream.heads("key", ["c1"]) == []


# ------------------------------------------------------------------------------------------------ the shipper


@asynccontextmanager
async def shipping(folder: Path, stream: Stream, segment_bytes: int = 2**20) -> AsyncIterator[Shipper]:
    journal = Journal(folder, segment_bytes=segment_bytes)
    shipper = Shipper(journal, stream, head_ttl_s=60)
    task = asyncio.create_task(shipper.run())
    try:
        yield shipper
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await journal.close()


async def test_what_is_appended_is_sent_with_its_head(stream: Stream, tmp_path: Path) -> None:
    async with shipping(tmp_path, stream) as shipper:
        turns = [make_turn(f"t{n}") for n in range(1, 301)]
        arrivals = await asyncio.gather(*(shipper.append(turn, head_of(turn, 1), "key") for turn in turns))
        newest = max(arrivals, key=lambda arrival: arrival.seq)
        assert await shipper.sent(newest, 5)
        assert shipper.behind == 0
        assert await seqs(stream, 1000) == list(range(1, 301))
        for turn in turns:
            assert await stream.heads("key", [turn.chain]) == [head_of(turn, 1)]


async def test_a_restarted_gateway_sends_again_what_is_above_the_watermark(stream: Stream, tmp_path: Path) -> None:
    async with shipping(tmp_path, stream) as shipper:
        for n in range(1, 5):
            assert await shipper.sent(await shipper.append(make_turn(f"t{n}")), 5)
    deliveries = await stream.receive(100, 0.01)
    await stream.acknowledge([delivery.entry_id for delivery in deliveries], {deliveries[0].journal_id: 2})
    async with shipping(tmp_path, stream) as shipper:
        assert await shipper.sent(await shipper.append(make_feedback()), 5)
        assert await seqs(stream) == [3, 4, 5]


async def test_the_journal_is_trimmed_below_the_watermark(stream: Stream, tmp_path: Path) -> None:
    async with shipping(tmp_path, stream, segment_bytes=1) as shipper:
        for n in range(1, 5):
            arrival = await shipper.append(make_turn(f"t{n}"))
        assert await shipper.sent(arrival, 5)
        await stream.acknowledge([], {arrival.journal_id: 3})
        assert await shipper.sent(await shipper.append(make_turn("t5")), 5)
        assert [int(path.stem) for path in sorted(tmp_path.glob("*.segment"))] == [4, 5]


async def test_redis_may_be_away_restart_and_forget_everything(tmp_path: Path) -> None:
    with redis_server() as server:
        stream = Stream(server.url, NAME)
        async with shipping(tmp_path, stream) as shipper:
            assert await shipper.sent(await shipper.append(make_turn("t1")), 5)
            await away(server, forget=False)
            second = await shipper.append(make_turn("t2"))  # the client's answer does not wait for Redis
            assert not await shipper.sent(second, 0.2)
            assert shipper.behind == 1
            await back(server)
            assert await shipper.sent(second, 10)
            assert await seqs(stream) in ([1, 2], [2])  # kept on disk at most a second late
            await away(server, forget=True)
            await back(server)
            assert await until_received(stream, 2) == [1, 2]  # noticed without anything new to send
            await away(server, forget=True)
            third = await shipper.append(make_turn("t3"))
            await back(server)
            assert await shipper.sent(third, 10)
            assert await until_received(stream, 3) == [1, 2, 3]
        await stream.close()


async def away(server: RedisServer, *, forget: bool) -> None:
    await asyncio.to_thread(server.stop, forget=forget)


async def back(server: RedisServer) -> None:
    await asyncio.to_thread(server.start)


async def until_received(stream: Stream, n: int) -> list[int]:
    found: list[int] = []
    async with asyncio.timeout(15):
        while len(found) < n:
            try:
                found += await seqs(stream)
            except StreamUnavailable:
                await asyncio.sleep(0.05)
    return found
