"""The recorder: the stream's reader. Receive, write in one transaction, acknowledge; neither side's absence ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from agent_rl.experience import deletion
from agent_rl.experience.codec import decode
from agent_rl.experience.store import Refused, Store, StoreUnavailable
from agent_rl.experience.stream import Delivery, Stream, StreamUnavailable
from agent_rl.settings import Settings
from agent_rl.types import Arrival

log = logging.getLogger("agent_rl.recorder")

BLOCK_S = 0.5  # how long one look at the stream waits; `stop` is heard that often
LONGEST_PAUSE_S = 5.0
SWEEP_S = 60.0  # between two looks for sessions that have been kept long enough
T = TypeVar("T")


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Until `stop`. Raises RuntimeError if the schema is not the one that this code knows."""
    stream = Stream(settings.redis_url, settings.store.stream)
    store: Store | None = None
    try:
        store = await persist(lambda: Store.open(settings.database_url), stop)
        sweep_at = 0.0
        while store is not None and not stop.is_set():
            await step(store, stream, settings.store.recorder_batch, stop)
            if time.monotonic() >= sweep_at:
                n_swept = await persist(partial(deletion.sweep, store, stream), stop)
                sweep_at = time.monotonic() + (0.0 if n_swept == deletion.SWEPT else SWEEP_S)
    finally:
        await stream.close()
        if store is not None:
            await store.close()


async def step(store: Store, stream: Stream, n: int, stop: asyncio.Event) -> None:
    """One batch from the stream into SQL. What was not acknowledged at a stop comes again."""
    deliveries = await persist(lambda: stream.receive(n, BLOCK_S), stop)
    if not deliveries:
        return
    watermarks = await persist(lambda: record(store, deliveries), stop)
    if watermarks is not None:
        entry_ids = [delivery.entry_id for delivery in deliveries]
        await persist(lambda: stream.acknowledge(entry_ids, watermarks), stop)


async def record(store: Store, deliveries: Sequence[Delivery]) -> dict[str, int]:
    """Write a batch; what cannot be read or written is kept as a dead letter. Returns journal id → new watermark."""
    readable: list[tuple[Delivery, Arrival]] = []
    watermarks: dict[str, int] = {}
    for delivery in deliveries:
        try:
            readable.append((delivery, Arrival(delivery.journal_id, delivery.seq, decode(delivery.body))))
        except ValueError as error:
            watermarks |= await bury(store, delivery, error)
    return watermarks | await write(store, readable)


async def write(store: Store, batch: Sequence[tuple[Delivery, Arrival]]) -> dict[str, int]:
    """A batch that SQL refuses is split until the record that it refuses is alone."""
    if not batch:
        return {}
    try:
        return await store.record([arrival for _, arrival in batch])
    except Refused as error:
        if len(batch) == 1:
            return await bury(store, batch[0][0], error)
    half = len(batch) // 2
    return await write(store, batch[:half]) | await write(store, batch[half:])


async def bury(store: Store, delivery: Delivery, error: Exception) -> dict[str, int]:
    log.error("record %d of journal %s is a dead letter: %s", delivery.seq, delivery.journal_id, error)
    return await store.bury(delivery.journal_id, delivery.seq, delivery.body, f"{type(error).__name__}: {error}")


async def persist(attempt: Callable[[], Awaitable[T]], stop: asyncio.Event) -> T | None:
    """Try until it works, ever less often; None at a stop."""
    pause = 0.05
    while not stop.is_set():
        try:
            return await attempt()
        except (StoreUnavailable, StreamUnavailable) as error:
            log.warning("%s; trying again in %.1f s", error, pause)
        try:
            async with asyncio.timeout(pause):
                await stop.wait()
        except TimeoutError:
            pause = min(2 * pause, LONGEST_PAUSE_S)
    return None
