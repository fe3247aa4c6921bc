"""OpenAI's responses: over HTTP, streaming or not, and over a WebSocket.

    POST /v1/responses                       a response
    GET  /v1/responses                       upgraded: `{"type": "response.create", …}` frames in, one event a frame out
    GET  /v1/responses/{id}[/input_items]    a stored one again

`previous_response_id` is looked up within the tenant; on a WebSocket first among the answers of this connection, where
`store: false` ones are found too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from agent_rl.settings import GatewaySettings
from agent_rl.types import Conversation, Json, Message, Turn
from server.answering import Delta, Ended, Idle, Started
from server.auth import Caller, Door
from server.core import Core, new_turn_id
from server.refusal import Refusal, bad_field, openai_error
from server.wires.request import json_object, string
from server.wires.responses_events import Builder, items_of, response_body, response_id, status_of, turn_id_of
from server.wires.responses_request import Asked, ToolNames, is_custom, parse
from server.wires.streams import Events, merged, start, turn_headers, while_connected, whole

KEEP_ALIVE = b": keep-alive\n\n"
LOCAL = 64  # answers that a WebSocket can go back to
log = logging.getLogger("agent_rl.gateway")
Past = tuple[tuple[Message, ...], str | None]  # (messages, the answer included; the session as the client knows it)


def routes(core: Core, door: Door, settings: GatewaySettings) -> list[BaseRoute]:
    async def respond(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        raw = await door.body(request)
        body = json_object(raw)
        past, session = await _past(core, caller, body, {})
        asked = parse(body, raw, request.headers, settings.default_max_tokens, session)
        if not asked.generate:
            raise bad_field("generate", "only a WebSocket can be warmed up", "unsupported_value")
        answers = [core.answer(asked.behind(past), caller)]
        started = (await while_connected(request, start(answers)))[0]
        headers = turn_headers(started) | ({"x-tools-left-out": ", ".join(asked.left_out)} if asked.left_out else {})
        if asked.stream:
            stream = _sent(answers[0], Builder(started, asked))
            return StreamingResponse(stream, headers=headers, media_type="text/event-stream")
        ended = (await while_connected(request, whole(answers)))[0][1]
        return _json(_whole(started, asked, ended), headers)

    async def again(request: Request) -> Response:
        known = await core.recall(turn_id_of(request.path_params["response_id"]), await door.caller(request, "agent"))
        return _json(_stored(known.turn))

    async def inputs(request: Request) -> Response:
        known = await core.recall(turn_id_of(request.path_params["response_id"]), await door.caller(request, "agent"))
        names = _names(known.turn)
        data = [item for at, message in enumerate(known.messages) for item in _input_items(message, at, names)]
        return _json({"object": "list", "data": data, "has_more": False})

    async def connected(socket: WebSocket) -> None:
        try:
            await door.caller(socket, "agent")
        except Refusal as refusal:
            await socket.send_denial_response(openai_error(refusal))
            return
        await socket.accept()
        await _Connection(core, door, settings, socket).serve()

    return [
        Route("/v1/responses", respond, methods=["POST"]),
        WebSocketRoute("/v1/responses", connected),
        Route("/v1/responses/{response_id}", again),
        Route("/v1/responses/{response_id}/input_items", inputs),
    ]


def _whole(started: Started, asked: Asked, ended: Ended) -> Json:
    status = status_of(ended.finish)
    output = items_of(started.turn_id, ended.answer, asked.names, status=status, encrypted=asked.encrypted)
    return response_body(started.turn_id, started.created_at, asked, status, output, ended)


def _stored(turn: Turn) -> Json:
    status = status_of(turn.finish)
    return {
        "id": response_id(turn.turn_id),
        "object": "response",
        "created_at": int(turn.created_at),
        "status": status,
        "model": turn.policy_id,
        "output": items_of(turn.turn_id, turn.answer, _names(turn), status=status),
    }


def _names(turn: Turn) -> ToolNames:
    """What a turn tells of its tools' names; those within a namespace keep the flat ones."""
    return ToolNames(frozenset(str(tool["function"]["name"]) for tool in turn.tools if is_custom(tool)))  # type: ignore[index]


async def _past(core: Core, caller: Caller, body: Json, local: Mapping[str, Past]) -> Past:
    """What `previous_response_id` stands for. Raises Refusal (400, previous_response_not_found)."""
    previous = string(body, "previous_response_id")
    if previous is None:
        return (), None
    if previous in local:
        return local[previous]
    try:
        known = await core.recall(turn_id_of(previous), caller)
    except Refusal as refusal:
        if refusal.status != 404:
            raise
        message = f"there is no response {previous!r:.80} that can be gone back to: send its items as input instead"
        raise Refusal(400, message, code="previous_response_not_found", param="previous_response_id") from refusal
    return (*known.messages, known.turn.answer), known.session_id


async def _events(answer: Events, builder: Builder) -> AsyncGenerator[list[Json] | None, None]:
    """Typed events as they come, several at once; None for a while of silence."""
    yield list(builder.begin())
    async with aclosing(merged([answer])) as events:
        async for _, event in events:
            if isinstance(event, Delta):
                if event.parsed:
                    yield list(builder.delta(event))
            elif isinstance(event, Idle):
                yield None
            elif isinstance(event, Ended):
                yield list(builder.end(event))


async def _sent(answer: Events, builder: Builder) -> AsyncIterator[bytes]:
    """As server-sent events."""
    async with aclosing(_events(answer, builder)) as batches:
        async for batch in batches:
            yield KEEP_ALIVE if batch is None else b"".join(map(_line, batch))


def _line(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def _json(body: Json, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


def _input_items(message: Message, at: int, names: ToolNames) -> list[Json]:
    if message.role == "tool":
        return [{"type": "function_call_output", "call_id": message.tool_call_id, "output": message.content}]
    if message.role == "assistant":
        return items_of(f"in_{at}", message, names)
    content = [{"type": "input_text", "text": message.content}]
    return [{"id": f"msg_in_{at}", "type": "message", "role": message.role, "content": content}]


@dataclass
class _Connection:
    """One WebSocket: a response at a time, and those that it may go back to."""

    core: Core
    door: Door
    settings: GatewaySettings
    socket: WebSocket
    known: OrderedDict[str, Past] = field(default_factory=OrderedDict)
    running: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Until the client goes."""
        try:
            while (message := await self.socket.receive())["type"] != "websocket.disconnect":
                await self._frame(message.get("text"))
        except WebSocketDisconnect:
            return
        finally:
            await self._stop()

    async def _frame(self, text: str | None) -> None:
        """A frame that cannot be used is told so; the connection stays."""
        try:
            if text is None:
                raise Refusal(400, "frames are text; this one is binary", code="invalid_json")
            frame = json_object(text.encode())
            kind = frame.pop("type", None)
            if kind == "response.create":
                self._create(frame, text.encode())
            elif kind == "response.cancel":
                await self._cancel()
            else:
                raise Refusal(400, f"frames are response.create or response.cancel, not {kind!r:.80}", param="type")
        except Refusal as refusal:
            await self._tell(refusal)

    def _create(self, frame: Json, raw: bytes) -> None:
        if self._busy:
            raise Refusal(409, "a response is being made on this connection; wait for its end", code="busy")
        body = frame.get("response")
        self.running = asyncio.create_task(self._respond(body if isinstance(body, dict) else frame, raw))

    async def _cancel(self) -> None:
        if not self._busy:
            raise Refusal(409, "no response is being made on this connection", code="nothing_to_cancel")
        await self._stop()
        raise Refusal(499, "the response was cancelled", code="cancelled")

    @property
    def _busy(self) -> bool:
        return self.running is not None and not self.running.done()

    async def _stop(self) -> None:
        if self.running:
            self.running.cancel()
            await asyncio.wait({self.running})

    async def _respond(self, body: Json, raw: bytes) -> None:
        """One response; the key is asked for each, as over HTTP."""
        try:
            caller = await self.door.caller(self.socket, "agent")
            past, session = await _past(self.core, caller, body, self.known)
            asked = parse(body, raw, self.socket.headers, self.settings.default_max_tokens, session)
            conversation = asked.behind(past)
            if asked.generate:
                await self._answer(conversation, asked, caller)
            else:
                await self._warm_up(conversation, asked, session)
        except Refusal as refusal:
            await self._tell(refusal)
        except WebSocketDisconnect:
            log.info("a WebSocket closed before its response ended")
        except Exception:
            log.exception("a response over a WebSocket failed")
            await self._tell(Refusal(500, "internal error; the log has it", code="internal"))

    async def _answer(self, conversation: Conversation, asked: Asked, caller: Caller) -> None:
        answer = self.core.answer(conversation, caller)
        started = (await start([answer]))[0]
        builder = Builder(started, asked)
        async with aclosing(_events(answer, builder)) as batches:
            async for batch in batches:
                if builder.ended and not builder.ended.failure:
                    past = (*conversation.messages, builder.ended.answer)
                    self._remember(started.turn_id, past, started.session_id)
                for event in batch or []:
                    await self._send(event)

    async def _warm_up(self, conversation: Conversation, asked: Asked, session: str | None) -> None:
        """Nothing is sampled and nothing recorded; what was said can be gone on behind."""
        known, now = new_turn_id(), time.time()
        self._remember(known, conversation.messages, session)
        for at, (kind, status) in enumerate((("created", "in_progress"), ("completed", "completed"))):
            body = response_body(known, now, asked, status, [])
            await self._send({"type": f"response.{kind}", "sequence_number": at, "response": body})

    def _remember(self, turn_id: str, past: tuple[Message, ...], session: str | None) -> None:
        self.known[response_id(turn_id)] = (past, session)
        while len(self.known) > LOCAL:
            self.known.popitem(last=False)

    async def _tell(self, refusal: Refusal) -> None:
        error = {"code": refusal.code, "message": refusal.message, "param": refusal.param}
        await self._send({"type": "error", "status": refusal.status, "error": error, **error})

    async def _send(self, event: Json) -> None:
        if self.socket.application_state is WebSocketState.CONNECTED:
            await self.socket.send_text(orjson.dumps(event).decode())
