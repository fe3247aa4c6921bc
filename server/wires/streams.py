"""The core's events over HTTP: begun before the headers go out, ended when the client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request

from server.answering import Delta, Ended, Event, Started
from server.refusal import Refusal

T = TypeVar("T")
Events = AsyncGenerator[Event, None]


async def start(answers: Sequence[Events]) -> list[Started]:
    """The first event of each. Raises Refusal where one is refused; then all are closed."""
    firsts = await asyncio.gather(*(anext(events) for events in answers), return_exceptions=True)
    failures = [first for first in firsts if isinstance(first, BaseException)]
    if failures:
        for events in answers:
            await events.aclose()
        raise failures[0]
    return [first for first in firsts if isinstance(first, Started)]


async def merged(answers: Sequence[Events]) -> AsyncGenerator[tuple[int, Event], None]:
    """(which answer, its next event) as they come, until all have ended. Closing this closes all."""
    waiting: dict[asyncio.Future[Event], int] = {}
    try:
        if len(answers) == 1:  # no task for each token
            async for event in answers[0]:
                yield 0, event
            return
        waiting = {asyncio.ensure_future(anext(events)): at for at, events in enumerate(answers)}
        while waiting:
            for future in (await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))[0]:
                at, event = waiting.pop(future), future.result()
                yield at, event
                if not isinstance(event, Ended):
                    waiting[asyncio.ensure_future(anext(answers[at]))] = at
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for events in answers:
            await events.aclose()


async def whole(answers: Sequence[Events]) -> list[tuple[list[Delta], Ended]]:
    """All that came of each, when all have ended. Raises Refusal where one failed."""
    deltas: list[list[Delta]] = [[] for _ in answers]
    ends: dict[int, Ended] = {}
    async with aclosing(merged(answers)) as events:
        async for at, event in events:
            if isinstance(event, Delta):
                deltas[at].append(event)
            elif isinstance(event, Ended):
                if event.failure:
                    raise event.failure
                ends[at] = event
    return [(deltas[at], ends[at]) for at in range(len(answers))]


async def while_connected(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """What `answer` returns, unless the client hangs up first: then it is cancelled. Raises Refusal (499)."""
    task, gone = asyncio.create_task(answer), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client has gone", code="client_gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def turn_headers(started: Started) -> dict[str, str]:
    """What every answer says of its turn, whatever the wire."""
    return {
        "x-session-id": started.session_id,
        "x-session-rule": started.rule,
        "x-turn-id": started.turn_id,
        "x-policy-version": started.release,
        "cache-control": "no-store",
        **started.allowance,
    }
