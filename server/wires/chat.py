"""OpenAI's chat completions: `POST /v1/chat/completions`, streaming (server-sent events) or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from agent_rl.settings import GatewaySettings
from agent_rl.types import Finish
from server.answering import Delta, Ended, Event, Idle, Started
from server.auth import Door
from server.core import Core
from server.refusal import Refusal, openai_error_body
from server.wires.chat_request import ChatRequest, parse

T = TypeVar("T")
Events = AsyncGenerator[Event, None]
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def routes(core: Core, door: Door, settings: GatewaySettings) -> list[BaseRoute]:
    async def complete(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        chat = parse(await door.body(request), request.headers, settings.default_max_tokens)
        events = core.answer(chat.conversation, caller)
        if not chat.stream:
            return await while_connected(request, _whole(events, chat, core.token_text))
        started = await while_connected(request, _start(events))
        stream = _chunks(events, started, chat, core.token_text)
        return StreamingResponse(stream, headers=_headers(started), media_type="text/event-stream")

    return [Route("/v1/chat/completions", complete, methods=["POST"])]


async def _start(events: Events) -> Started:
    """The first event. Raises Refusal."""
    started = await anext(events)
    assert isinstance(started, Started)
    return started


async def _whole(events: Events, chat: ChatRequest, token_text: Callable[[int], str]) -> Response:
    async with aclosing(events):
        started = await _start(events)
        texts, tokens = [], []
        async for event in events:
            if isinstance(event, Delta):
                texts.append(event.text)
                tokens += _logprobs(event, token_text) if chat.logprobs else []
            elif isinstance(event, Ended):
                ended = event
    if ended.failure:
        raise ended.failure
    body = {
        "id": f"chatcmpl-{started.turn_id}",
        "object": "chat.completion",
        "created": int(started.created_at),
        "model": chat.conversation.policy,
        "system_fingerprint": started.release,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                "logprobs": {"content": tokens, "refusal": None} if chat.logprobs else None,
                "finish_reason": _finish_reason(ended.finish),
            }
        ],
        "usage": _usage(ended),
    }
    return Response(orjson.dumps(body), headers=_headers(started), media_type="application/json")


async def _chunks(
    events: Events, started: Started, chat: ChatRequest, token_text: Callable[[int], str]
) -> AsyncIterator[bytes]:
    """One server-sent event for each piece of text; the reason it ended goes out when the turn is on disk."""
    frame = {
        "id": f"chatcmpl-{started.turn_id}",
        "object": "chat.completion.chunk",
        "created": int(started.created_at),
        "model": chat.conversation.policy,
        "system_fingerprint": started.release,
    }
    head = b"data: " + orjson.dumps(frame)[:-1]
    usage = b',"usage":null' if chat.include_usage else b""
    text_head = head + b',"choices":[{"index":0,"delta":{"content":'
    text_tail = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"

    def choice(delta: dict[str, str], logprobs: object = None, finish: str | None = None) -> bytes:
        choices = [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
        return head + b',"choices":' + orjson.dumps(choices) + usage + b"}\n\n"

    async with aclosing(events):
        yield choice({"role": "assistant", "content": ""})
        async for event in events:
            if isinstance(event, Delta):
                if chat.logprobs and event.ids:
                    logprobs = {"content": _logprobs(event, token_text), "refusal": None}
                    yield choice({"content": event.text}, logprobs)
                elif event.text:
                    yield text_head + orjson.dumps(event.text) + text_tail
            elif isinstance(event, Idle):
                yield KEEP_ALIVE
            elif isinstance(event, Ended):
                if event.failure:
                    yield b"data: " + openai_error_body(event.failure) + b"\n\n"
                    return
                yield choice({}, finish=_finish_reason(event.finish))
                if chat.include_usage:
                    yield head + b',"choices":[],"usage":' + orjson.dumps(_usage(event)) + b"}\n\n"
                yield DONE


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


def _headers(started: Started) -> dict[str, str]:
    return {
        "x-session-id": started.session_id,
        "x-session-rule": started.rule,
        "x-turn-id": started.turn_id,
        "x-policy-version": started.release,
        "cache-control": "no-store",
    }


def _logprobs(delta: Delta, token_text: Callable[[int], str]) -> list[dict[str, object]]:
    """One entry for each sampled token; its text alone, which may be part of a character."""
    entries: list[dict[str, object]] = []
    for token, logprob in zip(delta.ids, delta.logprobs, strict=True):
        text = token_text(token)
        entries.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return entries


def _finish_reason(finish: Finish) -> str:
    return "length" if finish is Finish.LENGTH else "stop"


def _usage(ended: Ended) -> dict[str, int]:
    prompt, completion = ended.prompt_tokens, ended.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
