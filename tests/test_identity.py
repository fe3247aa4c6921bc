"""Which session, end user and wish a request's headers and body name; what agents ask beside their conversation."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.datastructures import Headers

from agent_rl.types import Conversation, Message, Sampling
from server.identity import Hints, identify, is_aside
from server.refusal import Refusal

UUID = "0199c6d4-1f2e-7a3b-8c4d-5e6f708192a3"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
EVERYTHING: list[tuple[str, dict[str, str], dict[str, Any]]] = [  # strongest first: (rule, headers, hints) that say "s"
    ("url", {"x-agent-rl-session": "s"}, {}),
    ("x-session-id", {"x-session-id": "s"}, {}),
    ("x-claude-code-session-id", {"x-claude-code-session-id": "s"}, {}),
    ("session-id", {"session-id": "s"}, {}),
    ("session_id", {"session_id": "s"}, {}),
    ("x-opencode-session", {"x-opencode-session": "s"}, {}),
    ("x-openclaw-session-key", {"x-openclaw-session-key": "s"}, {}),
    ("x-qwen-code-session-id", {"x-qwen-code-session-id": "s"}, {}),
    ("x-session-affinity", {"x-session-affinity": "s"}, {}),
    ("x-codex-turn-metadata", {"x-codex-turn-metadata": '{"session_id": "s", "turn_id": "t"}'}, {}),
    ("prompt_cache_key", {}, {"prompt_cache_key": "s"}),
    ("conversation", {}, {"conversation": "s"}),
    ("metadata.user_id", {}, {"metadata": {"user_id": '{"session_id": "s"}'}}),
    ("metadata.session_id", {}, {"metadata": {"session_id": "s"}}),
    ("metadata.thread_id", {}, {"metadata": {"thread_id": "s"}}),
    ("user", {}, {"user": "s"}),
]


@pytest.mark.parametrize("at", range(len(EVERYTHING)))
def test_the_strongest_rule_wins(at: int) -> None:
    headers: dict[str, str] = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    hints: dict[str, Any] = {}
    for _, more, hinted in reversed(EVERYTHING[at + 1 :]):
        headers |= {name: value.replace("s", "weaker") if value == "s" else value for name, value in more.items()}
        hints |= {name: "weaker" if value == "s" else value for name, value in hinted.items()}
    rule, strongest, hinted = EVERYTHING[at]
    found = identify(Headers(headers | strongest), b"", Hints(**hints | hinted))
    assert (found.session_rule, found.session_id) == (rule, "s")


def test_older_claude_codes_hide_the_session_in_the_user_id() -> None:
    hints = Hints(metadata={"user_id": f"user_ab12_account__session_{UUID}"})
    assert identify(Headers({}), b"", hints).session_id == UUID
    assert identify(Headers({}), b"", Hints(metadata={"user_id": "just a user"})).session_id is None


def test_a_trace_is_the_last_resort() -> None:
    found = identify(Headers({"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}), b"", Hints())
    assert (found.session_rule, found.session_id) == ("traceparent", TRACE)
    for broken in ("00-0-0-01", f"00-{'0' * 32}-00f067aa0ba902b7-01", TRACE):
        assert identify(Headers({"traceparent": broken}), b"", Hints()).session_rule is None


def test_the_safety_identifier_names_the_user_and_no_session() -> None:
    found = identify(Headers({}), b"", Hints(safety_identifier="ann"))
    assert (found.session_id, found.end_user) == (None, "ann")


@pytest.mark.parametrize("bad", ["x" * 257, "naïve", "tab\there"])
def test_ids_that_cannot_come_back_in_a_header_are_refused(bad: str) -> None:
    with pytest.raises(Refusal, match="x-session-id") as refused:
        identify({"x-session-id": bad}, b"", Hints())
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("header", "field", "train"),
    [
        (None, None, None),
        ("true", None, True),
        ("false", "true", False),
        ("true", "FALSE", False),
        (None, False, False),
    ],
)
def test_an_explicit_no_to_training_wins(header: str | None, field: object, train: bool | None) -> None:
    headers = {} if header is None else {"x-train": header}
    metadata = {} if field is None else {"train": field}
    assert identify(headers, b"", Hints(metadata=metadata)).train is train


def test_a_retry_has_the_key_of_its_first_try() -> None:
    first = identify(Headers({"x-stainless-retry-count": "0"}), b"body", Hints())
    again = identify(Headers({"x-stainless-retry-count": "1"}), b"body", Hints())
    other = identify(Headers({"x-stainless-retry-count": "1"}), b"other", Hints())
    assert (first.retry, again.retry) == (False, True)
    assert first.retry_key == again.retry_key != other.retry_key
    keyed = identify(Headers({"idempotency-key": "k"}), b"body", Hints())
    assert keyed.retry
    assert keyed.retry_key != first.retry_key


def conversation(*messages: Message, max_tokens: int = 100) -> Conversation:
    return Conversation("default", messages, Sampling(max_tokens))


@pytest.mark.parametrize(
    "text",
    [
        "Analyze if this message indicates a new conversation topic. If it does, extract a 2-3 word title",
        "You are a title generator. You output ONLY a thread title. Nothing else.",
        "Generate a concise, sentence-case title (3-7 words) that captures the topic",
        "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff summary for another LLM",
        "### Task:\nGenerate a concise, 3-5 word title with an emoji",
    ],
)
def test_what_agents_ask_beside_the_conversation(text: str) -> None:
    assert is_aside(conversation(Message("system", text), Message("user", "Hello")))
    assert is_aside(conversation(Message("user", text)))


def test_what_people_ask_is_no_aside() -> None:
    assert not is_aside(conversation(Message("user", "What is a good title for a book about tea?")))
    assert not is_aside(conversation(Message("system", "You are a coding agent." * 200), Message("user", "Hello")))


def test_a_request_for_one_token_is_a_warm_up() -> None:
    assert is_aside(conversation(Message("user", "quota"), max_tokens=1))
