"""Which turn a request continues: through the gateway, and from memory, Redis or SQL alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway import AGENT, OTHER, OWNER, Gateway, running_gateway
from redis.asyncio import Redis
from tiny import CHATML, make_model

from agent_rl.experience.stream import Stream
from agent_rl.rendering import Renderer
from agent_rl.types import Conversation, Message, Sampling, Transcript
from server.sessions import Sessions, chains_of, derive_session_id, extend_chain

SCRIPT = {"rules": [{"user": "slowly", "text": "one two three", "token_s": 0.1}], "default": {"text": "Okay, 日本."}}
HELLO = {"role": "user", "content": "Hello"}
OKAY = {"role": "assistant", "content": "Okay, 日本."}
MORE = {"role": "user", "content": "More"}


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tiny_model, redis_url, tmp_path, script=SCRIPT) as running:
        yield running


async def ask(
    gateway: Gateway, *messages: dict[str, str], key: str = OWNER, session: str | None = None, **more: Any
) -> tuple[str, Transcript]:
    """(x-session-id, the turn as SQL has it)."""
    body = {"model": "default", "messages": list(messages), **more}
    async with gateway.http(key) as web:
        answer = await web.post("/v1/chat/completions", json=body, headers={"x-session-id": session} if session else {})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-session-id"], await gateway.transcript(answer.headers["x-turn-id"])


async def test_twenty_turns_are_stored_once_and_make_the_whole(gateway: Gateway, tiny_model: Path) -> None:
    """Put together, they are what the engine was given and gave; and that is what rendering everything would give."""
    messages: list[dict[str, str]] = []
    turns = []
    for n in range(20):
        messages.append({"role": "user", "content": f"Question {n}:\n  naïve? "})
        length = {"max_tokens": 2} if n % 5 == 4 else {}
        _, transcript = await ask(gateway, *messages, **length)
        turns.append(transcript.turn)
        messages.append({"role": "assistant", "content": transcript.turn.answer.content})
    assert [turn.parent_id for turn in turns] == [None, *(turn.turn_id for turn in turns[:-1])]
    assert [turn.session_rule for turn in turns] == ["new"] + ["prefix"] * 19
    assert [turn.fork_reason for turn in turns] == ["first"] + [None] * 19
    assert len({turn.session_id for turn in turns}) == 1
    pieces: tuple[int, ...] = ()
    for turn in turns:
        assert turn.shared_len == len(pieces)
        assert len(turn.messages) == 1
        pieces += turn.prompt_ids + turn.response_ids
    last = await gateway.transcript(turns[-1].turn_id)
    assert last.prompt_ids + turns[-1].response_ids == pieces
    asked = [Message(m["role"], m["content"]) for m in messages[:-1]]
    assert last.prompt_ids == Renderer(tiny_model).render(asked)
    assert list(last.messages) == asked


async def test_a_named_session_is_continued_and_named_back(gateway: Gateway) -> None:
    name, first = await ask(gateway, HELLO, session="mine")
    again, second = await ask(gateway, HELLO, OKAY, MORE, session="mine")
    assert name == again == "mine"
    assert (
        first.turn.session_id
        == second.turn.session_id
        == derive_session_id("default", first.turn.api_key_id, None, "mine")
    )
    assert (second.turn.parent_id, second.turn.session_rule) == (first.turn.turn_id, "x-session-id")


async def test_metadata_names_a_session_too(gateway: Gateway) -> None:
    name, transcript = await ask(gateway, HELLO, metadata={"session_id": "m"})
    assert (name, transcript.turn.session_rule) == ("m", "metadata.session_id")


async def test_an_altered_past_is_a_fork_of_its_session(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO, session="mine")
    _, second = await ask(gateway, HELLO, {"role": "assistant", "content": "I never said that."}, MORE, session="mine")
    assert second.turn.session_id == first.turn.session_id
    assert (second.turn.fork_reason, second.turn.shared_messages) == ("altered", 0)


async def test_a_retry_makes_a_second_child(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO)
    children = [(await ask(gateway, HELLO, OKAY, MORE))[1].turn for _ in range(2)]
    assert [child.parent_id for child in children] == [first.turn.turn_id] * 2


async def test_the_longest_known_beginning_is_continued(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO)
    _, second = await ask(gateway, HELLO, OKAY, MORE)
    _, third = await ask(gateway, HELLO, OKAY, MORE, OKAY, {"role": "user", "content": "Last"})
    _, edited = await ask(gateway, HELLO, OKAY, {"role": "user", "content": "Other"}, OKAY, MORE)
    assert third.turn.parent_id == second.turn.turn_id
    assert edited.turn.parent_id == first.turn.turn_id
    assert [m.content for m in edited.turn.messages] == ["Other", "Okay, 日本.", "More"]


async def test_two_that_begin_alike_are_not_mixed_up(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO)
    _, stranger = await ask(gateway, HELLO)
    _, third = await ask(gateway, HELLO, OKAY, MORE)
    assert len({t.turn.session_id for t in (first, stranger, third)}) == 3
    assert (third.turn.parent_id, third.turn.fork_reason, third.turn.session_rule) == (None, "ambiguous", "new")


async def test_strangers_at_two_gateways_are_not_mixed_up(gateway: Gateway) -> None:
    """Each gateway remembers one of two conversations that read alike; neither takes the other's for its own."""
    _, first = await ask(gateway, HELLO)
    stream = Stream(gateway.settings.redis_url, gateway.settings.store.stream)
    other = Sessions(gateway.store, stream, 16)
    found = await place(gateway, other, first)
    other.remember(found.parent)
    assert (await place(gateway, other, first)).fork_reason is None
    await ask(gateway, HELLO)  # a stranger's, elsewhere
    again = await place(gateway, other, first)
    await stream.close()
    assert (again.parent, again.fork_reason, again.rule) == (None, "ambiguous", "new")


async def test_other_tools_are_a_fork_that_shares(gateway: Gateway) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    _, first = await ask(gateway, HELLO)
    _, second = await ask(gateway, HELLO, OKAY, MORE, tools=[tool])
    assert (second.turn.parent_id, second.turn.fork_reason) == (first.turn.turn_id, "tools_changed")
    assert second.turn.session_id == first.turn.session_id
    _, third = await ask(gateway, HELLO, OKAY, MORE, OKAY, MORE, tools=[tool])
    assert (third.turn.parent_id, third.turn.fork_reason) == (second.turn.turn_id, None)


async def test_a_compacted_past_shares_what_begins_alike(gateway: Gateway) -> None:
    system = {"role": "system", "content": "You are terse. " * 8}
    summary = {"role": "user", "content": "So far: we greeted."}
    _, first = await ask(gateway, system, HELLO, session="s")
    _, second = await ask(gateway, system, summary, {"role": "assistant", "content": "Noted."}, MORE, session="s")
    assert (second.turn.parent_id, second.turn.fork_reason) == (first.turn.turn_id, "altered")
    assert second.turn.shared_len > 8
    assert second.turn.shared_messages == 0
    asked = [Message(m["role"], m["content"]) for m in (system, summary)]
    assert list(second.messages) == [*asked, Message("assistant", "Noted."), Message("user", "More")]


async def test_an_answer_that_is_not_ours_behind_one_that_is(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO)
    _, second = await ask(gateway, HELLO, OKAY, MORE, {"role": "assistant", "content": "Edited."}, MORE)
    assert (second.turn.parent_id, second.turn.fork_reason) == (first.turn.turn_id, "altered")
    assert second.turn.shared_len == len(first.prompt_ids + first.turn.response_ids)


async def test_nothing_is_found_across_keys_and_end_users(gateway: Gateway) -> None:
    _, own = await ask(gateway, HELLO, user="ann")
    for other in ({"key": OTHER, "user": "ann"}, {"user": "bob"}, {}):
        _, found = await ask(gateway, HELLO, OKAY, MORE, **other)  # type: ignore[arg-type]
        assert found.turn.session_id != own.turn.session_id
        assert (found.turn.parent_id, found.turn.fork_reason) == (None, "altered")
    _, same = await ask(gateway, HELLO, OKAY, MORE, user="ann")
    assert same.turn.parent_id == own.turn.turn_id


async def test_two_keys_with_the_same_id_are_two_sessions(gateway: Gateway) -> None:
    turns = [(await ask(gateway, HELLO, key=key, session="s"))[1].turn for key in (OWNER, AGENT)]
    assert turns[0].session_id != turns[1].session_id


async def test_two_at_once_on_one_session(gateway: Gateway) -> None:
    """Both are answered; both continue the same turn, and what is still running is known to neither."""
    _, first = await ask(gateway, HELLO, session="s")
    slowly = {"role": "user", "content": "slowly"}
    turns = await asyncio.gather(*(ask(gateway, HELLO, OKAY, slowly, session="s") for _ in range(2)))
    assert [t.turn.parent_id for _, t in turns] == [first.turn.turn_id] * 2
    assert len({t.turn.turn_id for _, t in turns}) == 2


async def test_where_no_bridge_is_proven_the_equal_beginning_is_shared(redis_url: str, tmp_path: Path) -> None:
    """This template writes past answers in capitals, so the sampled "tea" cannot be extended."""
    loud = CHATML.replace(
        "message['content']", "(message.content | upper if message.role != 'user' else message.content)"
    )
    model = make_model(tmp_path / "model", template=loud)
    async with running_gateway(model, redis_url, tmp_path, script={"default": {"text": "tea"}}) as gateway:
        _, first = await ask(gateway, HELLO)
        _, second = await ask(gateway, HELLO, {"role": "assistant", "content": "tea"}, MORE)
    assert (second.turn.parent_id, second.turn.fork_reason) == (first.turn.turn_id, "no_bridge")
    assert second.turn.shared_len == len(first.turn.prompt_ids)
    assert (second.turn.shared_messages, [m.content for m in second.turn.messages]) == (2, ["More"])
    asked = (Message("user", "Hello"), Message("assistant", "tea"), Message("user", "More"))
    assert second.prompt_ids == Renderer(model).render(asked)


# ------------------------------------------------------------------------------------------- memory, Redis, SQL


async def place(gateway: Gateway, sessions: Sessions, turn: Transcript, *, policy_id: str | None = None) -> Any:
    tenant = await gateway.store.tenant("default")
    assert tenant is not None
    messages = (Message("user", "Hello"), Message("assistant", "Okay, 日本."), Message("user", "More"))
    conversation = Conversation("default", messages, Sampling(8))
    return await sessions.place(conversation, tenant, turn.turn.api_key_id, policy_id or gateway.policy.policy_id)


async def test_heads_come_from_redis_else_from_sql(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO)
    stream = Stream(gateway.settings.redis_url, gateway.settings.store.stream)
    sessions = Sessions(gateway.store, stream, 16)  # another gateway's: its memory is empty
    from_redis = await place(gateway, sessions, first)
    async with Redis.from_url(gateway.settings.redis_url) as redis:
        await redis.flushall()
    from_sql = await place(gateway, sessions, first)
    await stream.close()
    assert from_redis.parent == from_sql.parent
    assert from_sql.parent.turn_id == first.turn.turn_id
    assert from_sql.parent.ids == first.prompt_ids + first.turn.response_ids
    assert from_sql.parent.n_messages == 2


async def test_another_policy_continues_nothing(gateway: Gateway) -> None:
    _, first = await ask(gateway, HELLO)
    stream = Stream(gateway.settings.redis_url, gateway.settings.store.stream)
    found = await place(gateway, Sessions(gateway.store, stream, 16), first, policy_id="another")
    await stream.close()
    assert found.fork_reason == "altered"


async def test_what_cannot_be_asked_is_lost_and_never_an_error(gateway: Gateway, tmp_path: Path) -> None:
    _, first = await ask(gateway, HELLO)
    away = Stream(f"unix://{tmp_path / 'nobody.sock'}", "x")
    sessions = Sessions(gateway.store, away, 16)
    assert (await place(gateway, sessions, first)).parent.turn_id == first.turn.turn_id  # SQL has it
    async with gateway.store.write() as connection:
        await connection.exec_driver_sql("ALTER TABLE turns RENAME TO turns_away")
    lost = await place(gateway, sessions, first)
    async with gateway.store.write() as connection:
        await connection.exec_driver_sql("ALTER TABLE turns_away RENAME TO turns")
    await away.close()
    assert (lost.parent, lost.fork_reason, lost.rule) == (None, "lost", "new")


# ------------------------------------------------------------------------------------------------------ chains


def test_a_chain_grows_by_one_link_per_message_and_is_keyed() -> None:
    user, answer = Message("user", "a"), Message("assistant", "b")
    one, two = chains_of(b"k", "scope", [user, answer])
    assert extend_chain(b"k", one, answer) == two
    assert len({one, two, *chains_of(b"other", "scope", [user, answer]), *chains_of(b"k", "else", [user, answer])}) == 6
    assert chains_of(b"k", "scope", [Message("user", " a\n")]) == [one]
    assert chains_of(b"k", "scope", [Message("assistant", "a")]) != [one]
