"""What is forgotten is gone: from SQL, Redis, the journal and the gateway's memory; and the bytes with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway import OWNER, Gateway, running_gateway
from nouns import make_feedback, make_release, make_turn
from recorded import Recorded
from redis.asyncio import Redis
from sqlalchemy import Column, func, select, update

from agent_rl.experience import deletion, lineage, tenancy
from agent_rl.experience.codec import encode
from agent_rl.experience.releases import insert_release
from agent_rl.experience.store import Store
from agent_rl.experience.stream import Stream, StreamUnavailable
from agent_rl.experience.tables import (
    checkpoints,
    dead_letters,
    feedback,
    lesson_uses,
    lessons,
    metadata,
    policies,
    releases,
    sessions,
    turns,
)

SECRET = "xylophone-4711"
SCRIPT = {"default": {"text": f"I keep {SECRET}."}}


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tiny_model, redis_url, tmp_path, script=SCRIPT, cache_s=0.0) as running:
        yield running


async def chat(gateway: Gateway, text: str, key: str = OWNER, **more: Any) -> httpx.Response:
    body = {"model": "default", "messages": [{"role": "user", "content": text}], **more}
    async with gateway.http(key) as web:
        answer = await web.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    await gateway.transcript(answer.headers["x-turn-id"])
    return answer


async def where(gateway: Gateway) -> list[str]:
    """Every place that still holds the secret's bytes, or its token ids' text."""
    home, found = gateway.settings.home, []
    for path in [p for p in home.rglob("*") if p.is_file()]:
        if SECRET.encode() in path.read_bytes():
            found.append(str(path.relative_to(home)))
    async with Redis.from_url(gateway.settings.redis_url) as redis:
        async for name in redis.scan_iter("*"):
            if await redis.type(name) == b"stream":
                held = str(await redis.xrange(name)).encode()
            else:
                held = (await redis.dump(name)) or b""
            if SECRET.encode() in held:
                found.append(name.decode())
    return found


async def gone(gateway: Gateway) -> list[str]:
    """What is left after the gateway has had the time to hear of it."""
    for _ in range(80):
        if not (left := await where(gateway)):
            return []
        await asyncio.sleep(0.1)
    return left


async def rows(gateway: Gateway) -> dict[str, int]:
    """Rows of the tables that hold what users said."""
    names = ("turns", "sessions", "feedback", "verdicts", "lessons", "preferences", "dead_letters")
    async with gateway.store.read() as connection:
        counts = [select(func.count()).select_from(metadata.tables[name]) for name in names]
        return {n: (await connection.execute(c)).scalar_one() for n, c in zip(names, counts, strict=True)}


async def test_a_forgotten_session_leaves_no_byte(gateway: Gateway) -> None:
    answer = await chat(gateway, f"Remember {SECRET}", metadata={"session_id": "s"})
    async with gateway.http() as web:
        said = {"turn_id": answer.headers["x-turn-id"], "comment": SECRET}
        assert (await web.post("/v1/feedback", json=said)).status_code == 202
    for _ in range(100):
        if (await rows(gateway))["feedback"]:
            break
        await asyncio.sleep(0.05)
    assert await where(gateway)
    async with gateway.http() as web:
        report = (await web.delete("/v1/sessions/s")).json()
    forgotten = report.pop("sessions")
    assert len(forgotten) == 1
    assert report == {"turns": 1, "feedback": 1, "lessons": 0, "releases": [], "policies": []}
    assert set((await rows(gateway)).values()) == {0}
    assert await gone(gateway) == []


async def test_a_forgotten_conversation_is_not_continued(gateway: Gateway) -> None:
    first = await chat(gateway, "Hello")
    async with gateway.http() as web:
        await web.delete(f"/v1/sessions/{first.headers['x-session-id']}")
    await asyncio.sleep(1.5)
    said = first.json()["choices"][0]["message"]
    more = [{"role": "user", "content": "Hello"}, said, {"role": "user", "content": "More"}]
    again = await chat(gateway, "", messages=more)
    turn = (await gateway.transcript(again.headers["x-turn-id"])).turn
    assert (turn.parent_id, turn.fork_reason, turn.session_rule) == (None, "altered", "new")


async def test_a_subject_is_forgotten_and_may_come_again(gateway: Gateway) -> None:
    await chat(gateway, SECRET, user="ann")
    await chat(gateway, "Hello", user="bob")
    async with gateway.http() as web:
        report = (await web.delete("/v1/subjects/ann")).json()
    assert (len(report["sessions"]), report["turns"]) == (1, 1)
    assert (await rows(gateway))["turns"] == 1
    await chat(gateway, "Hello again", user="ann")
    assert (await rows(gateway))["turns"] == 2


async def test_a_tenant_is_forgotten_with_its_keys(gateway: Gateway) -> None:
    await tenancy.set_tenant(gateway.store, "acme")
    _, secret = await tenancy.create_key(gateway.store, "acme")
    await chat(gateway, SECRET, secret)
    async with gateway.http() as web:
        assert (await web.delete("/v1/admin/tenants/acme")).json()["turns"] == 1
    async with gateway.http(secret) as web:
        assert (await web.get("/v1/models")).status_code == 401
    assert [tenant.tenant_id for tenant in await tenancy.tenants_of(gateway.store)] == ["default"]
    assert {policy.tenant_id for policy in await gateway.store.policies()} == {"default"}
    assert await gone(gateway) == []


async def test_sessions_are_kept_as_long_as_their_tenant_says(gateway: Gateway) -> None:
    await tenancy.set_tenant(gateway.store, "default", retention_s=3600)
    old, new = await chat(gateway, "Hello", user="old"), await chat(gateway, "Hello", user="new")
    async with gateway.store.write() as connection:
        aged = update(sessions).where(sessions.c.subject == "old").values(last_turn_at=time.time() - 4000)
        await connection.execute(aged)
    stream = Stream(gateway.settings.redis_url, gateway.settings.store.stream)
    assert await deletion.sweep(gateway.store, stream) == 1
    assert await deletion.sweep(gateway.store, stream) == 0
    await stream.close()
    assert await gateway.store.transcript(old.headers["x-turn-id"]) is None
    assert await gateway.store.transcript(new.headers["x-turn-id"]) is not None


# ------------------------------------------------------------------------------------- what is still on its way


@pytest.fixture
async def stream(redis_url: str) -> AsyncIterator[Stream]:
    stream = Stream(redis_url, "turns")
    yield stream
    await stream.close()


@pytest.fixture
async def recorded(any_store: Store) -> Recorded:
    await any_store.ensure_tenant("acme", "acme")
    await any_store.ensure_tenant("other", "other")
    return Recorded(any_store)


async def ids(store: Store, column: Column[Any]) -> list[Any]:
    async with store.read() as connection:
        return sorted((await connection.execute(select(column))).scalars())


@pytest.mark.parametrize(
    ("kind", "target"),
    [("session", "s1"), ("session", "mine"), ("subject", "ann"), ("subject", "k1"), ("tenant", "acme")],
)
async def test_what_was_said_before_and_comes_late_is_dropped_with_its_feedback(
    recorded: Recorded, stream: Stream, kind: str, target: str
) -> None:
    """The recorder was away when it was forgotten: SQL knew nothing of it."""
    subject = {"api_key_id": "k1"} if target == "k1" else {"subject": "ann", "api_key_id": "k1"}
    await recorded(make_feedback("early", turn_id="t1"))
    await deletion.forget(recorded.store, stream, kind, "acme", target)
    await recorded(make_turn("t1", client_session_id="mine", **subject), make_feedback("with", turn_id="t1"))
    await recorded(make_feedback("after", turn_id="t1"))
    await recorded(make_turn("t2", tenant_id="other", session_id="s2", client_session_id="mine", **subject))
    assert await ids(recorded.store, turns.c.turn_id) == ["t2"]
    assert await ids(recorded.store, feedback.c.feedback_id) == []


async def test_feedback_on_its_way_does_not_come_back_without_its_turn(recorded: Recorded, stream: Stream) -> None:
    await recorded(make_turn("t1"))
    await deletion.forget(recorded.store, stream, "session", "acme", "s1")
    await recorded(make_feedback("f1", turn_id="t1"))
    assert await ids(recorded.store, feedback.c.feedback_id) == []


async def test_who_was_forgotten_may_come_again_but_a_tenant_only_when_it_is_made_anew(
    recorded: Recorded, stream: Stream
) -> None:
    later = time.time() + 60
    for kind, target in (("session", "s1"), ("tenant", "acme")):
        await deletion.forget(recorded.store, stream, kind, "acme", target)
        await recorded(make_turn(f"after-{kind}", created_at=later))
    assert await ids(recorded.store, turns.c.turn_id) == []  # the second one took the first's turn along
    await recorded.store.ensure_tenant("acme", "acme")
    await recorded(make_turn("anew", created_at=later))
    assert await ids(recorded.store, turns.c.turn_id) == ["anew"]


async def test_without_redis_nothing_is_forgotten_and_it_can_be_tried_again(recorded: Recorded, stream: Stream) -> None:
    await recorded(make_turn("t1"))
    nowhere = Stream("unix:///nowhere.sock", "turns")
    with pytest.raises(StreamUnavailable):
        await deletion.forget(recorded.store, nowhere, "session", "acme", "s1")
    await nowhere.close()
    assert await ids(recorded.store, turns.c.turn_id) == ["t1"]
    assert (await deletion.forget(recorded.store, stream, "session", "acme", "s1")).turns == 1


async def test_more_sessions_than_a_statement_takes_values(recorded: Recorded, stream: Stream) -> None:
    n = 2 * deletion.CHUNK + 1
    await recorded(*[make_turn(f"t{at}", session_id=f"s{at}") for at in range(n)])
    assert (await deletion.forget(recorded.store, stream, "tenant", "acme", "acme")).turns == n
    assert await ids(recorded.store, turns.c.turn_id) == []


async def test_dead_letters_are_searched(recorded: Recorded, stream: Stream) -> None:
    letters = [
        encode(make_turn("t1", subject="ann", session_id="s1")),
        encode(make_turn("t2", subject="bob", session_id="s2")),
        encode(make_turn("t3", subject="ann", session_id="s3", tenant_id="other")),
        b"torn: ann said",
        b"torn: bob said",
    ]
    for seq, letter in enumerate(letters, 1):
        await recorded.store.bury("j2", seq, letter, "refused")
    await deletion.forget(recorded.store, stream, "subject", "acme", "ann")
    assert await ids(recorded.store, dead_letters.c.seq) == [2, 3, 5]


async def test_it_is_said_which_releases_had_learned_and_a_policy_of_ones_own_goes_with_its_weights(
    recorded: Recorded, stream: Stream, tmp_path: Path
) -> None:
    """c1 used a lesson of the subject's, c2 grew out of it, c3 is another's."""
    store, mine = recorded.store, "acme~default:0123456789abcdef"
    await lineage.ensure_policy(store, "acme", "default", "b" * 64)
    await lineage.ensure_policy(store, "default", "shared", "b" * 64)
    await recorded(make_turn("t1", subject="ann", policy_id="shared"))
    await recorded(make_turn("t2", subject="ann", policy_id=mine, session_id="s2"))
    weights = tmp_path / "weights"
    weights.mkdir()
    lesson = {"target_id": "t1", "revision": 1, "method": "m", "state": "used", "created_at": 1.0}
    use = {"use_id": "u1", "lesson_id": "l1", "policy_id": "shared", "checkpoint_id": "c1", "step": 1}
    made = {"method": "m", "lease_epoch": 1, "created_at": 1.0}
    async with store.write() as connection:
        await connection.execute(lessons.insert(), {"lesson_id": "l1", "policy_id": "shared", **lesson})
        await connection.execute(lesson_uses.insert(), {**use, "kind": "fresh", "created_at": 1.0})
        for checkpoint_id, parent_id, policy_id in (
            *(("c1", None, "shared"), ("c2", "c1", "shared")),
            *(("c3", None, "shared"), ("c4", None, mine)),
        ):
            row = {"checkpoint_id": checkpoint_id, "parent_id": parent_id, "policy_id": policy_id, **made}
            path = str(weights) if policy_id == mine else "elsewhere"
            await connection.execute(checkpoints.insert(), {**row, "path": path, "step": 2 if parent_id else 1})
            release = make_release(f"r-{checkpoint_id}", checkpoint_id, policy_id=policy_id, path=path)
            await insert_release(connection, release)
    report = await deletion.forget(store, stream, "subject", "acme", "ann")
    assert (report.turns, report.lessons) == (2, 1)
    assert report.releases == ("r-c1", "r-c2")
    assert report.policies == (mine,)
    assert not weights.exists()
    assert await ids(store, policies.c.policy_id) == ["acme~default", "shared"]
    assert await ids(store, releases.c.release_id) == ["r-c1", "r-c2", "r-c3"]


async def test_an_answer_that_ends_after_its_session_was_forgotten_leaves_no_byte(
    tiny_model: Path, redis_url: str, tmp_path: Path
) -> None:
    slow = {**SCRIPT, "token_s": 0.2}
    async with running_gateway(tiny_model, redis_url, tmp_path, script=slow, cache_s=0.0) as gateway:
        await chat(gateway, "Hello", metadata={"session_id": "s"}, max_tokens=1)
        body = {"model": "default", "messages": [{"role": "user", "content": SECRET}]}
        async with gateway.http() as web:
            running = asyncio.create_task(
                web.post("/v1/chat/completions", json={**body, "metadata": {"session_id": "s"}})
            )
            while not gateway.engine.jobs:  # noqa: ASYNC110  # the other side is an engine
                await asyncio.sleep(0.01)
            assert (await web.delete("/v1/sessions/s")).json()["turns"] == 1
            assert (await running).status_code == 200
        assert await gone(gateway) == []
        assert (await rows(gateway))["turns"] == 0
