"""Outboxes: frames once and in order, bounded, resumed by their owner, buried when their gateway dies."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis import Redis

from agent_rl.experience import outbox as module
from agent_rl.experience.outbox import Outbox, OutboxGone, Put


@pytest.fixture
async def outbox(redis_url: str) -> AsyncIterator[Outbox]:
    outbox = Outbox(redis_url, "test", ttl_s=60, grace_s=5)
    await outbox.alive()
    yield outbox
    await outbox.close()


async def test_a_frame_is_stored_once_and_numbered(outbox: Outbox) -> None:
    connection = await outbox.open("t", "t/k", "reader")
    assert [await outbox.begin(connection, "a") for _ in range(2)] == [Put.NEW, Put.KNOWN]
    for part, frame, last in [(1, b"{1}", False), (1, b"{1}", False), (2, b"{2}", True), (2, b"{2}", True)]:
        await outbox.append(connection, "a", part, frame, last=last)
    assert await outbox.read(connection, "reader", 0, 0.01) == [(1, b"{1}"), (2, b"{2}")]
    assert await outbox.acknowledge(connection, 1) is Put.NEW
    assert await outbox.read(connection, "reader", 0, 0.01) == [(2, b"{2}")]
    assert await outbox.begin(connection, "a") is Put.KNOWN  # its end is not acknowledged
    assert await outbox.acknowledge(connection, 2) is Put.NEW
    assert await outbox.begin(connection, "a") is Put.NEW
    assert await outbox.acknowledge(connection, 3) is Put.GONE


async def test_a_full_outbox_takes_an_end_alone(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FRAMES", 2)
    connection = await outbox.open("t", "t/k", "reader")
    await outbox.begin(connection, "a")
    puts = [await outbox.append(connection, "a", part, b"{}", last=False) for part in (1, 2, 3)]
    assert puts == [Put.NEW, Put.NEW, Put.FULL]
    await outbox.acknowledge(connection, 1)
    assert await outbox.append(connection, "a", 3, b"{}", last=False) is Put.NEW
    assert await outbox.append(connection, "a", 4, b"{}", last=True) is Put.NEW


async def test_a_newer_reader_and_another_owner(outbox: Outbox) -> None:
    connection = await outbox.open("t", "t/k", "old")
    with pytest.raises(OutboxGone):
        await outbox.resume(connection, "t/other", "new")
    assert await outbox.resume(connection, "t/k", "new") == 0
    with pytest.raises(OutboxGone):
        await outbox.read(connection, "old", 0, 0.01)
    assert await outbox.read(connection, "new", 0, 0.01) == []


async def test_requests_of_a_dead_gateway_end(outbox: Outbox, redis_url: str) -> None:
    other = Outbox(redis_url, "test", ttl_s=60, grace_s=5)
    connection = await outbox.open("t", "t/k", "reader")
    await outbox.begin(connection, "mine")
    await other.begin(connection, "theirs")  # it never said that it lives
    for _ in range(2):
        await outbox.bury(connection, lambda request_id: f"lost {request_id}".encode())
    assert await outbox.read(connection, "reader", 0, 0.01) == [(1, b"lost theirs")]
    assert await other.append(connection, "theirs", 1, b"{}", last=False) is Put.KNOWN  # too late
    await other.close()


async def test_everything_expires(outbox: Outbox, redis_url: str) -> None:
    connection = await outbox.open("t", "t/k", "reader")
    await outbox.begin(connection, "a")
    await outbox.append(connection, "a", 1, b"{}", last=False)
    with Redis.from_url(redis_url) as redis:
        assert all(redis.pttl(key) > 0 for key in redis.keys("test:*"))
