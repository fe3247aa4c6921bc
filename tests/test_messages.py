"""The messages wire, through a real uvicorn, by the anthropic SDK; its requests as Conversations have them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import orjson
import pytest
from agent import script
from gateway import OWNER, Gateway, running_gateway

from agent_rl.types import Finish, Grammar, Message, ToolCall
from server.refusal import Refusal
from server.wires.messages_request import parse, tool_input

SCRIPT = script(
    "A hot drink. 日本 🦀",
    {"user": "In short", "text": "Tea is a hot drink, from a cup."},
    {"user": "bad call", "text": '<tool_call>\n{"name": "look_up", "arguments": {"word": tea}}\n</tool_call>'},
    {"user": "stop early", "text": "Yes. STOP No."},
    {"user": "sleep", "text": "Okay.", "first_token_s": 0.35},
)
TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": "Looks a word up.",
    "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}


@pytest.fixture
async def gateway(agent_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    running = running_gateway(agent_model, redis_url, tmp_path, script=SCRIPT, keepalive_s=0.1, max_body_bytes=20_000)
    async with running as gateway:
        yield gateway


@pytest.fixture
async def claude(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=OWNER, max_retries=0) as client:
        yield client


def body(text: str = "What is tea?", **more: Any) -> dict[str, Any]:
    return {"model": "default", "max_tokens": 200, "messages": [{"role": "user", "content": text}], **more}


def said(message: anthropic.types.Message) -> list[str]:
    return [block.text for block in message.content if block.type == "text"]


# ------------------------------------------------------------------------------------------------------- answers


async def test_a_whole_answer(gateway: Gateway, claude: anthropic.AsyncAnthropic) -> None:
    raw = await claude.messages.with_raw_response.create(**body())
    answer, turn_id = await raw.parse(), raw.headers["x-turn-id"]
    assert (answer.id, answer.role, answer.model) == (f"msg_{turn_id}", "assistant", "default")
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "A hot drink. 日本 🦀"}]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert raw.headers["request-id"] == f"req_{turn_id}"
    turn = (await gateway.transcript(turn_id)).turn
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(turn.prompt_ids), len(turn.response_ids))


async def test_a_stream_in_named_events(claude: anthropic.AsyncAnthropic) -> None:
    stream = await claude.messages.create(**body(), stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    pieces = kinds.count("content_block_delta")
    assert pieces > 3
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * pieces,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    async with claude.messages.stream(**body()) as accumulated:
        message = await accumulated.get_final_message()
    whole = await claude.messages.create(**body())
    assert (said(message), message.stop_reason) == (said(whole), "end_turn")
    assert message.usage.output_tokens == whole.usage.output_tokens


async def test_calls_and_their_results(gateway: Gateway, claude: anthropic.AsyncAnthropic) -> None:
    asked = body("look tea up", tools=[TOOL], tool_choice={"type": "auto"})
    async with claude.messages.stream(**asked) as stream:
        first = await stream.get_final_message()
        first_turn = stream.response.headers["x-turn-id"]
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["text", "tool_use", "tool_use"]
    calls = [block for block in first.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("look_up", {"word": "tea"}), ("look_up", {"word": "cup"})]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "A hot drink."},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "For tea."}]},
        {"type": "text", "text": "In short?"},
    ]
    asked["messages"] += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    raw = await claude.messages.with_raw_response.create(**asked)
    assert [block.to_dict() for block in (await raw.parse()).content] == [
        {"type": "text", "text": "Tea is a hot drink, from a cup."}
    ]
    second = await gateway.transcript(raw.headers["x-turn-id"])
    assert (second.turn.parent_id, second.turn.fork_reason) == (first_turn, None)
    assert second.turn.messages == (
        Message("tool", "A hot drink.", tool_call_id=calls[0].id),
        Message("tool", "For tea.", tool_call_id=calls[1].id),
        Message("user", "In short?"),
    )
    one = (await gateway.transcript(first_turn)).turn
    assert second.prompt_ids[: second.turn.shared_len] == one.prompt_ids + one.response_ids


async def test_a_whole_answer_with_calls_is_the_streamed_one(claude: anthropic.AsyncAnthropic) -> None:
    answer = await claude.messages.create(**body("look tea up", tools=[TOOL]))
    assert [block.type for block in answer.content] == ["text", "tool_use", "tool_use"]
    assert answer.stop_reason == "tool_use"


async def test_thoughts_have_a_block(claude: anthropic.AsyncAnthropic) -> None:
    asked = body("think of tea", thinking={"type": "enabled", "budget_tokens": 1024})
    async with claude.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    for answer in (streamed, await claude.messages.create(**asked)):
        thought, text = answer.content
        assert (thought.type, text.type) == ("thinking", "text")
        assert (thought.thinking.strip(), text.text) == ("Tea is wet.", "It is wet.")
        assert thought.signature
        assert answer.usage.output_tokens_details is not None
        assert 0 < answer.usage.output_tokens_details.thinking_tokens < answer.usage.output_tokens


@pytest.mark.parametrize(("kept", "reason"), [(True, None), (False, "thinking_stripped")])
async def test_thoughts_sent_back_are_the_models_own(
    gateway: Gateway, claude: anthropic.AsyncAnthropic, kept: bool, reason: str | None
) -> None:
    asked = body("think of tea")
    first = await claude.messages.with_raw_response.create(**asked)
    blocks = (await first.parse()).content[0 if kept else 1 :]
    asked["messages"] += [{"role": "assistant", "content": blocks}, {"role": "user", "content": "Sure?"}]
    second = await claude.messages.with_raw_response.create(**asked)
    turn = (await gateway.transcript(second.headers["x-turn-id"])).turn
    assert (turn.parent_id, turn.fork_reason) == (first.headers["x-turn-id"], reason)


async def test_a_stop_sequence_is_named(claude: anthropic.AsyncAnthropic) -> None:
    answer = await claude.messages.create(**body("stop early", stop_sequences=["STOP"]))
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "STOP")
    async with claude.messages.stream(**body("stop early", stop_sequences=["STOP"])) as stream:
        streamed = await stream.get_final_message()
    assert (said(streamed), said(answer), streamed.stop_sequence) == (["Yes. "], ["Yes. "], "STOP")


async def test_an_answer_cut_by_its_length(claude: anthropic.AsyncAnthropic) -> None:
    answer = await claude.messages.create(**{**body(), "max_tokens": 3})
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 3)


async def test_a_schema_becomes_the_answers_grammar(gateway: Gateway, claude: anthropic.AsyncAnthropic) -> None:
    schema = {"type": "object", "properties": {"word": {"type": "string"}}}
    raw = await claude.messages.with_raw_response.create(
        **body(), output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    grammar = (await gateway.transcript(raw.headers["x-turn-id"])).turn.sampling.grammar
    assert grammar == Grammar("json_schema", orjson.dumps(schema).decode())


async def test_tokens_are_counted_as_an_answer_counts_them(claude: anthropic.AsyncAnthropic) -> None:
    asked = {"model": "default", "messages": body()["messages"], "tools": [TOOL], "system": "Be kind."}
    counted = await claude.messages.count_tokens(**asked)
    beta = await claude.beta.messages.count_tokens(**asked)
    answer = await claude.messages.create(**asked, max_tokens=9)
    assert counted.input_tokens == beta.input_tokens == answer.usage.input_tokens


async def test_silence_is_filled_with_pings(gateway: Gateway) -> None:
    async with gateway.http() as web:
        text = (await web.post("/v1/messages", json=body("sleep", stream=True))).text
    names = [part.split("\n")[0] for part in text.strip().split("\n\n")]
    assert names[0] == "event: message_start"
    assert 2 <= names.count("event: ping") <= 4
    assert names[-1] == "event: message_stop"


# -------------------------------------------------------------------------------------------------------- errors


async def test_errors_in_anthropics_shape(gateway: Gateway, claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'gpt-9'") as error:
        await claude.messages.create(**{**body(), "model": "gpt-9"})
    assert error.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": error.value.body["error"]["message"]},  # type: ignore[index]
        "request_id": error.value.request_id,
    }
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 1023"):
        await claude.messages.create(**body("tea " * 1100))
    with pytest.raises(anthropic.RequestTooLargeError):
        await claude.messages.create(**body("x" * 20_000))
    stranger = anthropic.AsyncAnthropic(base_url=gateway.url, api_key="wrong", max_retries=0)
    async with stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(**body())


async def test_every_error_has_its_type_and_a_request_id(gateway: Gateway) -> None:
    async with gateway.http() as web:
        wrong_method = await web.get("/v1/messages")
        not_json = await web.post("/v1/messages/count_tokens", content=b"{")
        nowhere = await web.get("/v1/messages/batches")
    found = [(a.status_code, a.json()["error"]["type"]) for a in (wrong_method, not_json, nowhere)]
    assert found == [(405, "invalid_request_error"), (400, "invalid_request_error"), (404, "not_found_error")]
    for answer in (wrong_method, not_json, nowhere):
        assert answer.json()["request_id"] == answer.headers["request-id"]


async def test_an_engine_that_gives_up_in_the_middle(gateway: Gateway, claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.InternalServerError) as whole:
        await claude.messages.create(**body("give up"))
    assert whole.value.status_code == 502
    stream = await claude.messages.create(**body("give up"), stream=True)
    with pytest.raises(anthropic.APIStatusError, match="gave this answer up"):
        _ = [event async for event in stream]
    turn = (await gateway.transcript(stream.response.headers["x-turn-id"])).turn
    assert turn.finish is Finish.ERROR


async def test_a_client_that_hangs_up(gateway: Gateway, claude: anthropic.AsyncAnthropic) -> None:
    stream = await claude.messages.create(**body("sleep"), stream=True)
    await stream.close()
    await gateway.idle()


async def test_somebody_is_there(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as web:
        assert (await web.head("/")).status_code == (await web.get("/")).status_code == 200


# ------------------------------------------------------------------------------------------------------ requests


def asked(**more: Any) -> bytes:
    return orjson.dumps({**body(), **more})


def test_what_claude_code_sends() -> None:
    user_id = orjson.dumps({"device_id": "d", "account_uuid": "", "session_id": "5e55-1"}).decode()
    raw = asked(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.3; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Hi."}, {"type": "text", "text": "What is tea?"}]},
            {"role": "system", "content": "Answer now."},
        ],
        tools=[TOOL],
        metadata={"user_id": user_id},
        thinking={"type": "adaptive"},
        context_management={"edits": []},
        output_config={"effort": "high"},
        stream=True,
        temperature=1,
    )
    found = parse(raw, {}, 256)
    conversation = found.conversation
    assert found.stream
    assert conversation.messages == (
        Message("system", "You are an agent.\n\nBe brief."),
        Message("user", "Hi.\n\nWhat is tea?"),
        Message("system", "Answer now."),
    )
    function = {"name": "look_up", "description": "Looks a word up.", "parameters": TOOL["input_schema"]}
    assert conversation.tools == ({"type": "function", "function": function},)
    assert (conversation.session_id, conversation.session_rule) == ("5e55-1", "metadata.user_id")
    assert (conversation.end_user, conversation.sampling.grammar) == (None, None)


def test_a_plain_user_id_names_a_person_and_no_session() -> None:
    conversation = parse(asked(metadata={"user_id": "ann"}), {}, 256).conversation
    assert (conversation.end_user, conversation.session_id) == ("ann", None)


def test_an_assistants_blocks_are_one_message() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "…"},
        {"type": "text", "text": "Let me "},
        {"type": "text", "text": "look."},
        {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"word": "tea"}},
        {"type": "tool_use", "id": "toolu_2", "name": "look_up", "input": {"INVALID_JSON": '{"word": tea}'}},
    ]
    results = [
        {"type": "text", "text": "First this:"},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "hot"},
        {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True},
    ]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": blocks}]
    found = parse(asked(messages=[*turns, {"role": "user", "content": results}], tools=[TOOL]), {}, 256)
    calls = (ToolCall("toolu_1", "look_up", '{"word":"tea"}'), ToolCall("toolu_2", "look_up", '{"word": tea}'))
    assert found.conversation.messages[1:] == (
        Message("assistant", "Let me look.", tool_calls=calls, reasoning="Hm."),
        Message("user", "First this:"),
        Message("tool", "hot", tool_call_id="toolu_1"),
        Message("tool", "Error: ", tool_call_id="toolu_2"),
    )


def test_arguments_that_are_no_object_are_kept_as_text() -> None:
    assert tool_input('{"a": 1}') == {"a": 1}
    assert tool_input("") == {}
    assert tool_input('{"a": ') == {"INVALID_JSON": '{"a": '}
    assert tool_input("[1]") == {"INVALID_JSON": "[1]"}


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, ("auto", True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", False)),
        ({"type": "any"}, ("required", True)),
        ({"type": "tool", "name": "look_up"}, ("=look_up", True)),
        ({"type": "none"}, ("none", True)),
    ],
)
def test_choices_of_tools(choice: object, found: tuple[str, bool]) -> None:
    conversation = parse(asked(tools=[TOOL], tool_choice=choice), {}, 256).conversation
    assert (conversation.tool_choice, conversation.parallel_tool_calls) == found


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "is missing"),
    ({"messages": None}, "messages", "is missing"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "not 'king'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "not null"),
    ({"messages": [{"role": "assistant", "content": "Tea is"}]}, "messages", "assistant's"),
    (user({"type": "image", "source": {}}), "messages[0].content[0]", "this model reads no images"),
    (user({"type": "document", "source": {}}), "messages[0].content[0]", "this model reads no documents"),
    (user({"type": "tool_use", "id": "x"}), "messages[0].content[0]", "'tool_use' are not supported"),
    (user({"type": "tool_result"}), "messages[0].content[0].tool_use_id", "must be a string"),
    (
        user({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}),
        "messages[0].content[0].content[0]",
        "no images",
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "web_search_20250305"),
    ({"tools": [{"name": ""}]}, "tools[0].name", "1 to 128 characters"),
    ({"tools": [{"name": "x", "input_schema": "y"}]}, "tools[0].input_schema", "a JSON schema"),
    ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name", "tools here: none"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type", "not 'some'"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type", "json_schema"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "does not support"),
    ({"max_tokens": 0}, "max_tokens", "between 1 and"),
    ({"stop_sequences": [""]}, "stop_sequences", "none of them empty"),
    ({"temperature": "hot"}, "temperature", "a number"),
    ({"system": [{"type": "image"}]}, "system[0]", "no images"),
]


@pytest.mark.parametrize(("bad", "field", "words"), BAD)
def test_bad_fields_are_refused_by_name(bad: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse(asked(**bad), {}, 256)
    assert (refused.value.status, refused.value.param) == (400, field)
    assert words in refused.value.message
