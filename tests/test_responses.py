"""The responses wire, through a real uvicorn, by the openai SDK and over a WebSocket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import websockets
from agent import script
from gateway import OTHER, OWNER, Gateway, running_gateway

from agent_rl.types import Grammar, Message, ToolCall
from server.refusal import Refusal
from server.wires.responses_items import messages_of
from server.wires.responses_request import parse

SCRIPT = script(
    "Okay. 日本 🦀",
    {"user": "patch", "text": '<tool_call>\n{"name": "apply", "arguments": {"input": "*** Begin"}}\n</tool_call>'},
    {"user": "close it", "text": '<tool_call>\n{"name": "agents__close", "arguments": {"id": "a"}}\n</tool_call>'},
    {"user": "slowly", "text": "one two three four", "token_s": 0.2},
)
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look_up",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture
async def gateway(agent_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(agent_model, redis_url, tmp_path, script=SCRIPT, keepalive_s=0.3) as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway.openai() as client:
        yield client


async def test_a_whole_response(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="default", input="Hello", instructions="Be terse.")
    assert (made.status, made.output_text) == ("completed", "Okay. 日本 🦀")
    assert made.usage is not None
    turn = await gateway.transcript(made.id.removeprefix("resp_"))
    assert [m.content for m in turn.messages] == ["Be terse.", "Hello"]
    assert made.usage.input_tokens == len(turn.prompt_ids)
    assert made.usage.output_tokens == len(turn.turn.response_ids)


async def test_a_stream_has_the_events_that_clients_insist_on(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="default", input="think") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output_text == "It is wet."
    assert final.output[0].type == "reasoning"
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens > 0


async def test_a_tool_round_trip_extends_what_was_sampled(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    question: Any = [{"role": "user", "content": "look tea up"}]
    first = await client.responses.create(model="default", input=question, tools=[TOOL])  # type: ignore[list-item]
    kinds = [item.type for item in first.output]
    assert kinds == ["message", "function_call", "function_call"]
    calls = [item for item in first.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"word": "tea"}, {"word": "cup"}]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "A hot drink"} for call in calls]
    again = [item.model_dump(exclude_none=True) for item in first.output]
    second = await client.responses.create(model="default", input=[*question, *again, *results], tools=[TOOL])  # type: ignore[list-item]
    assert second.output_text
    before = await gateway.transcript(first.id.removeprefix("resp_"))
    after = await gateway.transcript(second.id.removeprefix("resp_"))
    assert (after.turn.parent_id, after.turn.fork_reason) == (before.turn.turn_id, None)
    sampled = before.prompt_ids + before.turn.response_ids
    assert after.prompt_ids[: len(sampled)] == sampled
    assert [m.role for m in after.turn.messages] == ["tool", "tool"]


async def test_streamed_calls_are_the_whole_ones(client: openai.AsyncOpenAI) -> None:
    pieces: dict[str, str] = {}
    async with client.responses.stream(model="default", input="look tea up", tools=[TOOL]) as stream:  # type: ignore[list-item]
        async for event in stream:
            if event.type == "response.function_call_arguments.delta":
                pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
        final = await stream.get_final_response()
    assert list(pieces.values()) == [item.arguments for item in final.output if item.type == "function_call"]
    assert list(pieces.values()) == ['{"word": "tea"}', '{"word":  "cup"}']


async def test_a_custom_tool_gets_its_text(client: openai.AsyncOpenAI) -> None:
    tools: Any = [{"type": "custom", "name": "apply", "description": "Patches."}, {"type": "web_search"}]
    raw = await client.responses.with_raw_response.create(model="default", input="patch", tools=tools)
    assert raw.headers["x-tools-left-out"] == "web_search"
    call = raw.parse().output[0]
    assert call.type == "custom_tool_call"
    assert (call.name, call.input) == ("apply", "*** Begin")


async def test_a_tool_in_a_namespace_is_called_by_both_its_names(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    close = {**TOOL, "name": "close"}
    tools: Any = [{"type": "namespace", "name": "agents", "description": "Other agents.", "tools": [close]}]
    question: Any = [{"role": "user", "content": "close it"}]
    made = await client.responses.create(model="default", input=question, tools=tools, stream=True)
    events = [event async for event in made]
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert done.to_dict()["name"] == "close"
    assert events[-1].type == "response.completed"
    first = events[-1].response
    call = first.output[0]
    assert call.type == "function_call"
    assert (call.namespace, call.name, call.arguments) == ("agents", "close", '{"id": "a"}')
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "closed"}
    again = [*question, call.model_dump(exclude_none=True), result]
    second = await client.responses.create(model="default", input=again, tools=tools)
    turn = (await gateway.transcript(second.id.removeprefix("resp_"))).turn
    assert (turn.parent_id, turn.fork_reason) == (first.id.removeprefix("resp_"), None)


async def test_a_stored_custom_call_is_given_back_as_one(client: openai.AsyncOpenAI) -> None:
    tools: Any = [{"type": "custom", "name": "apply", "description": "Patches."}]
    made = await client.responses.create(model="default", input="patch", tools=tools)
    stored = await client.responses.retrieve(made.id)
    assert [(item.type, item.to_dict().get("input")) for item in stored.output] == [("custom_tool_call", "*** Begin")]


async def test_reasoning_given_out_sealed_comes_back_as_it_was(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    include: Any = ["reasoning.encrypted_content"]
    first = await client.responses.create(model="default", input="think", include=include, store=False)
    sealed = [item.model_dump(exclude_none=True) for item in first.output]
    assert sealed[0]["encrypted_content"]
    del sealed[0]["content"]
    again: Any = [{"role": "user", "content": "think"}, *sealed, {"role": "user", "content": "More"}]
    second = await client.responses.create(model="default", input=again, store=False)
    turn = (await gateway.transcript(second.id.removeprefix("resp_"))).turn
    assert (turn.parent_id, turn.fork_reason) == (first.id.removeprefix("resp_"), None)


async def test_a_chain_of_previous_responses(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="default", input="Hello", instructions="Be terse.")
    second = await client.responses.create(model="default", input="More", previous_response_id=first.id)
    third = await client.responses.create(model="default", input="Last", previous_response_id=second.id)
    turns = [(await gateway.transcript(r.id.removeprefix("resp_"))).turn for r in (first, second, third)]
    assert [turn.parent_id for turn in turns] == [None, turns[0].turn_id, turns[1].turn_id]
    assert len({turn.session_id for turn in turns}) == 1
    assert [turn.session_rule for turn in turns] == ["new", "conversation", "conversation"]
    stored = await client.responses.retrieve(second.id)
    assert stored.output_text == second.output_text
    asked = await client.responses.input_items.list(second.id)
    assert [getattr(item, "role", item.type) for item in asked.data] == ["system", "user", "assistant", "user"]


async def test_what_is_not_stored_or_not_ones_own_is_not_found(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    unstored = await client.responses.create(model="default", input="Hello", store=False)
    stored = await client.responses.create(model="default", input="Hello")
    async with gateway.openai(OTHER) as other:
        for asker, previous in ((client, unstored.id), (client, "resp_nothing"), (other, stored.id)):
            with pytest.raises(openai.BadRequestError) as refused:
                await asker.responses.create(model="default", input="More", previous_response_id=previous)
            assert refused.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unstored.id)


async def test_a_response_that_reaches_its_limit_or_fails(client: openai.AsyncOpenAI) -> None:
    short = await client.responses.create(model="default", input="Hello", max_output_tokens=16, temperature=0.5)
    assert short.status in ("completed", "incomplete")
    cut = await client.responses.create(model="default", input="Hello", max_output_tokens=2)
    assert cut.incomplete_details is not None
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output[-1].to_dict()["status"] == "incomplete"
    events = [e async for e in await client.responses.create(model="default", input="give up", stream=True)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"input": []}, "'input'"),
        ({"background": True}, "'background'"),
        ({"include": ["message.output_text.logprobs"]}, "'include'"),
        ({"tools": [{"type": "日本"}]}, r"tools\[0\].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "reads no images"),
        ({"tool_choice": {"type": "web_search"}}, "'tool_choice'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(more: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as refused:
        parse({"model": "default", "input": "Hi", **more}, b"", {}, 16)
    assert refused.value.status == 400


def test_a_format_and_a_choice_are_held_to() -> None:
    form = {"type": "json_schema", "name": "tea", "schema": {"type": "object"}, "strict": True}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look_up"}]}
    tools = [TOOL, {**TOOL, "name": "other"}]
    body = {"model": "m", "input": "Hi", "text": {"format": form}, "tools": tools, "tool_choice": choice}
    asked = parse(body, b"", {}, 16).conversation
    assert asked.sampling.grammar == Grammar("json_schema", '{"type":"object"}')
    assert ([tool["function"]["name"] for tool in asked.tools], asked.tool_choice) == (["look_up"], "required")  # type: ignore[index]
    one = parse({**body, "tool_choice": {"type": "function", "name": "other"}}, b"", {}, 16).conversation
    assert (len(one.tools), one.tool_choice) == (2, "=other")


def test_items_in_a_row_are_one_answer() -> None:
    items = [
        {"role": "user", "content": "Look"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply", "input": "x"},
        {"type": "function_call_output", "call_id": "c1", "output": "there"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
    ]
    calls = (ToolCall("c1", "look", "{}"), ToolCall("c2", "apply", '{"input":"x"}'))
    assert messages_of(items) == (
        Message("user", "Look"),
        Message("assistant", "I look.", tool_calls=calls, reasoning="Hm."),
        Message("tool", "there", tool_call_id="c1"),
        Message("tool", "done", tool_call_id="c2"),
    )


def test_a_thought_without_an_answer_is_an_answer_of_its_own() -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    more = {"role": "user", "content": "More"}
    assert messages_of([thought, more, {"role": "assistant", "content": "Yes."}]) == (
        Message("assistant", "", reasoning="Hm."),
        Message("user", "More"),
        Message("assistant", "Yes."),
    )


# ------------------------------------------------------------------------------------------------------ WebSocket


async def talk(socket: websockets.ClientConnection, **body: Any) -> list[dict[str, Any]]:
    """All events of one response."""
    await socket.send(json.dumps({"type": "response.create", "model": "default", **body}))
    events = [json.loads(await socket.recv())]
    while events[-1]["type"] not in ("response.completed", "response.incomplete", "response.failed", "error"):
        events.append(json.loads(await socket.recv()))
    return events


async def test_a_websocket_remembers_what_was_not_stored(gateway: Gateway) -> None:
    url, headers = gateway.url.replace("http", "ws") + "/v1/responses", {"authorization": f"Bearer {OWNER}"}
    async with websockets.connect(url, additional_headers=headers) as socket:
        first = await talk(socket, input="Hello", store=False)
        previous = first[-1]["response"]["id"]
        second = await talk(socket, input="More", store=False, previous_response_id=previous)
        assert [event["sequence_number"] for event in second] == list(range(len(second)))
        turn = (await gateway.transcript(second[-1]["response"]["id"].removeprefix("resp_"))).turn
        assert (turn.parent_id, turn.retrievable) == (previous.removeprefix("resp_"), False)
    async with websockets.connect(url, additional_headers=headers) as socket:
        lost = await talk(socket, input="More", previous_response_id=previous)
        assert lost[-1]["error"]["code"] == "previous_response_not_found"
        await socket.send("no JSON")
        assert json.loads(await socket.recv())["error"]["code"] == "invalid_json"
        assert (await talk(socket, input="Hello"))[-1]["type"] == "response.completed"


async def test_a_warm_up_is_no_turn_and_can_be_gone_on_behind(gateway: Gateway) -> None:
    url, headers = gateway.url.replace("http", "ws") + "/v1/responses", {"authorization": f"Bearer {OWNER}"}
    async with websockets.connect(url, additional_headers=headers) as socket:
        warm = await talk(socket, input=[], instructions="Be terse.", generate=False)
        assert [event["type"] for event in warm] == ["response.created", "response.completed"]
        response = warm[-1]["response"]
        assert (response["output"], response["usage"]) == ([], None)
        first = await talk(socket, input="Hello", previous_response_id=response["id"])
    made = await gateway.transcript(first[-1]["response"]["id"].removeprefix("resp_"))
    assert [m.content for m in made.messages] == ["Be terse.", "Hello"]
    assert await gateway.store.transcript(response["id"].removeprefix("resp_")) is None


async def test_a_websocket_cancels_and_refuses_a_second_at_once(gateway: Gateway) -> None:
    url, headers = gateway.url.replace("http", "ws") + "/v1/responses", {"authorization": f"Bearer {OWNER}"}
    async with websockets.connect(url, additional_headers=headers) as socket:
        await socket.send(b"\x00")
        assert json.loads(await socket.recv())["error"]["code"] == "invalid_json"
        await socket.send('{"type": "response.cancel"}')
        assert json.loads(await socket.recv())["error"]["code"] == "nothing_to_cancel"
        slow = json.dumps({"type": "response.create", "model": "default", "input": "slowly"})
        await socket.send(slow)
        created = json.loads(await socket.recv())
        await socket.send(slow)
        assert await code_of_the_error(socket) == "busy"
        await socket.send('{"type": "response.cancel"}')
        assert await code_of_the_error(socket) == "cancelled"
        assert (await talk(socket, input="Hello"))[-1]["type"] == "response.completed"
    turn = (await gateway.transcript(created["response"]["id"].removeprefix("resp_"))).turn
    assert turn.no_lesson == "aborted"


async def code_of_the_error(socket: websockets.ClientConnection) -> str:
    """Of the next one, whatever comes before it."""
    while (event := json.loads(await socket.recv()))["type"] != "error":
        pass
    return str(event["error"]["code"])


async def test_a_websocket_needs_a_key(gateway: Gateway) -> None:
    url = gateway.url.replace("http", "ws") + "/v1/responses"
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url)
    assert refused.value.response.status_code == 401


async def test_a_websocket_that_closes_ends_its_answer(gateway: Gateway) -> None:
    url, headers = gateway.url.replace("http", "ws") + "/v1/responses", {"authorization": f"Bearer {OWNER}"}
    async with websockets.connect(url, additional_headers=headers) as socket:
        await socket.send(json.dumps({"type": "response.create", "model": "default", "input": "slowly"}))
        created = json.loads(await socket.recv())
    turn = (await gateway.transcript(created["response"]["id"].removeprefix("resp_"))).turn
    assert turn.no_lesson == "aborted"
