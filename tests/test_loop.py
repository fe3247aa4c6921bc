"""The whole loop in one process: all six roles, a two-layer model, real Redis and SQLite, the openai SDK as the user.

What the tiny model learns means nothing, so its exam is set to let anything pass; that a release is examined, goes live
with no request failing, and is explained by what was said, is what is tested.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from gateway import OWNER, SCOPES
from serving import serving
from sqlalchemy import func, select

from agent_rl import judge, learner
from agent_rl.experience import lineage, recorder
from agent_rl.experience.store import Store, migrate
from agent_rl.experience.tables import lesson_uses, turns
from agent_rl.experience.tenancy import hash_key
from agent_rl.models import base_hash
from agent_rl.settings import Settings, load
from agent_rl.types import BASE_RELEASE, ReleaseState
from server import app, publisher
from server.engines import torch_engine

LENIENT = {
    "release.max_repetition": 1.0,
    "release.max_truncation_increase": 1.0,
    "release.min_length_ratio": 0.0,
    "release.max_empty_rate": 1.0,
    "release.max_perplexity_ratio": 9.0,
    "release.max_kl_to_live": 99.0,
    "release.min_on_topic": 0.0,
    "release.probes": 4,
    "release.probe_max_tokens": 8,
    "release.poll_s": 0.05,
}
LEARNER = {
    "learner.dtype": "float32",
    "learner.lr": 1e-6,  # a tiny model that learned something would answer the canary prompt with nothing
    "learner.lessons_per_step": 2,
    "learner.steps_per_checkpoint": 1,
    "learner.max_wait_s": 0.5,
    "learner.method.check_teacher": False,
    "learner.method.min_gap": 0.0,
}


@dataclass(frozen=True)
class Loop:
    url: str
    settings: Settings
    store: Store
    client: openai.AsyncOpenAI

    async def say(self, *texts: str, **options: object) -> tuple[str, str, str]:
        """Texts alternate between user and assistant; (answer, turn id, release)."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        raw = await self.client.chat.completions.with_raw_response.create(
            model="default",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=12,
            **options,  # type: ignore[arg-type]
        )
        answer = raw.parse().choices[0].message.content or ""
        return answer, raw.headers["x-turn-id"], raw.headers["x-policy-version"]

    async def complain(self, question: str) -> str:
        """Ask, then say what is wrong with the answer; the id of the answer's turn."""
        answer, turn_id, _ = await self.say(question)
        await self.say(question, answer, "Too long. Please answer in one short sentence.")
        return turn_id

    async def live(self) -> str:
        deployment = await self.store.deployment("default")
        assert deployment is not None
        return deployment.live


@asynccontextmanager
async def running_loop(model: Path, redis_url: str, home: Path, **options: object) -> AsyncIterator[Loop]:
    chosen = {"home": str(home), "store.redis": redis_url, "engine.model": str(model), "engine.dtype": "float32"}
    async with AsyncExitStack() as stack:
        settings = load(overrides={**chosen, "engine.threads": 1, **LENIENT, **LEARNER, **options})
        url = await stack.enter_async_context(serving(torch_engine.create_app(settings)))
        settings = settings.model_copy(update={"engine": settings.engine.model_copy(update={"url": url})})
        await migrate(settings.database_url)
        store = await Store.open(settings.database_url)
        stack.push_async_callback(store.close)
        await store.ensure_tenant("default", "default")
        await lineage.ensure_policy(store, "default", "default", base_hash(model))
        await store.add_key("default", hash_key(OWNER), SCOPES[OWNER])
        stop = asyncio.Event()
        roles = [asyncio.create_task(role.run(settings, stop)) for role in (recorder, judge, learner, publisher)]
        try:
            gateway = await stack.enter_async_context(serving(app.create_app(settings)))
            client = openai.AsyncOpenAI(base_url=f"{gateway}/v1", api_key=OWNER, max_retries=0)
            stack.push_async_callback(client.close)
            yield Loop(gateway, settings, store, client)
        finally:
            stop.set()
            await asyncio.gather(*roles)


async def until_live_changes(loop: Loop, before: str) -> str:
    for _ in range(1200):
        if (now := await loop.live()) != before:
            return now
        await asyncio.sleep(0.05)
    raise AssertionError(f"{before} serves still after 60 s")


@pytest.mark.parametrize(("tuning", "kind"), [("lora", "adapter"), ("full", "full")])
async def test_a_complaint_becomes_a_release_that_answers(
    tiny_model: Path, redis_url: str, tmp_path: Path, tuning: str, kind: str
) -> None:
    async with running_loop(tiny_model, redis_url, tmp_path, **{"learner.tuning": tuning}) as loop:
        assert await loop.live() == BASE_RELEASE
        taught = await asyncio.gather(*(loop.complain(f"What is tea? {i}") for i in range(2)))
        release_id = await until_live_changes(loop, BASE_RELEASE)
        await asyncio.sleep(1.1)  # the gateway's cache of deployments
        assert (await loop.say("What is tea?"))[2] == release_id

        assert (await loop.client.models.retrieve("default")).model_extra == {"release": release_id}

        release = await lineage.find_release(loop.store, release_id)
        assert release is not None
        assert (release.state, release.kind) == (ReleaseState.LIVE, kind)
        assert await lineage.last_exam(loop.store, release_id) is not None
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {OWNER}"}) as http:
            explained = (await http.get(f"{loop.url}/v1/turns/{taught[0]}")).json()
        assert [use["kind"] for use in explained["uses"]] == ["fresh"]
        assert release_id in [r["release_id"] for r in explained["releases"]]


async def test_no_request_fails_while_releases_come_and_go(tiny_model: Path, redis_url: str, tmp_path: Path) -> None:
    async with running_loop(tiny_model, redis_url, tmp_path, **{"gateway.cache_s": 0.0}) as loop:
        stop = asyncio.Event()
        seen: set[str] = set()

        async def talk(user: int) -> int:
            count = 0
            while not stop.is_set():
                seen.add((await loop.say(f"How do birds fly? {user} {count}"))[2])
                count += 1
            return count

        talking = [asyncio.create_task(talk(user)) for user in range(4)]
        live = BASE_RELEASE
        for i in range(3):
            await asyncio.gather(*(loop.complain(f"Why is the sky blue? {i} {j}") for j in range(2)))
            live = await until_live_changes(loop, live)
        await lineage.rollback(loop.store, "default", BASE_RELEASE, actor="test", reason="test", max_attempts=1)
        await asyncio.sleep(1)
        stop.set()
        answered = sum(await asyncio.gather(*talking))
        assert len(seen) >= 3
        assert (await loop.say("What is tea?"))[2] == BASE_RELEASE

        expected = answered + 3 * 2 * 2 + 1
        for _ in range(200):
            async with loop.store.read() as connection:
                stored = (await connection.execute(select(func.count()).select_from(turns))).scalar_one()
                twice = select(lesson_uses.c.lesson_id).where(
                    lesson_uses.c.kind == "fresh", lesson_uses.c.returned_at.is_(None)
                )
                fresh = list((await connection.execute(twice)).scalars())
            if stored == expected:
                break
            await asyncio.sleep(0.05)
        assert stored == expected
        assert len(fresh) == len(set(fresh))


@pytest.mark.timeout(240)
async def test_a_release_that_fails_its_exam_never_serves(tiny_model: Path, redis_url: str, tmp_path: Path) -> None:
    strict = {"release.max_perplexity_ratio": 1e-9, "learner.max_attempts": 1}
    async with running_loop(tiny_model, redis_url, tmp_path, **strict) as loop:
        await asyncio.gather(*(loop.complain(f"What is tea? {i}") for i in range(2)))
        for _ in range(600):
            turned_down = [r for r in await lineage.releases(loop.store) if r.state is ReleaseState.REJECTED]
            if turned_down:
                break
            await asyncio.sleep(0.05)
        assert len(turned_down) == 1, "nothing was rejected within 30 s"
        assert "perplexity" in turned_down[0].reasons[0]
        assert await loop.live() == BASE_RELEASE
        assert await lineage.head(loop.store, "default") is None
