"""The body of `POST /v1/responses` (or of a `response.create` frame) → Conversation.

What cannot be honoured is refused by name. Built-in tools that a client merely offers (`web_search`, `local_shell`, …)
are left out of the prompt and named in `x-tools-left-out`; demanded ones are refused. A custom tool is shown to the
model as a function with one string, `input`; one within a namespace as `NAMESPACE__NAME`. `truncation` is accepted and
changes nothing: a prompt that is too long is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent_rl.types import Conversation, Json, Message, Sampling
from server.identity import Hints, identify
from server.refusal import bad_field
from server.wires.request import (
    Body,
    boolean,
    format_grammar,
    function_tool,
    integer,
    items,
    mapping,
    number,
    string,
    text,
)
from server.wires.responses_items import flat_name, messages_of

CUSTOM: Json = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
BUILT_IN = re.compile(r"[a-z0-9_]{1,64}")
INCLUDED = "reasoning.encrypted_content"
UNSUPPORTED = ("background", "prompt", "max_tool_calls", "top_logprobs")


@dataclass(frozen=True, slots=True)
class ToolNames:
    """How the client knows the tools that the model sees as functions with one flat name each."""

    custom: frozenset[str] = frozenset()  # those that take text
    spaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # flat name → (namespace, name)


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed request."""

    conversation: Conversation  # without what `previous_response_id` brings
    instructions: str | None
    stream: bool
    generate: bool  # False: a WebSocket's warm-up, to be gone on behind
    body: Body  # what the response object repeats
    names: ToolNames
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
    for name in UNSUPPORTED:
        if body.get(name):
            raise bad_field(name, "this server does not support it; leave it out", "unsupported_value")
    seen, names, left_out = _tools(body)
    tools, choice = _choice(body, seen)
    instructions = string(body, "instructions")
    system = () if instructions is None else (Message("system", instructions),)
    generate = boolean(body, "generate") is not False
    messages = (*system, *(messages_of(body.get("input")) if generate or body.get("input") else ()))
    if generate and messages[-1].role == "assistant":
        raise bad_field("input", "the last item must not be the assistant's: there is nothing to answer")
    hints = Hints(
        prompt_cache_key=string(body, "prompt_cache_key"),
        conversation=_conversation(body) or session,
        metadata=mapping(body, "metadata"),
        user=string(body, "user"),
        safety_identifier=string(body, "safety_identifier"),
        store=boolean(body, "store"),
    )
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
        stream=boolean(body, "stream") or False,
        generate=generate,
        body=body,
        names=names,
        left_out=left_out,
        encrypted=INCLUDED in _include(body),
    )


def _sampling(body: Body, default_max_tokens: int) -> Sampling:
    form = mapping(mapping(body, "text"), "format", "text.")
    given = {
        "temperature": number(body, "temperature", 0, 2),
        "top_p": number(body, "top_p", 1e-6, 1),
        "seed": integer(body, "seed", -(2**63), 2**63 - 1),
        "grammar": format_grammar(form, form.get("schema"), "text.format", "text.format.schema"),
    }
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_tokens=integer(body, "max_output_tokens", 1, 2**31 - 1) or default_max_tokens, **known)


def _include(body: Body) -> list[str]:
    """What else the client wants to have; of built-in tools, which never run here, there is nothing to give."""
    wanted = body.get("include") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise bad_field("include", "must be a list of strings", "invalid_type")
    if "message.output_text.logprobs" in wanted:
        raise bad_field("include", "this wire gives no logprobs; chat completions do", "unsupported_value")
    return wanted


def _conversation(body: Body) -> str | None:
    value = body.get("conversation")
    return text(value, "id", "conversation") if isinstance(value, dict) else string(body, "conversation")


# ------------------------------------------------------------------------------------------------------- tools


def _tools(body: Body) -> tuple[dict[str, Json], ToolNames, tuple[str, ...]]:
    """(what the model sees by name, how the client knows it, types of those that the model does not see)."""
    seen: dict[str, Json] = {}
    spaces: dict[str, tuple[str, str]] = {}
    custom, left_out = set(), []
    for where, item in items(body, "tools"):
        space = text(item, "name", where) if item.get("type") == "namespace" else None
        for path, tool in [(where, item)] if space is None else items(item, "tools", f"{where}."):
            kind_of_it = text(tool, "type", path)
            if kind_of_it in ("function", "custom"):
                own = text(tool, "name", path)
                name = flat_name(space, own)
                seen[name] = _function({**tool, "name": name}, path)
                custom |= {name} if kind_of_it == "custom" else set()
                spaces |= {} if space is None else {name: (space, own)}
            elif BUILT_IN.fullmatch(kind_of_it):
                left_out.append(kind_of_it)
            else:
                raise bad_field(f"{path}.type", f"there is no tool of type {kind_of_it!r:.80}")
    return seen, ToolNames(frozenset(custom), spaces), tuple(left_out)


def _function(tool: Body, where: str) -> Json:
    if tool["type"] == "custom":
        tool = {**tool, "description": _described(tool), "parameters": CUSTOM}
    return function_tool(tool, where, "parameters")


def is_custom(tool: Json) -> bool:
    """Of a tool as a turn has it."""
    function = tool.get("function")
    return isinstance(function, dict) and function.get("parameters") == CUSTOM


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
    name = flat_name(choice.get("namespace"), str(choice.get("name")))
    if choice.get("type") not in ("function", "custom") or name not in tools:
        there = ", ".join(tools) or "none"
        raise bad_field("tool_choice", f"names {choice.get('name') or choice.get('type')!r:.80}; tools here: {there}")
    return name
