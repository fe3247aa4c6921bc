"""The requests that this gateway answers for agents' sockets; they outlive the socket that brought them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from starlette.types import Scope

from agent_rl.experience.outbox import ALIVE_S, Outbox, Put
from agent_rl.experience.stream import StreamUnavailable
from server.refusal import Refusal
from server.wires.socket_call import Call, answer, failed_end

ROUND_S = 1.0
ROOM_S = 0.05  # between two looks for room in a full outbox
CLOSE_S = 3.0
log = logging.getLogger("agent_rl.gateway")


class _Unwritable(Exception):
    """The outbox does not take this answer any more."""


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[None]
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)


class Calls:
    """Made once; `run` beside everything, `close` at the end."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox, self._closing = outbox, False
        self._running: dict[tuple[str, str], _Running] = {}  # by connection and request id

    async def begin(self, connection: str, call: Call, outer: Scope, secret: str | None) -> Put:
        """NEW: its answer goes to the outbox from now on; otherwise why not. Raises StreamUnavailable."""
        began = await self._outbox.begin(connection, call.request_id)
        if began is Put.NEW:
            hung_up, key = asyncio.Event(), (connection, call.request_id)
            task = asyncio.create_task(self._answer(connection, call, outer, secret, hung_up))
            self._running[key] = _Running(task, hung_up)
            task.add_done_callback(lambda _: self._running.pop(key))
        return began

    def hang_up(self, connection: str, request_id: str) -> None:
        """Its client has gone. Nothing where another gateway answers it, or nobody does."""
        if running := self._running.get((connection, request_id)):
            running.hung_up.set()

    async def run(self) -> None:
        """Say that this gateway lives; hang up what nobody waits for."""
        while not self._closing:
            try:
                async with asyncio.timeout(ALIVE_S):
                    await self._outbox.alive()
                    there = await self._outbox.attended(sorted({connection for connection, _ in self._running}))
                for (connection, request_id), running in self._running.items():
                    if connection not in there and not running.hung_up.is_set():
                        log.info("request %s is given up: its agent did not come back", request_id)
                        running.hung_up.set()
            except (StreamUnavailable, TimeoutError) as error:
                log.warning("outboxes: %s", error)
            await asyncio.sleep(ROUND_S)

    async def close(self) -> None:
        """Hang up everything; returns when all of it has ended, or could not say so in time."""
        self._closing = True
        tasks = [running.task for running in self._running.values()]
        for running in self._running.values():
            running.hung_up.set()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _answer(
        self, connection: str, call: Call, outer: Scope, secret: str | None, hung_up: asyncio.Event
    ) -> None:
        part, ended = 0, False

        async def put(frame: bytes, last: bool) -> None:
            nonlocal part, ended
            part, ended = part + 1, ended or last
            await self._put(connection, call.request_id, part, frame, last, hung_up)

        try:
            await answer(call, outer, secret, hung_up, put)
        except _Unwritable:
            return
        except Exception:  # the app has answered 500 if it still could
            log.exception("request %s of an agent's socket failed", call.request_id)
        if not ended:
            refusal = Refusal(502, "the answer was cut", code="cut")
            try:
                await put(failed_end(call.request_id, refusal), True)
            except _Unwritable:
                return

    async def _put(
        self, connection: str, request_id: str, part: int, frame: bytes, last: bool, hung_up: asyncio.Event
    ) -> None:
        """Stored, however long Redis is away or the outbox full; a hang-up ends the wait, but for the last frame."""
        while True:
            try:
                put = await self._outbox.append(connection, request_id, part, frame, last=last)
            except StreamUnavailable:
                put = Put.FULL
            if put in (Put.NEW, Put.KNOWN):
                return
            if put is Put.GONE or (hung_up.is_set() and not last):
                raise _Unwritable
            await asyncio.sleep(ROOM_S)
