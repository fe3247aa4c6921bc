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
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from agent_rl.settings import GatewaySettings
from agent_rl.types import Conversation, Json, Message
from server.answering import Delta, Ended, Idle, Started
from server.auth import Caller, Door
from server.core import Core
from server.refusal import Refusal, openai_error
from server.wires.request import json_object, string
from server.wires.responses_events import Builder, items_of, response_body, response_id, status_of, turn_id_of
from server.wires.responses_request import Asked, messages_of, parse
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
        answers = [core.answer(asked.behind(past), caller)]
        started = (await while_connected(request, start(answers)))[0]
        headers = turn_headers(started) | ({"x-tools-left-out": ", ".join(asked.left_out)} if asked.left_out else {})
        if asked.stream:
            return StreamingResponse(_sent(answers[0], started, asked), headers=headers, media_type="text/event-stream")
        ended = (await while_connected(request, whole(answers)))[0][1]
        output = items_of(started.turn_id, ended.answer, asked.custom, asked.encrypted)
        return _json(response_body(started, asked, status_of(ended.finish), output, ended), headers)

    async def again(request: Request) -> Response:
        known = await core.recall(turn_id_of(request.path_params["response_id"]), await door.caller(request, "agent"))
        turn = known.turn
        body = {
            "id": response_id(turn.turn_id),
            "object": "response",
            "created_at": int(turn.created_at),
            "status": status_of(turn.finish),
            "model": turn.policy_id,
            "output": items_of(turn.turn_id, turn.answer, frozenset()),
        }
        return _json(body)

    async def inputs(request: Request) -> Response:
        known = await core.recall(turn_id_of(request.path_params["response_id"]), await door.caller(request, "agent"))
        data = [item for at, message in enumerate(known.messages) for item in _input_items(message, at)]
        return _json({"object": "list", "data": data, "has_more": False})

    async def connected(socket: WebSocket) -> None:
        try:
            caller = await door.caller(socket, "agent")
        except Refusal as refusal:
            await socket.send_denial_response(openai_error(refusal))
            return
        await socket.accept()
        await _Connection(core, caller, settings, socket).serve()

    return [
        Route("/v1/responses", respond, methods=["POST"]),
        WebSocketRoute("/v1/responses", connected),
        Route("/v1/responses/{response_id}", again),
        Route("/v1/responses/{response_id}/input_items", inputs),
    ]


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


async def _events(answer: Events, started: Started, asked: Asked) -> AsyncGenerator[list[Json] | None, None]:
    """Typed events as they come, several at once; None for a while of silence."""
    builder = Builder(started, asked)
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


async def _sent(answer: Events, started: Started, asked: Asked) -> AsyncIterator[bytes]:
    """As server-sent events."""
    async with aclosing(_events(answer, started, asked)) as batches:
        async for batch in batches:
            yield KEEP_ALIVE if batch is None else b"".join(map(_line, batch))


def _line(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def _json(body: Json, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


def _input_items(message: Message, at: int) -> list[Json]:
    if message.role == "tool":
        return [{"type": "function_call_output", "call_id": message.tool_call_id, "output": message.content}]
    if message.role == "assistant":
        return items_of(f"in_{at}", message, frozenset())
    content = [{"type": "input_text", "text": message.content}]
    return [{"id": f"msg_in_{at}", "type": "message", "role": message.role, "content": content}]


@dataclass
class _Connection:
    """One WebSocket: a response at a time, and those that it may go back to."""

    core: Core
    caller: Caller
    settings: GatewaySettings
    socket: WebSocket
    known: OrderedDict[str, Past] = field(default_factory=OrderedDict)
    running: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Until the client goes."""
        try:
            while True:
                await self._frame(await self.socket.receive_text())
        except WebSocketDisconnect:
            return
        finally:
            if self.running:
                self.running.cancel()
                await asyncio.gather(self.running, return_exceptions=True)

    async def _frame(self, text: str) -> None:
        """A frame that cannot be used is told so; the connection stays."""
        try:
            frame = json_object(text.encode())
            kind = frame.pop("type", None)
            if kind == "response.cancel":
                if self.running:
                    self.running.cancel()
            elif kind != "response.create":
                raise Refusal(400, f"frames are response.create or response.cancel, not {kind!r:.80}", param="type")
            elif self.running and not self.running.done():
                raise Refusal(409, "a response is being made on this connection; wait for its end", code="busy")
            else:
                body = frame.get("response") if isinstance(frame.get("response"), dict) else frame
                self.running = asyncio.create_task(self._respond(body or frame, text.encode()))
        except Refusal as refusal:
            await self._tell(refusal)

    async def _respond(self, body: Json, raw: bytes) -> None:
        try:
            past, session = await _past(self.core, self.caller, body, self.known)
            asked = parse(body, raw, self.socket.headers, self.settings.default_max_tokens, session)
            conversation = asked.behind(past)
            answer = self.core.answer(conversation, self.caller)
            started = (await start([answer]))[0]
            async with aclosing(_events(answer, started, asked)) as batches:
                async for batch in batches:
                    for event in batch or []:
                        self._remember(conversation, started, event)
                        await self.socket.send_text(orjson.dumps(event).decode())
        except Refusal as refusal:
            await self._tell(refusal)
        except (WebSocketDisconnect, RuntimeError) as gone:  # the client went while it was being answered
            log.info("a WebSocket closed before its response ended: %r", gone)

    def _remember(self, conversation: Conversation, started: Started, event: Json) -> None:
        response: Any = event.get("response")
        if event["type"] not in ("response.completed", "response.incomplete"):
            return
        answer = messages_of(response["output"])
        self.known[response["id"]] = ((*conversation.messages, *answer), started.session_id)
        while len(self.known) > LOCAL:
            self.known.popitem(last=False)

    async def _tell(self, refusal: Refusal) -> None:
        error = {"code": refusal.code, "message": refusal.message, "param": refusal.param}
        body = {"type": "error", "status": refusal.status, "error": error, **error}
        await self.socket.send_text(orjson.dumps(body).decode())
