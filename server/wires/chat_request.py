"""The body of `POST /v1/chat/completions` → Conversation. What cannot be honoured is refused by name, never ignored;
fields that change nothing about the answer (`store`, `service_tier`, unknown ones) are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_rl.types import Conversation, Message, Sampling
from server.refusal import Refusal, bad_field
from server.wires.request import Body, boolean, integer, json_object, kind, number, string

LONGEST_ID = 256
MOST_STOPS = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# field → the values that ask for nothing
HARMLESS: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "n": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    conversation: Conversation
    stream: bool
    include_usage: bool
    logprobs: bool


def parse(raw: bytes, headers: Mapping[str, str], default_max_tokens: int) -> ChatRequest:
    """Raises Refusal (400) that names the field."""
    body = json_object(raw)
    for name, harmless in HARMLESS.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise bad_field(name, "this server does not support it; leave it out", "unsupported_value")
    model = string(body, "model")
    if not model:
        raise bad_field("model", "is missing: name the model to answer", "missing_field")
    sampling = _sampling(body, default_max_tokens)
    logprobs = boolean(body, "logprobs") or False
    if logprobs and sampling.ratio_free:
        raise bad_field("logprobs", "greedy and penalised sampling have none; leave it out", "unsupported_value")
    metadata = _object(body, "metadata")
    session_id, rule = _session(headers, metadata)
    conversation = Conversation(
        policy=model,
        messages=_messages(body.get("messages")),
        sampling=sampling,
        session_id=session_id,
        session_rule=rule,
        end_user=string(body, "safety_identifier", LONGEST_ID) or string(body, "user", LONGEST_ID) or None,
        train=_train(headers.get("x-train"), metadata.get("train")),
    )
    options = _object(body, "stream_options")
    return ChatRequest(
        conversation=conversation,
        stream=boolean(body, "stream") or False,
        include_usage=boolean(options, "include_usage") or False,
        logprobs=logprobs,
    )


def _sampling(body: Body, default_max_tokens: int) -> Sampling:
    most = integer(body, "max_completion_tokens", 1, 2**31 - 1) or integer(body, "max_tokens", 1, 2**31 - 1)
    given = {
        "temperature": number(body, "temperature", 0, 2),
        "top_p": number(body, "top_p", 1e-6, 1),
        "top_k": integer(body, "top_k", -1, 2**31 - 1),
        "min_p": number(body, "min_p", 0, 1),
        "seed": integer(body, "seed", -(2**63), 2**63 - 1),
        "frequency_penalty": number(body, "frequency_penalty", -2, 2),
        "presence_penalty": number(body, "presence_penalty", -2, 2),
    }
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_tokens=most or default_max_tokens, stop=_stop(body.get("stop")), **known)


def _stop(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_field("stop", "must be a string or a list of strings, none of them empty", "invalid_type")
    if len(stops) > MOST_STOPS:
        raise bad_field("stop", f"at most {MOST_STOPS} strings, not {len(stops)}")
    return tuple(stops)


def _messages(value: object) -> tuple[Message, ...]:
    if value is None:
        raise bad_field("messages", "is missing", "missing_field")
    if not isinstance(value, list):
        raise bad_field("messages", f"must be a list, not {kind(value)}", "invalid_type")
    if not value:
        raise bad_field("messages", "must hold at least one message")
    messages = tuple(_message(item, f"messages[{at}]") for at, item in enumerate(value))
    if messages[-1].role == "assistant":
        raise bad_field("messages", "the last message must not be the assistant's: there is nothing to answer")
    return messages


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise bad_field(where, f"must be an object, not {kind(item)}", "invalid_type")
    role = item.get("role")
    if role in ("tool", "function") or item.get("tool_calls") or item.get("function_call"):
        raise bad_field(where, "tool calls and their results are not supported", "unsupported_value")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_field(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {role!r}")
    name = item.get("name")
    if name is not None and not isinstance(name, str):
        raise bad_field(f"{where}.name", f"must be a string, not {kind(name)}", "invalid_type")
    return Message(ROLES[role], _content(item.get("content"), f"{where}.content"), name=name)


def _content(value: object, where: str) -> str:
    """A string, or a list of text parts put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_field(where, f"must be a string or a list of text parts, not {kind(value)}", "invalid_type")
    texts = []
    for at, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad_field(f"{where}[{at}]", "must be an object with a type", "invalid_type")
        if part["type"] != "text":
            raise bad_field(f"{where}[{at}]", f"parts of type {part['type']!r} are not supported", "unsupported_value")
        if not isinstance(part.get("text"), str):
            raise bad_field(f"{where}[{at}].text", f"must be a string, not {kind(part.get('text'))}", "invalid_type")
        texts.append(part["text"])
    return "".join(texts)


def _object(body: Body, name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise bad_field(name, f"must be an object, not {kind(value)}", "invalid_type")
    return value or {}


def _session(headers: Mapping[str, str], metadata: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(the client's own session id, the rule that found it); (None, None) if it sent none."""
    own, rule = headers.get("x-session-id"), "x-session-id"
    if not own:
        own, rule = string(metadata, "session_id", LONGEST_ID), "metadata.session_id"
    if not own:
        return None, None
    if len(own) > LONGEST_ID or not (own.isascii() and own.isprintable()):  # it comes back in a header
        raise Refusal(400, f"{rule}: at most {LONGEST_ID} printable ASCII characters, not {own!r:.80}", param=rule)
    return own, rule


def _train(header: str | None, field: object) -> bool | None:
    """False if either says so: an explicit no always wins; None if neither speaks."""
    said = [str(value).strip().lower() for value in (header, field) if value is not None]
    for value in said:
        if value not in ("true", "false"):
            raise Refusal(400, f"x-train and metadata.train are true or false, not {value!r}", param="x-train")
    return None if not said else "false" not in said
