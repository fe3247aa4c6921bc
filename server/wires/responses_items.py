"""The items of a responses request's `input` → messages."""

from __future__ import annotations

import base64
import binascii

import orjson

from agent_rl.types import Message, ToolCall
from server.refusal import bad_field
from server.wires.request import Body, items, kind, text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
UNREADABLE = {"input_image": "images", "input_file": "files", "input_audio": "audio"}


def messages_of(value: object) -> tuple[Message, ...]:
    """The items of `input`. Reasoning, text and calls in a row are one answer."""
    if isinstance(value, str):
        return (Message("user", value),)
    messages: list[Message] = []
    for where, item in items({"input": value}, "input"):
        message = _message(item, where)
        if messages and _is_one_answer(messages[-1], message):
            messages[-1] = _put_together(messages[-1], message)
        else:
            messages.append(message)
    if not messages:
        raise bad_field("input", "must be a string or a list of at least one item", "missing_field")
    return tuple(messages)


def _message(item: Body, where: str) -> Message:
    """One item; of an answer, a part of its message."""
    kind_of_it = item.get("type", "message")
    if kind_of_it == "message":
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise bad_field(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {role!r:.80}")
        return Message(ROLES[role], _content(item.get("content"), f"{where}.content"))
    if kind_of_it == "reasoning":
        return Message("assistant", "", reasoning=_thought(item, where))
    if kind_of_it in ("function_call", "custom_tool_call"):
        return Message("assistant", "", tool_calls=(_call(item, where),))
    if kind_of_it in ("function_call_output", "custom_tool_call_output"):
        output = _content(item.get("output"), f"{where}.output")
        return Message("tool", output, tool_call_id=text(item, "call_id", where))
    raise bad_field(f"{where}.type", f"items of type {kind_of_it!r:.80} are not supported", "unsupported_value")


def _is_one_answer(before: Message, after: Message) -> bool:
    """An answer has reasoning first, then text, then calls."""
    if before.role != "assistant" or after.role != "assistant":
        return False
    return bool(after.tool_calls) or not (before.content or before.tool_calls)


def _put_together(before: Message, after: Message) -> Message:
    reasoning = "".join(filter(None, (before.reasoning, after.reasoning)))
    calls = before.tool_calls + after.tool_calls
    return Message("assistant", before.content + after.content, tool_calls=calls, reasoning=reasoning or None)


def _call(item: Body, where: str) -> ToolCall:
    if item.get("type") == "custom_tool_call":
        arguments = orjson.dumps({"input": text(item, "input", where)}).decode()
    else:
        arguments = text(item, "arguments", where)
    name = flat_name(item.get("namespace"), text(item, "name", where))
    return ToolCall(text(item, "call_id", where), name, arguments)


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


def flat_name(namespace: object, name: str) -> str:
    """What the model calls a tool: one within a namespace has that in its name."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name
