"""OpenAI's chat completions: `POST /v1/chat/completions`, streaming (server-sent events) or not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from agent_rl.parsing import CallDelta
from agent_rl.settings import GatewaySettings
from agent_rl.types import Conversation, Finish, Json, ToolCall
from server.answering import Delta, Ended, Idle, Started
from server.auth import Door
from server.core import Core
from server.refusal import openai_error_body
from server.wires.chat_request import ChatRequest, parse
from server.wires.streams import Events, merged, start, turn_headers, while_connected, whole

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
TokenText = Callable[[int], str]


def routes(core: Core, door: Door, settings: GatewaySettings) -> list[BaseRoute]:
    async def complete(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        chat = parse(await door.body(request), request.headers, settings.default_max_tokens)
        answers = [core.answer(conversation, caller) for conversation in _choices(chat.conversation, chat.n)]
        started = await while_connected(request, start(answers))
        if chat.stream:
            stream = _Stream(chat, started, core.token_text).chunks(answers)
            return StreamingResponse(stream, headers=_headers(started), media_type="text/event-stream")
        return await while_connected(request, _whole(answers, chat, started, core.token_text))

    return [Route("/v1/chat/completions", complete, methods=["POST"])]


def _choices(conversation: Conversation, n: int) -> list[Conversation]:
    """The same request n times: each has its own seed, and its own key by which a retry finds it."""
    if n == 1:
        return [conversation]
    seed = conversation.sampling.seed
    return [
        replace(
            conversation,
            sampling=replace(conversation.sampling, seed=None if seed is None else seed + at),
            retry_key=f"{conversation.retry_key}/{at}",
        )
        for at in range(n)
    ]


# ------------------------------------------------------------------------------------------------- whole answers


async def _whole(
    answers: Sequence[Events], chat: ChatRequest, started: list[Started], token_text: TokenText
) -> Response:
    found = await whole(answers)
    choices = []
    for at, (deltas, ended) in enumerate(found):
        tokens = [entry for delta in deltas for entry in _logprobs(delta, token_text)] if chat.logprobs else None
        choices.append(
            {
                "index": at,
                "message": _message(ended),
                "logprobs": None if tokens is None else {"content": tokens, "refusal": None},
                "finish_reason": _finish_reason(ended.finish),
            }
        )
    body = {
        **_frame(chat, started[0], "chat.completion"),
        "choices": choices,
        "usage": _usage([ended for _, ended in found]),
    }
    return Response(orjson.dumps(body), headers=_headers(started), media_type="application/json")


def _message(ended: Ended) -> Json:
    answer = ended.answer
    message: Json = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [_tool_call(call) for call in answer.tool_calls]
    return message


def _tool_call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


# ------------------------------------------------------------------------------------------------------- streams


class _Stream:
    """Events in, server-sent events out. What tells of a choice's end goes out when its turn is on disk."""

    def __init__(self, chat: ChatRequest, started: list[Started], token_text: TokenText) -> None:
        self._chat, self._token_text = chat, token_text
        self._head = b"data: " + orjson.dumps(_frame(chat, started[0], "chat.completion.chunk"))[:-1]
        self._usage = b',"usage":null' if chat.include_usage else b""
        self._texts = [self._around_text(at) for at in range(chat.n)]

    async def chunks(self, answers: Sequence[Events]) -> AsyncIterator[bytes]:
        ends: list[Ended] = []
        async with aclosing(merged(answers)) as events:
            for at in range(self._chat.n):
                yield self._choice(at, {"role": "assistant", "content": ""})
            async for at, event in events:
                if isinstance(event, Delta):
                    for chunk in self._deltas(at, event):
                        yield chunk
                elif isinstance(event, Idle):
                    yield KEEP_ALIVE
                elif isinstance(event, Ended):
                    if event.failure:
                        yield b"data: " + openai_error_body(event.failure) + b"\n\n"
                        return
                    ends.append(event)
                    yield self._choice(at, {}, finish=_finish_reason(event.finish))
            if self._chat.include_usage:
                yield self._head + b',"choices":[],"usage":' + orjson.dumps(_usage(ends)) + b"}\n\n"
            yield DONE

    def _deltas(self, at: int, event: Delta) -> Iterable[bytes]:
        parsed = event.parsed
        if self._chat.logprobs and event.ids:
            delta: Json = {"content": parsed.text} if parsed.text or not parsed else {}
            if parsed.reasoning:
                delta["reasoning_content"] = parsed.reasoning
            if parsed.calls:
                delta["tool_calls"] = [_call_delta(call) for call in parsed.calls]
            yield self._choice(at, delta, logprobs={"content": _logprobs(event, self._token_text), "refusal": None})
            return
        if parsed.reasoning:
            yield self._choice(at, {"reasoning_content": parsed.reasoning})
        if parsed.text:
            before, after = self._texts[at]
            yield before + orjson.dumps(parsed.text) + after
        if parsed.calls:
            yield self._choice(at, {"tool_calls": [_call_delta(call) for call in parsed.calls]})

    def _choice(self, at: int, delta: Json, *, logprobs: Json | None = None, finish: str | None = None) -> bytes:
        choices = [{"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
        return self._head + b',"choices":' + orjson.dumps(choices) + self._usage + b"}\n\n"

    def _around_text(self, at: int) -> tuple[bytes, bytes]:
        """A chunk with a piece of text, before and behind it: what most chunks are."""
        before, _, after = self._choice(at, {"content": ""}).partition(b'"content":""')
        return before + b'"content":', after


def _call_delta(call: CallDelta) -> Json:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


# --------------------------------------------------------------------------------------------------------- both


def _frame(chat: ChatRequest, started: Started, kind: str) -> Json:
    return {
        "id": f"chatcmpl-{started.turn_id}",
        "object": kind,
        "created": int(started.created_at),
        "model": chat.conversation.policy,
        "system_fingerprint": started.release,
    }


def _headers(started: list[Started]) -> dict[str, str]:
    """Those of the first choice's turn; where there are more, `x-turn-ids` has all, in the choices' order."""
    headers = turn_headers(started[0])
    return headers if len(started) == 1 else {**headers, "x-turn-ids": ",".join(one.turn_id for one in started)}


def _logprobs(delta: Delta, token_text: TokenText) -> list[Json]:
    """One entry for each sampled token that has a logprob (one that a grammar left no choice has none); its text alone,
    which may be part of a character."""
    entries: list[Json] = []
    for token, logprob in zip(delta.ids, delta.logprobs, strict=True):
        if logprob is not None:
            text = token_text(token)
            entries.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return entries


def _finish_reason(finish: Finish) -> str:
    return {Finish.LENGTH: "length", Finish.TOOL_CALLS: "tool_calls"}.get(finish, "stop")


def _usage(ends: Sequence[Ended]) -> Json:
    """All choices' tokens; the prompt, which they share, once."""
    prompt, completion = ends[0].prompt_tokens, sum(ended.completion_tokens for ended in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": ends[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(ended.reasoning_tokens for ended in ends)},
    }
