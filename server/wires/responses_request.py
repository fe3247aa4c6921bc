"""The body of `POST /v1/responses` (or of a `response.create` frame) → Conversation.

What cannot be honoured is refused by name. Built-in tools that a client merely offers (`web_search`, `local_shell`, …)
are left out of the prompt and named in `x-tools-left-out`; demanded ones are refused. A custom tool is shown to the
model as a function with one string, `input`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    kind,
    mapping,
    number,
    schema_grammar,
    string,
    text,
)

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
UNREADABLE = {"input_image": "images", "input_file": "files", "input_audio": "audio"}
CUSTOM: Json = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed request; `previous` names the response that it goes on behind, which the wire looks up."""

    conversation: Conversation  # without what `previous` brings
    instructions: str | None
    previous: str | None
    stream: bool
    body: Body  # what the response object repeats
    custom: frozenset[str]  # names of custom tools
    left_out: tuple[str, ...]  # types of built-in tools that the model does not see
    encrypted: bool  # reasoning is wanted back as `encrypted_content`

    def behind(self, past: tuple[Message, ...]) -> Conversation:
        """The conversation that goes on behind `past`; instructions stay those of `past` unless they are given anew."""
        if self.instructions is not None and past and past[0].role == "system":
            past = past[1:]
        new = self.conversation.messages
        head = new[:1] if self.instructions is not None else ()
        return replace(self.conversation, messages=(*head, *past, *new[len(head) :]))


def parse(
    body: Body, raw: bytes, headers: Mapping[str, str], default_max_tokens: int, session: str | None = None
) -> Asked:
    """`session`: of the previous response. Raises Refusal (400) that names the field."""
    model = string(body, "model")
    if not model:
        raise bad_field("model", "is missing: name the model to answer", "missing_field")
    for name in ("background", "prompt", "max_tool_calls"):
        if body.get(name):
            raise bad_field(name, "this server does not support it; leave it out", "unsupported_value")
    if body.get("top_logprobs"):
        raise bad_field("top_logprobs", "this server does not support it; leave it out", "unsupported_value")
    seen, custom, left_out = _tools(body)
    tools, choice = _choice(body, seen)
    instructions = string(body, "instructions")
    system = () if instructions is None else (Message("system", instructions),)
    messages = (*system, *messages_of(body.get("input")))
    if messages[-1].role == "assistant":
        raise bad_field("input", "the last item must not be the assistant's: there is nothing to answer")
    hints = Hints(
        prompt_cache_key=string(body, "prompt_cache_key"),
        conversation=_conversation(body) or session,
        metadata=mapping(body, "metadata"),
        user=string(body, "user"),
        safety_identifier=string(body, "safety_identifier"),
        store=boolean(body, "store"),
    )
    include = body.get("include") or []
    return Asked(
        conversation=Conversation(
            policy=model,
            messages=messages,
            sampling=_sampling(body, default_max_tokens),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=boolean(body, "parallel_tool_calls") is not False,
            **identify(headers, raw, hints).fields(),
        ),
        instructions=instructions,
        previous=string(body, "previous_response_id"),
        stream=boolean(body, "stream") or False,
        body=body,
        custom=custom,
        left_out=left_out,
        encrypted=isinstance(include, list) and "reasoning.encrypted_content" in include,
    )


def _sampling(body: Body, default_max_tokens: int) -> Sampling:
    given = {
        "temperature": number(body, "temperature", 0, 2),
        "top_p": number(body, "top_p", 1e-6, 1),
        "seed": integer(body, "seed", -(2**63), 2**63 - 1),
        "grammar": _grammar(mapping(mapping(body, "text"), "format", "text.")),
    }
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_tokens=integer(body, "max_output_tokens", 1, 2**31 - 1) or default_max_tokens, **known)


def _grammar(form: Body) -> Grammar | None:
    kind_of_it = form.get("type", "text")
    if kind_of_it == "text":
        return None
    if kind_of_it == "json_object":
        return schema_grammar({"type": "object"}, "text.format")
    if kind_of_it == "json_schema":
        return schema_grammar(form.get("schema"), "text.format.schema")
    raise bad_field("text.format.type", f"must be text, json_object or json_schema, not {kind_of_it!r:.80}")


def _conversation(body: Body) -> str | None:
    value = body.get("conversation")
    return text(value, "id", "conversation") if isinstance(value, dict) else string(body, "conversation")


# ------------------------------------------------------------------------------------------------------- tools


def _tools(body: Body) -> tuple[dict[str, Json], frozenset[str], tuple[str, ...]]:
    """(what the model sees by name, which of them are custom, types of those it does not see)."""
    seen: dict[str, Json] = {}
    custom, left_out = set(), []
    for where, item in items(body, "tools"):
        within = items(item, "tools", f"{where}.") if item.get("type") == "namespace" else [(where, item)]
        for path, tool in within:
            if tool.get("type") == "function":
                seen[text(tool, "name", path)] = function_tool(tool, path, "parameters")
            elif tool.get("type") == "custom":
                name = text(tool, "name", path)
                seen[name] = function_tool(
                    {**tool, "description": _described(tool), "parameters": CUSTOM}, path, "parameters"
                )
                custom.add(name)
            else:
                left_out.append(text(tool, "type", path))
    return seen, frozenset(custom), tuple(left_out)


def _described(tool: Body) -> str:
    """A custom tool's description, and the grammar that its input should follow."""
    form = tool.get("format")
    grammar = f"\n{form['definition']}" if isinstance(form, dict) and isinstance(form.get("definition"), str) else ""
    return f"{tool.get('description') or ''}{grammar}"


def _choice(body: Body, tools: dict[str, Json]) -> tuple[tuple[Json, ...], str]:
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        names = [_named(item, tools) for _, item in items(choice, "tools", "tool_choice.")]
        tools, choice = {name: tools[name] for name in names}, choice.get("mode", "auto")
    if isinstance(choice, dict):
        return tuple(tools.values()), f"={_named(choice, tools)}"
    if choice not in ("auto", "none", "required"):
        raise bad_field("tool_choice", f"must be auto, none, required or name a tool, not {choice!r:.80}")
    return tuple(tools.values()), choice


def _named(choice: Body, tools: Mapping[str, Json]) -> str:
    name = choice.get("name")
    if choice.get("type") not in ("function", "custom") or name not in tools:
        there = ", ".join(tools) or "none"
        raise bad_field("tool_choice", f"names {name or choice.get('type')!r:.80}; tools here: {there}")
    return str(name)


# ------------------------------------------------------------------------------------------------------- items


def messages_of(value: object) -> tuple[Message, ...]:
    """The items of `input`. Reasoning, text and calls in a row are one answer."""
    if isinstance(value, str):
        return (Message("user", value),)
    messages: list[Message] = []
    thought: str | None = None
    for where, item in items({"input": value}, "input"):
        kind_of_it = item.get("type", "message")
        if kind_of_it == "reasoning":
            thought = _thought(item, where) or thought
        elif kind_of_it in ("function_call", "custom_tool_call"):
            if not messages or messages[-1].role != "assistant":
                messages.append(Message("assistant", "", reasoning=thought))
            call = _call(item, where)
            messages[-1] = replace(messages[-1], tool_calls=(*messages[-1].tool_calls, call))
            thought = None
        elif kind_of_it in ("function_call_output", "custom_tool_call_output"):
            output = _content(item.get("output"), f"{where}.output")
            messages.append(Message("tool", output, tool_call_id=text(item, "call_id", where)))
        elif kind_of_it == "message":
            role = item.get("role")
            if not isinstance(role, str) or role not in ROLES:
                raise bad_field(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {role!r:.80}")
            content = _content(item.get("content"), f"{where}.content")
            reasoning = thought if role == "assistant" else None
            thought = None if role == "assistant" else thought
            messages.append(Message(ROLES[role], content, reasoning=reasoning))
        else:
            raise bad_field(f"{where}.type", f"items of type {kind_of_it!r:.80} are not supported", "unsupported_value")
    if not messages:
        raise bad_field("input", "must be a string or a list of at least one item", "missing_field")
    return tuple(messages)


def _call(item: Body, where: str) -> ToolCall:
    if item.get("type") == "custom_tool_call":
        arguments = orjson.dumps({"input": text(item, "input", where)}).decode()
    else:
        arguments = text(item, "arguments", where)
    return ToolCall(text(item, "call_id", where), text(item, "name", where), arguments)


def _thought(item: Body, where: str) -> str:
    """The reasoning in an item: in the open, as its summary, or as we gave it out."""
    for name in ("content", "summary"):
        parts = [text(part, "text", path) for path, part in items(item, name, f"{where}.")]
        if parts:
            return "".join(parts)
    sealed = item.get("encrypted_content")
    try:
        return base64.b64decode(sealed, validate=True).decode() if isinstance(sealed, str) else ""
    except (binascii.Error, UnicodeDecodeError) as error:
        raise bad_field(f"{where}.encrypted_content", "is not what this server gave out") from error


def _content(value: object, where: str) -> str:
    """A string, or a list of parts that are text, put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_field(where, f"must be a string or a list of text parts, not {kind(value)}", "invalid_type")
    texts = []
    for at, part in enumerate(value):
        if not isinstance(part, dict):
            raise bad_field(f"{where}[{at}]", f"must be an object, not {kind(part)}", "invalid_type")
        if part.get("type") in UNREADABLE:
            complaint = f"this model reads no {UNREADABLE[part['type']]}"
            raise bad_field(f"{where}[{at}]", complaint, "unsupported_value")
        if part.get("type") not in TEXTS:
            complaint = f"parts of type {part.get('type')!r:.80} are not supported"
            raise bad_field(f"{where}[{at}]", complaint, "unsupported_value")
        texts.append(text(part, "refusal" if part["type"] == "refusal" else "text", f"{where}[{at}]"))
    return "".join(texts)
