"""The chat wire's tools, choices, formats and thoughts, by the openai SDK; its requests as Conversations have them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pydantic
import pytest
from agent import script
from gateway import Gateway, running_gateway

from agent_rl.types import Finish, Grammar, Message, ToolCall
from server.refusal import Refusal
from server.wires.chat_request import parse

SCRIPT = script(
    "Okay.",
    {"user": "one way", "text": '{"word": "tea"}'},
    {"user": "slowly", "text": "one two three four five six seven eight nine", "token_s": 0.05},
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
NAMED = {"type": "function", "function": {"name": "look_up"}}


@pytest.fixture
async def gateway(agent_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(agent_model, redis_url, tmp_path, script=SCRIPT, max_concurrency=8) as running:
        yield running


@pytest.fixture
async def ai(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway.openai() as client:
        yield client


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [{"role": "user", "content": text}], **more}


# --------------------------------------------------------------------------------------------------------- tools


async def test_calls_and_their_results(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    asked = body("look tea up", tools=[TOOL])
    raw = await ai.chat.completions.with_raw_response.create(**asked)
    choice = raw.parse().choices[0]
    calls = choice.message.tool_calls or []
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    assert [c.function.arguments for c in calls if c.type == "function"] == ['{"word": "tea"}', '{"word":  "cup"}']
    asked["messages"].append(choice.message)
    for call, result in zip(calls, ("A hot drink.", "For tea."), strict=True):
        asked["messages"].append({"role": "tool", "tool_call_id": call.id, "content": result})
    second = await ai.chat.completions.with_raw_response.create(**asked)
    assert second.parse().choices[0].message.content == "Tea is a hot drink, from a cup."
    turn = (await gateway.transcript(second.headers["x-turn-id"])).turn
    assert (turn.parent_id, turn.fork_reason) == (raw.headers["x-turn-id"], None)
    assert turn.messages == (
        Message("tool", "A hot drink.", tool_call_id=calls[0].id),
        Message("tool", "For tea.", tool_call_id=calls[1].id),
    )


async def test_calls_stream_in_pieces(ai: openai.AsyncOpenAI) -> None:
    stream = await ai.chat.completions.create(**body("look tea up", tools=[TOOL]), stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    deltas = [call for choice in chunks for call in choice.delta.tool_calls or []]
    assert [(d.index, d.type, d.function and d.function.name) for d in deltas if d.id] == [
        (0, "function", "look_up"),
        (1, "function", "look_up"),
    ]
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    for delta in deltas:
        assert delta.function is not None
        arguments[delta.index].append(delta.function.arguments or "")
    assert ["".join(pieces) for pieces in arguments.values()] == ['{"word": "tea"}', '{"word":  "cup"}']
    assert len(arguments[0]) > 2
    assert "".join(choice.delta.content or "" for choice in chunks) == "Let me look."
    assert chunks[-1].finish_reason == "tool_calls"


async def test_calls_alone_leave_no_content(ai: openai.AsyncOpenAI) -> None:
    async with ai.chat.completions.stream(**body("look tea up", tools=[TOOL])) as stream:
        streamed = (await stream.get_final_completion()).choices[0].message
    whole = (await ai.chat.completions.create(**body("look tea up", tools=[TOOL]))).choices[0].message
    assert [c.function.arguments for c in streamed.tool_calls or []] == [
        c.function.arguments for c in whole.tool_calls or [] if c.type == "function"
    ]


# ------------------------------------------------------------------------------------- choices, formats, thoughts


async def test_many_choices(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    raw = await ai.chat.completions.with_raw_response.create(**body("Hi"), n=3, seed=7)
    answer = raw.parse()
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "Okay."), (1, "Okay."), (2, "Okay.")]
    turns = [(await gateway.transcript(turn_id)).turn for turn_id in raw.headers["x-turn-ids"].split(",")]
    assert [turn.sampling.seed for turn in turns] == [7, 8, 9]
    assert answer.id == f"chatcmpl-{turns[0].turn_id}"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(turns[0].prompt_ids)
    assert answer.usage.completion_tokens == sum(len(turn.response_ids) for turn in turns)


async def test_many_choices_stream_side_by_side(ai: openai.AsyncOpenAI) -> None:
    stream = await ai.chat.completions.create(
        **body("Hi"), n=2, stream=True, logprobs=True, stream_options={"include_usage": True}
    )
    texts, ends = ["", ""], []
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert (texts, sorted(ends)) == (["Okay.", "Okay."], [0, 1])
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens > 0


async def test_more_choices_than_there_is_room_for(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        await ai.chat.completions.create(**body("Hi"), n=9)
    await gateway.idle()


async def test_a_choice_that_fails_ends_all(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        await ai.chat.completions.create(**body("give up"), n=2)
    await gateway.idle()


async def test_a_client_that_hangs_up_leaves_no_choice_running(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    stream = await ai.chat.completions.create(**body("slowly"), n=2, stream=True)
    turn_ids = stream.response.headers["x-turn-ids"].split(",")
    await stream.close()
    await gateway.idle()
    assert {(await gateway.transcript(turn_id)).turn.finish for turn_id in turn_ids} == {Finish.ABORTED}


async def test_a_retry_gets_all_choices_again(ai: openai.AsyncOpenAI) -> None:
    turns = []
    for _ in range(2):
        raw = await ai.chat.completions.with_raw_response.create(
            **body("Hi"), n=2, extra_headers={"idempotency-key": "once"}
        )
        turns.append(raw.headers["x-turn-ids"].split(","))
    assert turns[0] == turns[1]
    assert len(set(turns[0])) == 2


class Word(pydantic.BaseModel):
    word: str


async def test_a_schema_becomes_the_answers_grammar(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    parsed = await ai.chat.completions.parse(**body("one way"), response_format=Word)
    assert parsed.choices[0].message.parsed == Word(word="tea")
    turn = (await gateway.transcript(parsed.id.removeprefix("chatcmpl-"))).turn
    assert turn.sampling.grammar is not None
    assert turn.sampling.grammar.kind == "json_schema"
    assert orjson.loads(turn.sampling.grammar.text)["required"] == ["word"]


async def test_thoughts_stand_beside_the_content(gateway: Gateway, ai: openai.AsyncOpenAI) -> None:
    asked = body("think of tea")
    raw = await ai.chat.completions.with_raw_response.create(**asked)
    answer = raw.parse()
    message = answer.choices[0].message
    assert (message.content, message.model_extra) == ("It is wet.", {"reasoning_content": "Tea is wet."})
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert 0 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) < answer.usage.completion_tokens
    asked["messages"] += [message, {"role": "user", "content": "Sure?"}]
    second = await ai.chat.completions.with_raw_response.create(**asked)
    turn = (await gateway.transcript(second.headers["x-turn-id"])).turn
    assert (turn.parent_id, turn.fork_reason) == (raw.headers["x-turn-id"], None)


async def test_thoughts_stream_before_the_content(ai: openai.AsyncOpenAI) -> None:
    stream = await ai.chat.completions.create(**body("think of tea"), stream=True)
    pieces = [chunk.choices[0].delta async for chunk in stream]
    assert "".join((p.model_extra or {}).get("reasoning_content", "") for p in pieces).strip() == "Tea is wet."
    assert "".join(p.content or "" for p in pieces) == "It is wet."


# ------------------------------------------------------------------------------------------------------ requests


def asked(**more: Any) -> bytes:
    return orjson.dumps(body("Hi", **more))


def test_messages_of_every_kind() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": tea'}}
    raw = asked(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "name": "ann", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "hot"}]},
            {"role": "assistant", "content": None, "refusal": "I cannot."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "reasoning": "Ah."},
            {"role": "user", "content": "!"},
        ]
    )
    assert parse(raw, {}, 256).conversation.messages == (
        Message("system", "Be kind."),
        Message("user", "?", name="ann"),
        Message("assistant", "", tool_calls=(ToolCall("call_1", "look_up", '{"word": tea'),), reasoning="Hm."),
        Message("tool", "hot", tool_call_id="call_1"),
        Message("assistant", "I cannot."),
        Message("assistant", "No.", reasoning="Ah."),
        Message("user", "!"),
    )


OTHER: dict[str, Any] = {"type": "function", "function": {"name": "other"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("choice", "found", "names"),
    [
        (None, "auto", ["look_up", "other"]),
        ("none", "none", ["look_up", "other"]),
        ("required", "required", ["look_up", "other"]),
        (NAMED, "=look_up", ["look_up", "other"]),
        (ALLOWED, "required", ["look_up"]),
    ],
)
def test_choices_of_tools(choice: object, found: str, names: list[str]) -> None:
    conversation = parse(asked(tools=[TOOL, OTHER], tool_choice=choice), {}, 256).conversation
    offered: list[Any] = list(conversation.tools)
    assert (conversation.tool_choice, [tool["function"]["name"] for tool in offered]) == (found, names)


def test_the_same_tool_is_spelled_the_same_however_it_came() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    conversation = parse(asked(tools=[strict], parallel_tool_calls=False), {}, 256).conversation
    assert conversation.tools == (TOOL,)
    assert not conversation.parallel_tool_calls
    bare = parse(asked(tools=[OTHER]), {}, 256).conversation.tools
    assert bare == ({"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}},)


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_schema", '{"type":"object"}')),
        ({"type": "json_schema", "json_schema": {"schema": {"a": 1}}}, Grammar("json_schema", '{"a":1}')),
    ],
)
def test_response_formats(form: dict[str, Any], grammar: Grammar | None) -> None:
    assert parse(asked(response_format=form), {}, 256).conversation.sampling.grammar == grammar


def test_a_choice_must_be_of_a_tool_on_offer() -> None:
    with pytest.raises(Refusal, match="names the tool 'look_up'; tools here: other") as refused:
        parse(asked(tools=[OTHER], tool_choice=NAMED), {}, 256)
    assert refused.value.param == "tool_choice"
