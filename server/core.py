"""One request answered, whatever wire it came over: session → prompt → engine → text → journal → stream → end.

Each request is a task of its own, so that what was sampled is recorded whatever becomes of its client; the wire reads
its events. A request is a turn from its first token on; one that fails before is only refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from agent_rl.engine import Chunk, Engine, EngineError, EngineRejected, EngineUnavailable, ReleaseNotLoaded
from agent_rl.experience.journal import JournalFull
from agent_rl.experience.shipper import Shipper
from agent_rl.rendering import Renderer, RenderError
from agent_rl.settings import GatewaySettings
from agent_rl.types import Conversation, Feedback, Finish
from server.answering import Answering, Delta, Ended, Event, Idle, Started
from server.auth import Caller
from server.directory import Directory
from server.metrics import Metrics
from server.refusal import Refusal
from server.sessions import Place, Sessions

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
        shipper: Shipper,
        metrics: Metrics,
    ) -> None:
        self._settings, self._engine, self._renderer, self._directory = settings, engine, renderer, directory
        self._sessions, self._shipper, self._metrics = sessions, shipper, metrics
        self._running: dict[asyncio.Task[None], Answering] = {}
        self._max_context: int | None = None

    async def answer(self, conversation: Conversation, caller: Caller) -> AsyncGenerator[Event, None]:
        """Started, then Delta and Idle as they come, then Ended. Closing this early is the client hanging up.

        Raises Refusal before Started; what goes wrong later is `Ended.failure`.
        """
        if len(self._running) >= self._settings.max_concurrency:
            raise Refusal(429, f"{len(self._running)} requests are being answered, the limit here", retry_after_s=1)
        answering = Answering(conversation, caller, new_turn_id(), time.time(), time.monotonic())
        task = asyncio.create_task(self._run(answering))
        self._running[task] = answering
        task.add_done_callback(self._running.pop)
        try:
            while True:
                event = await self._next(answering)
                if isinstance(event, Refusal):
                    raise event
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            answering.hang_up(task)

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
        for task, answering in list(self._running.items()):
            answering.hang_up(task)
        await asyncio.gather(*self._running)

    async def _next(self, answering: Answering) -> Event | Refusal:
        """The next event, or Idle; a silent start is announced as soon as there is something to say."""
        while True:
            try:
                async with asyncio.timeout(self._settings.keepalive_s):
                    event = await answering.outbox.get()
            except TimeoutError:
                if not answering.release:
                    continue
                event = Idle() if answering.announced else answering.started()
            if not isinstance(event, Started):
                return event
            if not answering.announced:
                answering.announced = True
                return event

    async def _run(self, answering: Answering) -> None:
        """From the request to its recorded end; whatever happens, one last event goes out."""
        event: Ended | Refusal
        try:
            with self._metrics.answering():
                await self._prepare(answering)
                event = await self._record(answering, *await self._sample(answering))
        except Refusal as refusal:
            event = refusal
        except Exception:
            log.exception("turn %s failed", answering.turn_id)
            event = Refusal(500, f"internal error; the log has it under turn {answering.turn_id}", code="internal")
        if isinstance(event, Refusal) and answering.announced:
            event = Ended(Finish.ERROR, answering.prompt_tokens, len(answering.response_ids), event)
        answering.outbox.put_nowait(event)

    # ------------------------------------------------------------------------------------------------ the prompt

    async def _prepare(self, answering: Answering) -> None:
        conversation, caller = answering.conversation, answering.caller
        policy = await self._directory.policy(caller.tenant.tenant_id, conversation.policy)
        place = await self._sessions.place(conversation, caller.tenant, caller.api_key_id, policy.policy_id)
        try:
            answering.place, answering.past, answering.prompt_ids = self._prompt(conversation, place)
        except RenderError as error:
            raise Refusal(400, str(error), code="invalid_value", param="messages") from error
        room = await self._room(answering.prompt_tokens)
        sampling = replace(conversation.sampling, max_tokens=min(conversation.sampling.max_tokens, room))
        answering.conversation = replace(conversation, sampling=sampling)
        answering.policy, answering.parser = policy, self._renderer.parser(sampling.stop)
        answering.release = await self._directory.release(policy.policy_id, place.session_id)

    def _prompt(self, conversation: Conversation, place: Place) -> tuple[Place, tuple[int, ...], tuple[int, ...]]:
        """(place, ids shared with the parent, ids behind them): the sampled ids of the parent, extended; else
        everything rendered, sharing what happens to be equal."""
        parent = place.parent
        if parent is None:
            return place, (), self._renderer.render(conversation.messages, conversation.tools)
        tail = self._renderer.bridge(parent.ids, conversation.messages[parent.n_messages :], conversation.tools)
        if tail is not None:
            return place, parent.ids, tail
        ids = self._renderer.render(conversation.messages, conversation.tools)
        shared = common_prefix(parent.ids, ids)
        return replace(place, fork_reason="no_bridge"), ids[:shared], ids[shared:]

    async def _room(self, prompt_tokens: int) -> int:
        """Tokens left for the answer. Raises Refusal where the prompt is too long."""
        if self._max_context is None:
            self._max_context = (await self._patiently(self._engine.info)).max_context
        limit = min(self._settings.max_prompt_tokens, self._max_context - 1)
        if prompt_tokens > limit:
            raise Refusal(
                400,
                f"the prompt is {prompt_tokens} tokens long; the limit is {limit} (a context of {self._max_context})",
                code="context_length_exceeded",
                param="messages",
            )
        return self._max_context - prompt_tokens

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
        parser, outbox = answering.parser, answering.outbox
        assert parser is not None
        async for chunk in chunks:
            if answering.first_token_s is None:
                answering.first_token_s = time.monotonic() - answering.began
                outbox.put_nowait(answering.started())
            answering.chunks.append(chunk)
            text = parser.push(chunk.ids)
            answering.text.append(text)
            outbox.put_nowait(Delta(text, chunk.ids, chunk.logprobs))
            if parser.stopped:
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
            answering.text.append(rest)
            answering.outbox.put_nowait(Delta(rest, (), ()))
        turn = answering.turn(finish, time.monotonic() - answering.began)
        self._metrics.ended(turn)
        head = None if failure else answering.head(turn)
        try:
            arrival = await self._shipper.append(turn, head, answering.place.scope)
        except JournalFull as error:
            raise _disk_full(error) from error
        if head:
            self._sessions.remember(head)
        await self._shipper.sent(arrival, SHIP_S)
        return Ended(finish, answering.prompt_tokens, len(turn.response_ids), failure)


def new_turn_id() -> str:
    """32 hex digits that sort by time."""
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
