"""The body of `POST /v1/messages` → Conversation. What cannot be honoured is refused by name, never ignored; fields
that change nothing about the answer (`cache_control`, `thinking`, `context_management`, unknown ones) are accepted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from agent_rl.types import Conversation, Grammar, Json, Message, Sampling, ToolCall
from server.identity import Hints, identify
from server.refusal import bad_field
from server.wires.request import (
    Body,
    boolean,
    function_tool,
    integer,
    items,
    json_object,
    kind,
    mapping,
    number,
    schema_grammar,
    stop_strings,
    string,
    text,
)

ROLES = ("user", "assistant", "system")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
UNREADABLE = {"image": "images", "document": "documents"}
NO_PROMPT = "x-anthropic-billing-header:"  # how a system block begins that Claude Code means for the server alone
INVALID_JSON = "INVALID_JSON"  # the field that holds arguments which are no JSON object
BETWEEN_BLOCKS = "\n\n"


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    conversation: Conversation
    stream: bool


def parse(raw: bytes, headers: Mapping[str, str], default_max_tokens: int) -> MessagesRequest:
    """Of a request to answer or to count. Raises Refusal (400) that names the field."""
    body = json_object(raw)
    for name in ("mcp_servers", "container"):
        if body.get(name):
            raise bad_field(name, "this server does not support it; leave it out", "unsupported_value")
    model = string(body, "model")
    if not model:
        raise bad_field("model", "is missing: name the model to answer", "missing_field")
    metadata = mapping(body, "metadata")
    hints = Hints(metadata=metadata, safety_identifier=_end_user(string(metadata, "user_id")))
    tools = _tools(body)
    choice, parallel = _choice(mapping(body, "tool_choice"), [name for name, _ in tools])
    conversation = Conversation(
        policy=model,
        messages=(*_system(body.get("system"), "system"), *_messages(body)),
        sampling=_sampling(body, default_max_tokens),
        tools=tuple(tool for _, tool in tools),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        **identify(headers, raw, hints).fields(),
    )
    return MessagesRequest(conversation, boolean(body, "stream") or False)


def _end_user(user_id: str | None) -> str | None:
    """Claude Code packs its session into the field, which then names no person that comes again."""
    return None if user_id is None or user_id.startswith("{") or "_session_" in user_id else user_id


def _sampling(body: Body, default_max_tokens: int) -> Sampling:
    given = {
        "temperature": number(body, "temperature", 0, 2),
        "top_p": number(body, "top_p", 1e-6, 1),
        "top_k": integer(body, "top_k", 0, 2**31 - 1) or None,
        "grammar": _grammar(body),
    }
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    most = integer(body, "max_tokens", 1, 2**31 - 1) or default_max_tokens
    return Sampling(max_tokens=most, stop=stop_strings(body.get("stop_sequences"), "stop_sequences"), **known)


def _grammar(body: Body) -> Grammar | None:
    form, where = mapping(mapping(body, "output_config"), "format", "output_config."), "output_config.format"
    if not form:
        form, where = mapping(body, "output_format"), "output_format"  # how earlier betas spelled it
    if not form:
        return None
    if form.get("type") != "json_schema":
        raise bad_field(f"{where}.type", f"must be json_schema, not {form.get('type')!r:.80}")
    return schema_grammar(form.get("schema"), f"{where}.schema")


# ------------------------------------------------------------------------------------------------------- tools


def _tools(body: Body) -> list[tuple[str, Json]]:
    """(name, tool) of each that the client runs itself."""
    tools = []
    for where, item in items(body, "tools"):
        if item.get("type") not in (None, "custom"):
            complaint = f"tools that the server runs are not supported, {item['type']!r:.80} neither; leave it out"
            raise bad_field(f"{where}.type", complaint, "unsupported_value")
        tool = function_tool(item, where, "input_schema")
        tools.append((item["name"], tool))
    return tools


def _choice(choice: Body, names: list[str]) -> tuple[str, bool]:
    """What Conversation calls the choice, and whether calls may be parallel."""
    parallel = not boolean(choice, "disable_parallel_tool_use")
    form = choice.get("type", "auto")
    if form == "tool":
        if choice.get("name") not in names:
            complaint = f"names {choice.get('name')!r:.80}; tools here: {', '.join(names) or 'none'}"
            raise bad_field("tool_choice.name", complaint)
        return f"={choice['name']}", parallel
    if form not in CHOICES:
        raise bad_field("tool_choice.type", f"must be auto, any, tool or none, not {form!r:.80}")
    return CHOICES[form], parallel


# ---------------------------------------------------------------------------------------------------- messages


def _system(value: object, where: str) -> list[Message]:
    if value is None or value == []:
        return []
    prompt = [block for block in _texts(value, where) if not block.startswith(NO_PROMPT)]
    return [Message("system", BETWEEN_BLOCKS.join(prompt))] if prompt else []


def _messages(body: Body) -> list[Message]:
    if body.get("messages") is None:
        raise bad_field("messages", "is missing", "missing_field")
    messages = [message for where, item in items(body, "messages") for message in _turn(item, where)]
    if not messages:
        raise bad_field("messages", "must hold at least one message")
    if messages[-1].role == "assistant":
        raise bad_field("messages", "the last message must not be the assistant's: there is nothing to answer")
    return messages


def _turn(item: Body, where: str) -> list[Message]:
    """One message of the wire, which is several of ours where it holds results of tools."""
    role, content, where = item.get("role"), item.get("content"), f"{where}.content"
    if role not in ROLES:
        raise bad_field(f"{where.removesuffix('content')}role", f"must be one of {', '.join(ROLES)}, not {role!r:.80}")
    if role == "system":
        return _system(content, where)
    if isinstance(content, str):
        return [Message(role, content)]
    blocks = list(_blocks(content, where))
    return [_assistant(blocks)] if role == "assistant" else list(_user(blocks))


def _user(blocks: list[tuple[str, Body]]) -> Iterator[Message]:
    """Results as tool messages, the text around them as the user's, in their order."""
    said: list[str] = []
    for where, block in blocks:
        if block["type"] != "tool_result":
            said.append(_text_of(block, where))
            continue
        if said:
            yield Message("user", BETWEEN_BLOCKS.join(said))
            said = []
        yield _result(block, where)
    if said or not blocks:
        yield Message("user", BETWEEN_BLOCKS.join(said))


def _result(block: Body, where: str) -> Message:
    content = block.get("content")
    said = "" if content is None else BETWEEN_BLOCKS.join(_texts(content, f"{where}.content"))
    failed = boolean(block, "is_error") or False
    return Message("tool", f"Error: {said}" if failed else said, tool_call_id=text(block, "tool_use_id", where))


def _assistant(blocks: list[tuple[str, Body]]) -> Message:
    """Its texts are put together as they were sampled: with nothing between them."""
    said, thought, calls = "", "", []
    for where, block in blocks:
        if block["type"] == "thinking":
            thought += text(block, "thinking", where)
        elif block["type"] == "tool_use":
            calls.append(_call(block, where))
        elif block["type"] != "redacted_thinking":  # nobody here can read that
            said += _text_of(block, where)
    return Message("assistant", said, tool_calls=tuple(calls), reasoning=thought or None)


def _call(block: Body, where: str) -> ToolCall:
    given = block.get("input")
    if not isinstance(given, dict):
        raise bad_field(f"{where}.input", f"must be an object, not {kind(given)}", "invalid_type")
    invalid = given.get(INVALID_JSON)
    arguments = invalid if len(given) == 1 and isinstance(invalid, str) else orjson.dumps(given).decode()
    return ToolCall(text(block, "id", where), text(block, "name", where), arguments)


def tool_input(arguments: str) -> dict[str, Any]:
    """The `input` of a call with these arguments; those that are no JSON object are kept as the text they are."""
    try:
        given = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        given = None
    return given if isinstance(given, dict) else {INVALID_JSON: arguments}


def _blocks(value: object, where: str) -> Iterator[tuple[str, Body]]:
    """(path, block) of each block, which has a type."""
    if not isinstance(value, list):
        raise bad_field(where, f"must be a string or a list of blocks, not {kind(value)}", "invalid_type")
    for at, block in enumerate(value):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise bad_field(f"{where}[{at}]", "must be an object with a type", "invalid_type")
        yield f"{where}[{at}]", block


def _texts(value: object, where: str) -> list[str]:
    """Of a string, or of blocks that are text."""
    if isinstance(value, str):
        return [value]
    return [_text_of(block, path) for path, block in _blocks(value, where)]


def _text_of(block: Body, where: str) -> str:
    if block["type"] in UNREADABLE:
        raise bad_field(where, f"this model reads no {UNREADABLE[block['type']]}", "unsupported_value")
    if block["type"] != "text":
        raise bad_field(where, f"blocks of type {block['type']!r:.80} are not supported here", "unsupported_value")
    return text(block, "text", where)
