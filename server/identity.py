"""Who a request says it comes from, whatever wire it came over: session, end user, train and store, retry key.

A client's id is correlation, never authority: everything is scoped by API key first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    retry_key: str | None
    side: bool

    def fields(self) -> dict[str, Any]:
        raise NotImplementedError


def identify(headers: Mapping[str, str], raw_body: bytes, hints: Hints) -> Identity:
    """The first rule that names a session wins. Raises Refusal (400) for an id that cannot be used, naming its source.

    `headers` is Starlette's (case-insensitive); a URL prefix `/s/{session}` arrives in them as `x-agent-rl-session`,
    put there by the edge, which removes any that a client sent.
    """
    raise NotImplementedError
