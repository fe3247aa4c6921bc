"""One request answered, whatever wire it came over: session → prompt → engine → text → journal → stream → end.

Each request is a task of its own, so that what was sampled is recorded whatever becomes of its client; the wire reads
its events. A request is a turn from its first token on; one that fails before is only refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from agent_rl.engine import Chunk, Engine, EngineError, EngineRejected, EngineUnavailable, ReleaseNotLoaded
from agent_rl.experience.journal import JournalFull
from agent_rl.experience.shipper import Shipper
from agent_rl.experience.store import Store
from agent_rl.rendering import Renderer
from agent_rl.settings import GatewaySettings
from agent_rl.types import Conversation, Feedback, Finish
from server.answering import Answering, Delta, Ended, Event, Idle, Started
from server.auth import Caller
from server.directory import Directory
from server.identity import is_aside
from server.limits import Limits
from server.metrics import Metrics
from server.prompting import Prompter
from server.recalls import Recalled, Recalls
from server.refusal import Refusal
from server.replays import Replays
from server.sessions import Sessions

SHIP_S = 0.2  # how long an answer's end waits for Redis; the journal has it already
RETRY_S = 0.1
log = logging.getLogger("agent_rl.gateway")
T = TypeVar("T")


class Core:
    """Made once; `answer` for each request, `close` at the end."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        engine: Engine,
        renderer: Renderer,
        directory: Directory,
        sessions: Sessions,
        store: Store,
        shipper: Shipper,
        metrics: Metrics,
    ) -> None:
        self._settings, self._engine, self._renderer, self._directory = settings, engine, renderer, directory
        self._sessions, self._shipper, self._metrics = sessions, shipper, metrics
        self._running: dict[str, Answering] = {}  # by turn id
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._limits = Limits()
        self._replays = Replays()
        self._recalls = Recalls(store)
        self._prompter = Prompter(settings, renderer, directory, sessions)
        self._max_context: int | None = None

    async def answer(self, conversation: Conversation, caller: Caller) -> AsyncGenerator[Event, None]:
        """Started, then Delta and Idle as they come, then Ended. Closing this early is the client hanging up.

        A retry gets what its first try got. Raises Refusal before Started; what goes wrong later is `Ended.failure`.
        """
        key = (caller.tenant.tenant_id, caller.api_key_id, conversation.retry_key)
        known = self._replays.find(key) if conversation.retry else None
        answering = known or self._begin(conversation, caller)
        if known is None and conversation.retry_key:
            self._replays.add(key, answering)
        answering.readers += 1
        at, announced = 0, False
        try:
            while True:
                event = await answering.log.get(at, self._settings.keepalive_s)
                if event is not None:
                    at += 1
                elif not answering.release:
                    continue
                else:
                    event = Idle() if announced else answering.started()
                if isinstance(event, Refusal):
                    raise event
                if isinstance(event, Ended) and event.failure and not announced:
                    raise event.failure
                if isinstance(event, Started):
                    if announced:
                        continue
                    announced = answering.announced = True
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            answering.readers -= 1
            if answering.readers == 0 and not answering.over:
                answering.hang_up(self._tasks[answering.turn_id])

    def _begin(self, conversation: Conversation, caller: Caller) -> Answering:
        if len(self._tasks) >= self._settings.max_concurrency:
            raise Refusal(429, f"{len(self._tasks)} requests are being answered, the limit here", retry_after_s=1)
        allowance = self._limits.enter(caller)
        side = conversation.side or is_aside(conversation)
        answering = Answering(
            replace(conversation, side=side), caller, new_turn_id(), time.time(), time.monotonic(), allowance
        )
        task = self._tasks[answering.turn_id] = asyncio.create_task(self._run(answering))
        self._running[answering.turn_id] = answering
        task.add_done_callback(lambda _: self._over(answering))
        return answering

    def _over(self, answering: Answering) -> None:
        answering.over = True
        self._limits.leave(answering.caller)
        del self._tasks[answering.turn_id], self._running[answering.turn_id]

    async def count_tokens(self, conversation: Conversation, caller: Caller) -> int:
        """Length of the prompt that `answer` would render for a conversation that is new. Raises Refusal."""
        return await self._prompter.count(conversation, caller)

    async def recall(self, turn_id: str, caller: Caller) -> Recalled:
        """A turn of the caller's own key, answer included, just answered ones too. Raises Refusal (404, 503)."""
        return await self._recalls.find(turn_id, caller)

    def forget(self, session_ids: Collection[str]) -> None:
        """Nothing of these sessions is kept in memory any more."""
        self._sessions.forget(session_ids)
        self._replays.forget(session_ids)
        self._recalls.forget(session_ids)

    def token_text(self, token: int) -> str:
        return self._renderer.decode((token,))

    async def tell(self, feedback: Feedback) -> None:
        """Returns when it is on disk. Raises Refusal."""
        try:
            arrival = await self._shipper.append(feedback)
        except JournalFull as error:
            raise _disk_full(error) from error
        await self._shipper.sent(arrival, SHIP_S)

    async def close(self) -> None:
        """End what is running as if its clients had hung up; returns when all of it is recorded."""
        for turn_id, answering in list(self._running.items()):
            answering.hang_up(self._tasks[turn_id])
        await asyncio.gather(*self._tasks.values())

    async def _run(self, answering: Answering) -> None:
        """From the request to its recorded end; whatever happens, one last event goes out."""
        event: Ended | Refusal
        try:
            with self._metrics.answering():
                await self._prompter.prepare(answering, await self._context())
                event = await self._record(answering, *await self._sample(answering))
        except Refusal as refusal:
            event = refusal
        except Exception:
            log.exception("turn %s failed", answering.turn_id)
            event = Refusal(500, f"internal error; the log has it under turn {answering.turn_id}", code="internal")
        if isinstance(event, Refusal):
            answering.failed = True
            event = answering.ended(Finish.ERROR, event) if answering.announced else event
        else:
            answering.failed = event.failure is not None
        answering.over = True
        answering.log.put(event)

    # ------------------------------------------------------------------------------------------------ the answer

    async def _sample(self, answering: Answering) -> tuple[Finish, Refusal | None]:
        """Sample to the end, or to what ends it. Raises Refusal where that is before the first token."""
        if answering.abandoned:
            raise _gone()
        answering.sampling = True
        failure: Refusal | None = None
        try:
            async with asyncio.timeout(self._settings.request_timeout_s), aclosing(self._chunks(answering)) as chunks:
                finish = await self._read(answering, chunks)
        except asyncio.CancelledError:
            if not answering.survives():
                raise
            finish, failure = Finish.ABORTED, _gone()
        except TimeoutError:
            seconds = self._settings.request_timeout_s
            finish, failure = Finish.ABORTED, Refusal(504, f"the answer took longer than {seconds:.0f} s")
        except EngineError as error:
            finish, failure = Finish.ERROR, _engine_refusal(error)
        finally:
            answering.sampling = False
        if failure and not answering.response_ids:
            raise failure
        return finish, failure

    async def _read(self, answering: Answering, chunks: AsyncGenerator[Chunk, None]) -> Finish:
        """Pass on what is sampled. Raises EngineError where the engine ends an answer that was not finished."""
        parser, log = answering.parser, answering.log
        assert parser is not None
        async for chunk in chunks:
            if answering.first_token_s is None:
                answering.first_token_s = time.monotonic() - answering.began
                log.put(answering.started())
            answering.chunks.append(chunk)
            parsed = parser.push(chunk.ids)
            if parsed.reasoning and not parsed.text:
                answering.reasoning_tokens += len(chunk.ids)
            log.put(Delta(parsed, chunk.ids, chunk.logprobs))
            if parser.stopped:
                answering.stop = parser.stop_string
                return Finish.STOP
            if chunk.finish in (Finish.ABORTED, Finish.ERROR):
                raise EngineError("the engine gave this answer up")
            if chunk.finish:
                return chunk.finish
        raise EngineError("the engine's stream ended before the answer did")

    async def _chunks(self, answering: Answering) -> AsyncGenerator[Chunk, None]:
        """The engine's stream; until it begins, a restarting engine or one without this release yet is waited for."""
        assert answering.policy is not None
        assert answering.place is not None
        deadline = time.monotonic() + self._settings.adapter_wait_s
        while True:
            stream = self._engine.stream(
                answering.past + answering.prompt_ids,
                answering.conversation.sampling,
                rid=answering.turn_id,
                release=answering.release,
                stop_ids=self._renderer.stop_ids,
                extra_key=answering.caller.tenant.tenant_id,
            )
            try:
                async with aclosing(stream):
                    async for chunk in stream:
                        yield chunk
                return
            except (EngineUnavailable, ReleaseNotLoaded):
                if answering.chunks or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_S)
            if not answering.announced:
                policy_id, session_id = answering.policy.policy_id, answering.place.session_id
                answering.release = await self._directory.release(policy_id, session_id)

    async def _context(self) -> int:
        """The engine's longest context, asked once."""
        if self._max_context is None:
            self._max_context = (await self._patiently(self._engine.info)).max_context
        return self._max_context

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """The engine's answer, a restart of it waited for. Raises Refusal."""
        deadline = time.monotonic() + self._settings.adapter_wait_s
        while True:
            try:
                return await call()
            except EngineError as error:
                if not isinstance(error, EngineUnavailable) or time.monotonic() > deadline:
                    raise _engine_refusal(error) from error
            await asyncio.sleep(RETRY_S)

    # --------------------------------------------------------------------------------------------------- the end

    async def _record(self, answering: Answering, finish: Finish, failure: Refusal | None) -> Ended:
        """The turn on disk, then given a moment to reach Redis. Raises Refusal where the disk is full."""
        assert answering.parser is not None
        assert answering.place is not None
        if rest := answering.parser.finish():
            answering.log.put(Delta(rest, (), ()))
        if finish is Finish.STOP and answering.parser.answer().tool_calls:
            finish = Finish.TOOL_CALLS
        turn = answering.turn(finish, time.monotonic() - answering.began)
        self._metrics.ended(turn)
        head = None if failure else answering.head(turn)
        if answering.kept:
            try:
                arrival = await self._shipper.append(turn, head, answering.place.scope)
            except JournalFull as error:
                raise _disk_full(error) from error
            self._recalls.remember(Recalled(answering.conversation.messages, turn))
        if head:
            self._sessions.remember(head)
        if answering.kept:
            await self._shipper.sent(arrival, SHIP_S)
        return answering.ended(finish, failure)


def new_turn_id() -> str:
    """32 hex digits that sort by time."""
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def _gone() -> Refusal:
    return Refusal(499, "the client has gone", code="client_gone")


def _disk_full(error: JournalFull) -> Refusal:
    return Refusal(503, f"nothing can be recorded, so nothing is answered: {error}", code="disk_full", retry_after_s=10)


def _engine_refusal(error: EngineError) -> Refusal:
    if isinstance(error, EngineRejected):
        return Refusal(400, f"the engine refuses this request: {error}", code="invalid_value")
    if isinstance(error, ReleaseNotLoaded | EngineUnavailable):
        return Refusal(503, f"the engine is not ready: {error}", code="engine_unavailable", retry_after_s=2)
    return Refusal(502, f"the engine failed: {error}", code="engine_error")
