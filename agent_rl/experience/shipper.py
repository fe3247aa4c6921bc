"""From journal to stream: the gateway's background task. It keeps a cursor; the journal is the buffer."""

from __future__ import annotations

import asyncio
import logging
from itertools import islice

from agent_rl.experience.journal import Journal
from agent_rl.experience.stream import Head, Stream, StreamForgot, StreamUnavailable
from agent_rl.types import Arrival, Feedback, Turn

log = logging.getLogger("agent_rl.gateway")

BATCH = 128  # records in one MULTI
HEADS = 1024  # heads that wait to be sent; beyond, a conversation is found in SQL instead
IDLE_S = 1.0  # how often progress is looked up when there is nothing to send
LONGEST_PAUSE_S = 5.0


class Shipper:
    """Sends what the journal has and SQL does not, in order; `run` it beside the gateway.

    On start, and when Redis has forgotten something, everything above the watermark is sent again: the recorder knows
    what it has seen.
    """

    def __init__(self, journal: Journal, stream: Stream, *, head_ttl_s: float) -> None:
        self._journal, self._stream, self._head_ttl_s = journal, stream, head_ttl_s
        self._heads: dict[str, tuple[Head, str]] = {}  # by turn id
        self._started = False  # False: what Redis has been sent is not known
        self._cursor = 0  # the last seq sent
        self._watermark = 0
        self._news = asyncio.Event()
        self._sent = asyncio.Condition()

    @property
    def behind(self) -> int:
        """Records that are in the journal and not in Redis."""
        return self._journal.last_seq - self._cursor

    async def append(self, body: Turn | Feedback, head: Head | None = None, scope: str = "") -> Arrival:
        """Into the journal, and from there on its way to Redis together with its head (found by `scope` and chain).

        Returns when the record is synced. Raises JournalFull, having written nothing.
        """
        if head is not None:
            self._heads[head.turn_id] = (head, scope)
            while len(self._heads) > HEADS:
                del self._heads[next(iter(self._heads))]
        try:
            arrival = await self._journal.append(body)
        except OSError:
            if head is not None:
                self._heads.pop(head.turn_id, None)
            raise
        self._news.set()
        return arrival

    async def sent(self, arrival: Arrival, timeout_s: float) -> bool:
        """Wait until Redis has the record; False if it does not within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._sent:
                await self._sent.wait_for(lambda: self._cursor >= arrival.seq)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Until cancelled. Redis may come and go."""
        pause, task = 0.05, asyncio.current_task()
        assert task is not None
        while not task.cancelling():  # asked, since redis-py can swallow a cancellation that meets an answer
            try:
                if not await self._step() and not task.cancelling():
                    await self._wait()
                pause = 0.05
            except StreamForgot as forgot:
                log.warning("%s; sending again what SQL does not have", forgot)
                self._started = False
            except StreamUnavailable as error:
                log.warning("%s; %d records wait in the journal", error, self.behind)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _step(self) -> bool:
        """Look, trim, send one batch. False if there was nothing to send."""
        await self._look()
        self._news.clear()
        batch = await asyncio.to_thread(lambda: list(islice(self._journal.replay(self._cursor), BATCH)))
        if not batch:
            return False
        items = [(arrival, *self._head_of(arrival)) for arrival in batch]
        await self._stream.send(items, self._head_ttl_s, after=self._cursor if self._started else None)
        self._started = True
        for _, head, _ in items:
            if head is not None:
                self._heads.pop(head.turn_id, None)
        async with self._sent:
            self._cursor = batch[-1].seq
            self._sent.notify_all()
        return True

    def _head_of(self, arrival: Arrival) -> tuple[Head, str] | tuple[None, None]:
        if not isinstance(arrival.body, Turn):
            return None, None
        return self._heads.get(arrival.body.turn_id, (None, None))

    async def _look(self) -> None:
        """Learn how far SQL has come, and whether Redis still has what it was sent."""
        sent, watermark = await self._stream.progress(self._journal.journal_id)
        self._watermark = max(self._watermark, watermark or 0)
        self._journal.trim(self._watermark)
        if not self._started:
            self._cursor = self._watermark
        elif sent != self._cursor:
            raise StreamForgot(self._journal.journal_id, self._cursor, sent)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(IDLE_S):
                await self._news.wait()
        except TimeoutError:
            return
