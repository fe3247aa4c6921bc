"""The chat wire, through a real uvicorn, by the openai SDK; bad input by httpx."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway import OWNER, Gateway, running_gateway

from agent_rl.types import Finish

SCRIPT = {
    "token_s": 0.002,
    "rules": [
        {"user": "tea", "text": "A hot drink. 日本 🦀", "logprob": [-0.5, -0.25]},
        {"user": "slowly", "text": "one two three four five six seven eight nine", "token_s": 0.05},
        {"user": "give up", "text": "one two three", "abort_after": 2},
        {"user": "stop early", "text": "Yes. STOP No."},
    ],
    "default": {"text": "Okay."},
}


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tiny_model, redis_url, tmp_path, script=SCRIPT, keepalive_s=0.5) as running:
        yield running


def body(text: str = "What is tea?", **more: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [{"role": "user", "content": text}], **more}


async def test_a_whole_answer(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        raw = await ai.chat.completions.with_raw_response.create(**body(), max_tokens=64)
    answer, turn_id = raw.parse(), raw.headers["x-turn-id"]
    assert answer.id == f"chatcmpl-{turn_id}"
    assert answer.choices[0].message.content == "A hot drink. 日本 🦀"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, raw.headers["x-policy-version"], raw.headers["x-session-rule"]) == ("default", "base", "new")
    turn = (await gateway.transcript(turn_id)).turn
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(turn.prompt_ids),
        len(turn.response_ids),
    )
    assert (turn.session_id, turn.fork_reason) == (raw.headers["x-session-id"], "first")
    assert turn.response_ids[-1] == 2
    assert turn.behavior_logprobs == (-0.5, *[-0.25] * (len(turn.response_ids) - 1))


async def test_a_stream_is_the_whole_answer_in_pieces(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        stream = await ai.chat.completions.create(
            **body(), stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        headers = stream.response.headers
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "A hot drink. 日本 🦀"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    turn = (await gateway.transcript(headers["x-turn-id"])).turn
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(turn.response_ids)
    entries = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert [entry.logprob for entry in entries] == list(turn.behavior_logprobs)


async def test_the_synchronous_client(gateway: Gateway) -> None:
    def ask() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=OWNER, max_retries=0) as ai:
            whole = ai.chat.completions.create(**body()).choices[0].message.content
            stream = ai.chat.completions.create(**body(), stream=True)
            return whole, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    whole, streamed = await asyncio.to_thread(ask)
    assert whole == streamed == "A hot drink. 日本 🦀"


async def test_text_arrives_as_it_is_sampled(gateway: Gateway) -> None:
    loop = asyncio.get_running_loop()
    async with gateway.openai() as ai:
        stream = await ai.chat.completions.create(**body("slowly"), stream=True)
        times = [loop.time() async for chunk in stream if chunk.choices[0].delta.content]
    assert len(times) >= 9
    assert times[-1] - times[0] > 0.05 * (len(times) - 2)


async def test_silence_is_filled_with_comments(tiny_model: Path, redis_url: str, tmp_path: Path) -> None:
    script = {"default": {"text": "Okay.", "first_token_s": 0.35}}
    running = running_gateway(tiny_model, redis_url, tmp_path, script=script, keepalive_s=0.1)
    async with running as gateway, gateway.http() as web:
        lines = (await web.post("/v1/chat/completions", json=body(stream=True))).text.split("\n\n")
    assert lines[0].startswith('data: {"id":"chatcmpl-')
    assert 2 <= lines.count(": keep-alive") <= 4
    assert lines[-2:] == ["data: [DONE]", ""]


async def test_an_answer_cut_by_its_length(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        raw = await ai.chat.completions.with_raw_response.create(**body(), max_completion_tokens=3)
    assert raw.parse().choices[0].finish_reason == "length"
    turn = (await gateway.transcript(raw.headers["x-turn-id"])).turn
    assert (turn.finish, len(turn.response_ids), turn.sampling.max_tokens) == (Finish.LENGTH, 3, 3)


async def test_a_stop_string_ends_the_answer_and_is_not_shown(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        answer = await ai.chat.completions.create(**body("stop early"), stop=["STOP"])
    assert answer.choices[0].message.content == "Yes. "
    assert answer.choices[0].finish_reason == "stop"


async def test_sampling_is_recorded_as_it_was_used(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        raw = await ai.chat.completions.with_raw_response.create(
            **body(), temperature=0.5, top_p=0.9, seed=7, presence_penalty=0.5, user="ann", max_tokens=10**6
        )
    turn = (await gateway.transcript(raw.headers["x-turn-id"])).turn
    used = turn.sampling
    assert (used.temperature, used.top_p, used.seed, used.presence_penalty) == (0.5, 0.9, 7, 0.5)
    assert used.max_tokens == 1024 - len(turn.prompt_ids)
    assert turn.subject == "ann"
    assert set(turn.behavior_logprobs) == {None}


async def test_content_may_be_text_parts(gateway: Gateway) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "tea?"}]
    async with gateway.http() as web:
        messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
        answer = await web.post("/v1/chat/completions", json={"model": "default", "messages": messages, "store": False})
    messages_recorded = (await gateway.transcript(answer.headers["x-turn-id"])).messages
    assert [(m.role, m.content) for m in messages_recorded] == [("system", "Be kind."), ("user", "What is tea?")]


@pytest.mark.parametrize(
    ("how", "headers", "more"),
    [("header", {"X-Train": "false"}, {}), ("metadata", {}, {"metadata": {"train": "false"}})],
)
async def test_who_does_not_want_to_teach_does_not(
    gateway: Gateway, how: str, headers: dict[str, str], more: dict[str, Any]
) -> None:
    async with gateway.http() as web:
        answer = await web.post("/v1/chat/completions", json=body(**more), headers=headers)
    assert (await gateway.transcript(answer.headers["x-turn-id"])).turn.no_lesson == "x-train"


async def test_a_client_that_hangs_up(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        stream = await ai.chat.completions.create(**body("slowly"), stream=True)
        turn_id, seen = stream.response.headers["x-turn-id"], 0
        async for chunk in stream:
            seen += bool(chunk.choices[0].delta.content)
            if seen == 2:
                break
        await stream.close()
    turn = (await gateway.transcript(turn_id)).turn
    assert (turn.finish, turn.no_lesson) == (Finish.ABORTED, "aborted")
    assert 2 <= len(turn.response_ids) < 9
    assert gateway.engine.jobs == {}


async def test_a_client_that_does_not_stream_and_hangs_up(gateway: Gateway) -> None:
    async with gateway.http() as web:
        with pytest.raises(httpx.ReadTimeout):
            await web.post("/v1/chat/completions", json=body("slowly"), timeout=0.2)
    await gateway.idle()


async def read_into(pieces: list[str], stream: openai.AsyncStream[Any]) -> None:
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")


async def test_an_engine_that_gives_up_in_the_middle(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        with pytest.raises(openai.APIStatusError) as whole:
            await ai.chat.completions.create(**body("give up"))
        stream = await ai.chat.completions.create(**body("give up"), stream=True)
        pieces: list[str] = []
        with pytest.raises(openai.APIError, match="gave this answer up"):
            await read_into(pieces, stream)
    assert whole.value.status_code == 502
    assert "".join(pieces) != ""
    turn = (await gateway.transcript(stream.response.headers["x-turn-id"])).turn
    assert (turn.finish, turn.no_lesson, len(turn.response_ids)) == (Finish.ERROR, "error", 2)


def user(**message: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [{"role": "user", "content": "3", **message}]}


MESSAGES = [{"role": "user", "content": "Hi"}]
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": MESSAGES}, "model", "is missing"),
    ({"model": "default"}, "messages", "is missing"),
    ({"model": "default", "messages": []}, "messages", "at least one"),
    ({"model": "default", "messages": "Hi"}, "messages", "must be a list, not a string"),
    ({"model": "default", "messages": ["Hi"]}, "messages[0]", "must be an object, not a string"),
    ({"model": "default", "messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "not 'king'"),
    ({"model": "default", "messages": [{"role": "user"}]}, "messages[0].content", "not null"),
    ({"model": "default", "messages": [{"role": "user", "content": 3}]}, "messages[0].content", "not an integer"),
    (user(role="tool"), "messages[0].tool_call_id", "must be a string, not null"),
    (user(role="function", name="x"), "messages[0].role", "not 'function'"),
    (user(role="assistant", tool_calls=[{"id": "c", "type": "custom"}]), "messages[0].tool_calls[0].type", "'custom'"),
    (user(role="assistant", tool_calls=[{"id": "c"}]), "messages[0].tool_calls[0].function.name", "not null"),
    (user(role="assistant", audio={"id": "a"}), "messages[0].audio", "not supported"),
    ({"model": "default", "messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "messages", "assistant's"),
    (
        {"model": "default", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
        "this model reads no images",
    ),
    (user(content=[{"type": "input_audio"}]), "messages[0].content[0]", "this model reads no audio"),
    (user(content=[{"type": "file"}]), "messages[0].content[0]", "this model reads no files"),
    (user(content=[{"type": "text"}]), "messages[0].content[0].text", "not null"),
    (body(n=17), "n", "between 1 and 16"),
    (body(tools=[{"type": "function"}]), "tools[0].function.name", "1 to 128 characters, not None"),
    (body(tools=[{"type": "custom", "custom": {"name": "x"}}]), "tools[0].type", "not 'custom'"),
    (body(tools={}), "tools", "must be a list, not an object"),
    (body(tool_choice="often"), "tool_choice", "not 'often'"),
    (body(tool_choice="required"), "tool_choice", "needs tools"),
    (body(tool_choice={"type": "function", "function": {"name": "x"}}), "tool_choice", "tools here: none"),
    (body(functions=[{"name": "x"}]), "functions", "use 'tools'"),
    (body(response_format={"type": "xml"}), "response_format.type", "not 'xml'"),
    (body(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "not null"),
    (body(response_format="json"), "response_format", "must be an object, not a string"),
    (body(logit_bias={"1": 2}), "logit_bias", "does not support"),
    (body(top_logprobs=2), "top_logprobs", "does not support"),
    (body(logprobs=True, temperature=0), "logprobs", "greedy"),
    (body(temperature="hot"), "temperature", "must be a number, not a string"),
    (body(temperature=3), "temperature", "between 0 and 2, not 3"),
    (body(max_tokens=0), "max_tokens", "between 1 and"),
    (body(max_tokens=1.5), "max_tokens", "must be an integer"),
    (body(stop=[""]), "stop", "none of them empty"),
    (body(stream="yes"), "stream", "true or false"),
    (body(user=7), "user", "must be a string"),
]


async def test_bad_fields_are_refused_by_name(gateway: Gateway) -> None:
    async with gateway.http() as web:
        for bad, field, words in BAD:
            answer = await web.post("/v1/chat/completions", json=bad)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error"), bad
            assert words in error["message"], bad


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "not JSON"), (b"[]", "must be a JSON object, not a list"), (b"\xff", "not JSON"), (b"", "not JSON")],
)
async def test_a_body_that_is_no_json_object(gateway: Gateway, content: bytes, words: str) -> None:
    async with gateway.http() as web:
        answer = await web.post("/v1/chat/completions", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert words in answer.json()["error"]["message"]


async def test_an_unknown_model_is_told_what_there_is(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'; models here: default") as error:
            await ai.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    assert error.value.code == "model_not_found"


async def test_too_long_a_prompt_is_told_the_numbers(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        with pytest.raises(openai.BadRequestError, match=r"too long: \d+ tokens > 1023") as error:
            await ai.chat.completions.create(**body("tea " * 1000))
    assert error.value.code == "context_length_exceeded"
