"""Who a request says it comes from, whatever wire it came over: session, end user, train and store, retry key.

A client's id is correlation, never authority: everything is scoped by API key first. Nothing here is secret or trusted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from agent_rl.types import Conversation, Message
from server.refusal import Refusal

LONGEST_ID = 256
URL_SESSION = "x-agent-rl-session"  # set by the edge for /s/{session}/v1/…; one that a client sends is removed there
HEADERS = (  # strongest first
    "x-session-id",
    "x-claude-code-session-id",
    "session-id",  # Codex
    "session_id",  # Codex, older
    "x-opencode-session",
    "x-openclaw-session-key",
    "x-qwen-code-session-id",
    "x-session-affinity",
)
USER_ID = re.compile(r"_session_([0-9a-fA-F-]{36})$")  # how older Claude Codes hide it in metadata.user_id


@dataclass(frozen=True, slots=True)
class Hints:
    """What a wire found in its body that names a session, strongest first within its kind."""

    prompt_cache_key: str | None = None
    conversation: str | None = None  # Responses: `conversation`, or the session of `previous_response_id`
    metadata: Mapping[str, Any] = field(default_factory=dict)  # OpenAI's and Anthropic's
    user: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """The fields of a Conversation that every wire fills in alike: `Conversation(..., **identity.fields())`."""

    session_id: str | None
    session_rule: str | None
    end_user: str | None
    train: bool | None
    store: bool | None
    retry_key: str
    retry: bool

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def identify(headers: Mapping[str, str], raw_body: bytes, hints: Hints) -> Identity:
    """The first rule that names a session wins; the rules are in the order of `_sessions`. `headers` is Starlette's.

    Raises Refusal (400) for an id that cannot be used, naming its source.
    """
    rule, session_id = next(((rule, found) for rule, found in _sessions(headers, hints) if found), (None, None))
    if session_id is not None and rule is not None:
        _check_id(rule, session_id)
    end_user = hints.safety_identifier or hints.user
    if end_user is not None:
        _check_id("user", end_user)
    idempotency_key = headers.get("idempotency-key")
    return Identity(
        session_id=session_id,
        session_rule=rule,
        end_user=end_user or None,
        train=_train(headers.get("x-train"), hints.metadata.get("train")),
        store=hints.store,
        retry_key=hashlib.sha256((idempotency_key or "").encode() + b"\0" + raw_body).hexdigest(),
        retry=idempotency_key is not None or headers.get("x-stainless-retry-count", "0") != "0",
    )


def _sessions(headers: Mapping[str, str], hints: Hints) -> Iterator[tuple[str, str | None]]:
    """(rule, the id that it finds), strongest first."""
    yield "url", headers.get(URL_SESSION)
    for name in HEADERS:
        yield name, headers.get(name)
    yield "x-codex-turn-metadata", _inside(headers.get("x-codex-turn-metadata"), "session_id")
    yield "prompt_cache_key", hints.prompt_cache_key
    yield "conversation", hints.conversation
    yield "metadata.user_id", _hidden(hints.metadata.get("user_id"))
    for name in ("session_id", "thread_id"):
        value = hints.metadata.get(name)
        yield f"metadata.{name}", value if isinstance(value, str) else None
    yield "user", hints.user
    yield "traceparent", _trace(headers.get("traceparent"))


def _inside(text: object, name: str) -> str | None:
    """A string field of a JSON object that arrives as text."""
    try:
        value = orjson.loads(text) if isinstance(text, str) else None
    except orjson.JSONDecodeError:
        return None
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def _hidden(user_id: object) -> str | None:
    """The session in Anthropic's metadata.user_id: JSON with `session_id`, or `…_session_<uuid>`."""
    if not isinstance(user_id, str):
        return None
    match = USER_ID.search(user_id)
    return match[1] if match else _inside(user_id, "session_id")


def _trace(traceparent: str | None) -> str | None:
    """The trace id of W3C's `00-<trace>-<span>-<flags>`."""
    parts = (traceparent or "").split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 and parts[1].strip("0") else None


def _check_id(source: str, value: str) -> None:
    if len(value) > LONGEST_ID or not value.isprintable() or (source != "user" and not value.isascii()):
        complaint = f"{source}: at most {LONGEST_ID} printable ASCII characters, not {value!r:.80}"
        raise Refusal(400, complaint, code="invalid_value", param=source)


def _train(header: str | None, field: object) -> bool | None:
    """False if either says so: an explicit no always wins; None if neither speaks."""
    said = [str(value).strip().lower() for value in (header, field) if value is not None]
    for value in said:
        if value not in ("true", "false"):
            raise Refusal(400, f"x-train and metadata.train are true or false, not {value!r}", param="x-train")
    return None if not said else "false" not in said


# ------------------------------------------------------------------------------------------------ side requests

# What agents ask beside the conversation, in the words of their own prompts: titles, topics, summaries
ASIDE = re.compile(
    r"you are a title generator"
    r"|(generate|write|create) an? (concise|short|brief|\d+-\d+ word)[^.\n]{0,40}\btitle\b"
    r"|analyze if this message indicates a new conversation topic"
    r"|summarize this (coding )?conversation in under"
    r"|your task is to create a detailed summary of the conversation so far"
    r"|context checkpoint compaction"
    r"|context summarization assistant"
    r"|^### task:\s*generate (a concise|\d+-\d+ broad)",
    re.IGNORECASE | re.MULTILINE,
)


def is_aside(conversation: Conversation) -> bool:
    """True for a title, a summary or a warm-up, which agents send beside the conversation that they hold.

    Asked of the newest user message and the system prompt; a request for a single token is a warm-up.
    """
    if conversation.side or conversation.sampling.max_tokens == 1:
        return True
    messages = conversation.messages
    last = next((m for m in reversed(messages) if m.role == "user"), None)
    return any(ASIDE.search(m.content) for m in (*_systems(messages), *([last] if last else [])))


def _systems(messages: tuple[Message, ...]) -> list[Message]:
    """Short system prompts alone: a long one that mentions titles is an agent's, not a title generator's."""
    return [m for m in messages if m.role == "system" and len(m.content) < 4000]
