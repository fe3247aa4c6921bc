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
from redis.asyncio import Redis
from sqlalchemy import func, select, update

from agent_rl.experience import deletion, tenancy
from agent_rl.experience.stream import Stream
from agent_rl.experience.tables import metadata, sessions

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
    assert report == {"turns": 1, "feedback": 1, "lessons": 0, "releases": []}
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
