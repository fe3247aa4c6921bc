"""The body of `POST /v1/chat/completions` → Conversation. What cannot be honoured is refused by name, never ignored;
fields that change nothing about the answer (`service_tier`, `reasoning_effort`, unknown ones) are accepted.

A tool's schema and `parallel_tool_calls: false` are held to where `tool_choice` demands a call; where the model is free
to call or not, they are its to follow, a tool's `strict` included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_rl.types import Conversation, Grammar, Json, Message, Sampling, ToolCall
from server.identity import Hints, identify
from server.refusal import bad_field
from server.wires.request import (
    Body,
    boolean,
    format_grammar,
    function_tool,
    integer,
    items,
    json_object,
    kind,
    mapping,
    number,
    stop_strings,
    string,
    text,
)

MOST_CHOICES = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
UNREADABLE = {"image_url": "images", "input_audio": "audio", "file": "files", "video_url": "videos"}
# field → the values that ask for nothing
HARMLESS: dict[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
OLDER_FORMS = {"functions": "tools", "function_call": "tool_choice"}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    conversation: Conversation
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool


def parse(raw: bytes, headers: Mapping[str, str], default_max_tokens: int) -> ChatRequest:
    """Raises Refusal (400) that names the field."""
    body = json_object(raw)
    _refuse_unsupported(body)
    model = string(body, "model")
    if not model:
        raise bad_field("model", "is missing: name the model to answer", "missing_field")
    sampling = _sampling(body, default_max_tokens)
    logprobs = boolean(body, "logprobs") or False
    if logprobs and sampling.ratio_free:
        raise bad_field("logprobs", "greedy and penalised sampling have none; leave it out", "unsupported_value")
    hints = Hints(
        prompt_cache_key=string(body, "prompt_cache_key"),
        metadata=mapping(body, "metadata"),
        user=string(body, "user"),
        safety_identifier=string(body, "safety_identifier"),
        store=boolean(body, "store"),
    )
    tools, choice = _tools(body)
    parallel = boolean(body, "parallel_tool_calls")
    conversation = Conversation(
        policy=model,
        messages=_messages(body),
        sampling=sampling,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel is not False,
        **identify(headers, raw, hints).fields(),
    )
    return ChatRequest(
        conversation=conversation,
        n=integer(body, "n", 1, MOST_CHOICES) or 1,
        stream=boolean(body, "stream") or False,
        include_usage=boolean(mapping(body, "stream_options"), "include_usage") or False,
        logprobs=logprobs,
    )


def _refuse_unsupported(body: Body) -> None:
    for name, harmless in HARMLESS.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise bad_field(name, "this server does not support it; leave it out", "unsupported_value")
    for name, newer in OLDER_FORMS.items():
        if body.get(name):
            raise bad_field(name, f"this server takes the newer form alone: use '{newer}'", "unsupported_value")


def _sampling(body: Body, default_max_tokens: int) -> Sampling:
    most = integer(body, "max_completion_tokens", 1, 2**31 - 1) or integer(body, "max_tokens", 1, 2**31 - 1)
    given = {
        "temperature": number(body, "temperature", 0, 2),
        "top_p": number(body, "top_p", 1e-6, 1),
        "top_k": integer(body, "top_k", -1, 2**31 - 1),
        "min_p": number(body, "min_p", 0, 1),
        "seed": integer(body, "seed", -(2**63), 2**63 - MOST_CHOICES),
        "frequency_penalty": number(body, "frequency_penalty", -2, 2),
        "presence_penalty": number(body, "presence_penalty", -2, 2),
        "grammar": _grammar(mapping(body, "response_format")),
    }
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_tokens=most or default_max_tokens, stop=stop_strings(body.get("stop"), "stop"), **known)


def _grammar(form: Body) -> Grammar | None:
    wanted = mapping(form, "json_schema", "response_format.")
    return format_grammar(form, wanted.get("schema"), "response_format", "response_format.json_schema.schema")


# ------------------------------------------------------------------------------------------------------- tools


def _tools(body: Body) -> tuple[tuple[Json, ...], str]:
    """The tools on offer, and what Conversation calls the choice."""
    tools = {}
    for where, item in items(body, "tools"):
        if item.get("type") != "function":
            complaint = f"only functions are supported, not {item.get('type')!r:.80}"
            raise bad_field(f"{where}.type", complaint, "unsupported_value")
        tool = function_tool(mapping(item, "function", f"{where}."), f"{where}.function", "parameters")
        tools[item["function"]["name"]] = tool
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = mapping(choice, "allowed_tools", "tool_choice.")
        names = [_named(item, tools) for _, item in items(allowed, "tools", "tool_choice.allowed_tools.")]
        tools = {name: tools[name] for name in names}
        choice = allowed.get("mode", "auto")
    if isinstance(choice, dict):
        return tuple(tools.values()), f"={_named(choice, tools)}"
    if choice not in ("auto", "none", "required"):
        raise bad_field("tool_choice", f"must be auto, none, required or name a tool, not {choice!r:.80}")
    return tuple(tools.values()), choice


def _named(choice: Body, tools: Mapping[str, Json]) -> str:
    """Of `{"type": "function", "function": {"name": NAME}}`, where NAME is on offer."""
    if choice.get("type") != "function":
        raise bad_field(
            "tool_choice", f"tools of type {choice.get('type')!r:.80} are not supported", "unsupported_value"
        )
    name = mapping(choice, "function", "tool_choice.").get("name")
    if name not in tools:
        raise bad_field("tool_choice", f"names the tool {name!r:.80}; tools here: {', '.join(tools) or 'none'}")
    return str(name)


# ---------------------------------------------------------------------------------------------------- messages


def _messages(body: Body) -> tuple[Message, ...]:
    if body.get("messages") is None:
        raise bad_field("messages", "is missing", "missing_field")
    messages = tuple(_message(item, where) for where, item in items(body, "messages"))
    if not messages:
        raise bad_field("messages", "must hold at least one message")
    if messages[-1].role == "assistant":
        raise bad_field("messages", "the last message must not be the assistant's: there is nothing to answer")
    return messages


def _message(item: Body, where: str) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_field(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {role!r:.80}")
    name = item.get("name")
    if name is not None and not isinstance(name, str):
        raise bad_field(f"{where}.name", f"must be a string, not {kind(name)}", "invalid_type")
    if role == "assistant":
        return _assistant(item, where, name)
    content = _content(item.get("content"), f"{where}.content")
    call_id = text(item, "tool_call_id", where) if role == "tool" else None
    return Message(ROLES[role], content, name=name, tool_call_id=call_id)


def _assistant(item: Body, where: str, name: str | None) -> Message:
    for field in ("function_call", "audio"):
        if item.get(field):
            raise bad_field(f"{where}.{field}", "is not supported", "unsupported_value")
    calls = tuple(_call(call, path) for path, call in items(item, "tool_calls", f"{where}."))
    content = item.get("content")
    if content is None:
        content = item.get("refusal")
    if content is None and calls:
        content = ""
    reasoning = item.get("reasoning_content", item.get("reasoning"))
    if reasoning is not None and not isinstance(reasoning, str):
        raise bad_field(f"{where}.reasoning_content", f"must be a string, not {kind(reasoning)}", "invalid_type")
    text_of_it = _content(content, f"{where}.content")
    return Message("assistant", text_of_it, name=name, tool_calls=calls, reasoning=reasoning or None)


def _call(item: Body, where: str) -> ToolCall:
    if item.get("type", "function") != "function":
        raise bad_field(f"{where}.type", f"must be function, not {item['type']!r:.80}", "unsupported_value")
    function = mapping(item, "function", f"{where}.")
    return ToolCall(
        text(item, "id", where),
        text(function, "name", f"{where}.function"),
        text(function, "arguments", f"{where}.function"),
    )


def _content(value: object, where: str) -> str:
    """A string, or a list of parts that are text, put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_field(where, f"must be a string or a list of text parts, not {kind(value)}", "invalid_type")
    return "".join(_part(part, f"{where}[{at}]") for at, part in enumerate(value))


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise bad_field(where, "must be an object with a type", "invalid_type")
    if part["type"] in UNREADABLE:
        raise bad_field(where, f"this model reads no {UNREADABLE[part['type']]}", "unsupported_value")
    if part["type"] not in ("text", "refusal"):
        raise bad_field(where, f"parts of type {part['type']!r:.80} are not supported", "unsupported_value")
    return text(part, part["type"], where)
