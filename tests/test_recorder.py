"""From the journal to SQL through a real Redis, with each side away, doubled or poisoned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nouns import make_feedback, make_turn
from redis import Redis
from servers import redis_server
from sqlalchemy import func, select
from test_stream import shipping

from agent_rl.experience import recorder
from agent_rl.experience.store import Store, StoreUnavailable, migrate
from agent_rl.experience.stream import Stream
from agent_rl.experience.tables import dead_letters, turns
from agent_rl.settings import Settings, StoreSettings
from agent_rl.types import Arrival


def settings_for(folder: Path, redis_url: str) -> Settings:
    return Settings(home=folder, store=StoreSettings(redis=redis_url))


@asynccontextmanager
async def recording(settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(recorder.run(settings, stop))
    try:
        yield task
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await task


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  # the other side is a database
            await asyncio.sleep(0.02)


async def n_turns(store: Store) -> int:
    async with store.read() as connection:
        return (await connection.execute(select(func.count()).select_from(turns))).scalar_one()


async def test_from_journal_to_sql_and_back_to_the_watermark(tmp_path: Path, store: Store, redis_url: str) -> None:
    settings = settings_for(tmp_path, redis_url)
    stream = Stream(redis_url, settings.store.stream)
    async with recording(settings), shipping(tmp_path / "journal", stream, segment_bytes=1) as shipper:
        arrivals = [await shipper.append(make_turn(f"t{n}")) for n in range(1, 21)]
        journal_id = arrivals[0].journal_id

        async def trimmed() -> bool:
            return len(list((tmp_path / "journal").glob("*.segment"))) == 1

        await until(trimmed)
        assert await store.watermark(journal_id) == 20
        assert await stream.progress(journal_id) == (20, 20)
    with Redis.from_url(redis_url) as client:
        assert client.xlen(settings.store.stream) == 0
    await stream.close()


async def test_a_redis_that_forgets_everything_costs_no_record_and_doubles_none(tmp_path: Path, store: Store) -> None:
    with redis_server() as server:
        settings = settings_for(tmp_path, server.url)
        stream = Stream(server.url, settings.store.stream)
        async with shipping(tmp_path / "journal", stream) as shipper:
            for n in range(1, 11):
                arrival = await shipper.append(make_turn(f"t{n}"))
            assert await shipper.sent(arrival, 5)
            async with recording(settings):
                await until(lambda: has(store, arrival.journal_id, 10))
            arrival = await shipper.append(make_turn("t11"))
            assert await shipper.sent(arrival, 5)
            await asyncio.to_thread(server.stop, forget=True)  # t11 was in Redis and nowhere else but the journal
            async with recording(settings) as task:
                arrival = await shipper.append(make_turn("t12"))
                await asyncio.sleep(0.3)
                assert not task.done()
                await asyncio.to_thread(server.start)
                await until(lambda: has(store, arrival.journal_id, 12))
        await stream.close()
    assert await n_turns(store) == 12


async def has(store: Store, journal_id: str, watermark: int) -> bool:
    return await store.watermark(journal_id) >= watermark


async def test_sql_may_be_away_and_nothing_is_acknowledged(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, elsewhere = settings_for(tmp_path / "home", redis_url), settings_for(tmp_path / "away", redis_url)
    await migrate(elsewhere.database_url)
    stream = Stream(redis_url, settings.store.stream)
    await stream.send([(Arrival("j1", 1, make_turn("t1")), None, None)], 60)
    async with recording(settings) as task:
        await asyncio.sleep(0.3)
        assert not task.done()
        elsewhere.home.rename(settings.home)  # the database's disk is mounted
        store = await Store.open(settings.database_url)
        await until(lambda: has(store, "j1", 1))

        async def refuse(_self: Store, _arrivals: list[Arrival]) -> dict[str, int]:
            raise StoreUnavailable("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "record", refuse)
            await stream.send([(Arrival("j1", 2, make_turn("t2")), None, None)], 60)
            await asyncio.sleep(0.8)
            assert await stream.progress("j1") == (2, 1)
        await until(lambda: has(store, "j1", 2))
    await store.close()
    await stream.close()


async def test_a_poison_record_is_alone_in_the_dead_letters(tmp_path: Path, store: Store, redis_url: str) -> None:
    settings = settings_for(tmp_path, redis_url)
    stream = Stream(redis_url, settings.store.stream)
    bodies = [make_turn(f"t{n}") for n in range(1, 10)]
    bodies[4] = make_turn("t5", shared_len=-1)  # SQL's check refuses it
    bodies[7] = make_turn("t8", prompt_ids=(2**40,))  # it does not fit in 32 bits
    await stream.send([(Arrival("j1", seq, body), None, None) for seq, body in enumerate(bodies, 1)], 60)
    with Redis.from_url(redis_url) as client:
        client.xadd(settings.store.stream, {"journal": "j1", "seq": 10, "body": b"\x00garbage"})
    await stream.send([(Arrival("j1", 11, make_feedback(turn_id="t1")), None, None)], 60)
    async with recording(settings):
        await until(lambda: has(store, "j1", 11))
    assert await n_turns(store) == 7
    async with store.read() as connection:
        rows = (await connection.execute(select(dead_letters).order_by(dead_letters.c.seq))).all()
    assert [row.seq for row in rows] == [5, 8, 10]
    assert [row.error.split(":")[0] for row in rows] == ["Refused", "Refused", "ValueError"]
    assert rows[2].payload == b"\x00garbage"
    with Redis.from_url(redis_url) as client:
        assert client.xlen(settings.store.stream) == 0
    await stream.close()


async def test_two_recorders_share_the_work_and_double_nothing(tmp_path: Path, store: Store, redis_url: str) -> None:
    settings = settings_for(tmp_path, redis_url)
    stream = Stream(redis_url, settings.store.stream)
    arrivals = [Arrival("j1", seq, make_turn(f"t{seq}")) for seq in range(1, 101)]
    async with recording(settings), recording(settings):
        for arrival in [*arrivals, *arrivals[:50]]:
            await stream.send([(arrival, None, None)], 60)
        await until(lambda: has(store, "j1", 100))
    assert await n_turns(store) == 100
    await stream.close()
