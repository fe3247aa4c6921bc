"""Anthropic's messages: `POST /v1/messages`, streaming (named server-sent events) or not, and its token count."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from agent_rl.parsing import CallDelta
from agent_rl.settings import GatewaySettings
from agent_rl.types import Finish, Json
from server.answering import Delta, Ended, Idle, Started
from server.auth import Door
from server.core import Core
from server.refusal import anthropic_error_body, request_id
from server.wires.messages_request import parse, tool_input
from server.wires.streams import Events, merged, start, turn_headers, while_connected, whole


def routes(core: Core, door: Door, settings: GatewaySettings) -> list[BaseRoute]:
    async def answer(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        asked = parse(await door.body(request), request.headers, settings.default_max_tokens)
        answers = [core.answer(asked.conversation, caller)]
        started = (await while_connected(request, start(answers)))[0]
        headers = {**turn_headers(started), "request-id": f"req_{started.turn_id}"}
        model = asked.conversation.policy
        if asked.stream:
            events = _Stream(started, model).events(answers[0])
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        ended = (await while_connected(request, whole(answers)))[0][1]
        return _json(_whole(started, model, ended), headers)

    async def count(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        asked = parse(await door.body(request), request.headers, settings.default_max_tokens)
        tokens = await core.count_tokens(asked.conversation, caller)
        return _json({"input_tokens": tokens}, {"request-id": request_id()})

    async def here(request: Request) -> Response:
        """Claude Code looks whether anybody is there."""
        return Response(headers={"request-id": request_id()})

    return [
        Route("/v1/messages", answer, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
        Route("/", here, methods=["GET", "HEAD"]),
    ]


def _json(body: Json, headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


def _whole(started: Started, model: str, ended: Ended) -> Json:
    said = ended.answer
    blocks: list[Json] = []
    if said.reasoning:
        blocks.append({"type": "thinking", "thinking": said.reasoning, "signature": started.turn_id})
    if said.content:
        blocks.append({"type": "text", "text": said.content})
    for call in said.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": tool_input(call.arguments)})
    return {**_message(started, model), "content": blocks, **_stopped(ended), "usage": _usage(ended)}


class _Stream:
    """Events in, server-sent events out: one block after another, each opened, filled and closed."""

    def __init__(self, started: Started, model: str) -> None:
        self._started, self._model = started, model
        self._blocks = 0  # opened so far; the open one is the last
        self._open: str | None = None  # thinking | text | a call's id

    async def events(self, answer: Events) -> AsyncIterator[bytes]:
        async with aclosing(merged([answer])) as events:
            usage = {"input_tokens": self._started.prompt_tokens, "output_tokens": 0}
            yield _event("message_start", message={**_message(self._started, self._model), "usage": usage})
            async for _, event in events:
                if isinstance(event, Delta):
                    if event.parsed:
                        yield b"".join(self._delta(event))
                elif isinstance(event, Idle):
                    yield _event("ping")
                elif isinstance(event, Ended):
                    yield b"".join(self._end(event))

    def _delta(self, event: Delta) -> Iterator[bytes]:
        parsed = event.parsed
        if parsed.reasoning:
            yield from self._into("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._piece("thinking_delta", "thinking", parsed.reasoning)
        if parsed.text:
            yield from self._into("text", {"type": "text", "text": ""})
            yield self._piece("text_delta", "text", parsed.text)
        for call in parsed.calls:
            yield from self._call(call)

    def _call(self, call: CallDelta) -> Iterator[bytes]:
        if call.id is not None:
            yield from self._into(call.id, {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            yield self._piece("input_json_delta", "partial_json", call.arguments)

    def _end(self, ended: Ended) -> Iterator[bytes]:
        """The turn is on disk."""
        if ended.failure:
            yield (
                b"event: error\ndata: " + anthropic_error_body(ended.failure, f"req_{self._started.turn_id}") + b"\n\n"
            )
            return
        yield from self._close()
        yield _event("message_delta", delta=_stopped(ended), usage=_usage(ended))
        yield _event("message_stop")

    def _into(self, block: str, opening: Json) -> Iterator[bytes]:
        """The open block is this one."""
        if self._open == block:
            return
        yield from self._close()
        yield _event("content_block_start", index=self._blocks, content_block=opening)
        self._open, self._blocks = block, self._blocks + 1

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._piece("signature_delta", "signature", self._started.turn_id)
        yield _event("content_block_stop", index=self._blocks - 1)
        self._open = None

    def _piece(self, kind: str, field: str, text: str) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta={"type": kind, field: text})


def _event(name: str, **fields: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **fields}) + b"\n\n"


def _message(started: Started, model: str) -> Json:
    """As it is when it begins."""
    return {
        "id": f"msg_{started.turn_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _stopped(ended: Ended) -> Json:
    reasons = {Finish.LENGTH: "max_tokens", Finish.TOOL_CALLS: "tool_use"}
    reason = "stop_sequence" if ended.stop is not None else reasons.get(ended.finish, "end_turn")
    return {"stop_reason": reason, "stop_sequence": ended.stop}


def _usage(ended: Ended) -> Json:
    """`input_tokens` are those that no cache had: the protocol's sum of the three is the prompt."""
    return {
        "input_tokens": ended.prompt_tokens - ended.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": ended.cached_tokens,
        "output_tokens": ended.completion_tokens,
        "output_tokens_details": {"thinking_tokens": ended.reasoning_tokens},
    }
