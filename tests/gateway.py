"""A gateway as clients meet it: real uvicorn, scripted engine, Redis, recorder, SQLite."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from serving import serving

from agent_rl.experience import lineage, recorder
from agent_rl.experience.store import Store, migrate
from agent_rl.settings import Settings, load
from agent_rl.types import Policy, Transcript
from server import app
from server.engines import protocol, scripted
from server.http_protocol import uvicorn_options

OWNER, OTHER, AGENT = "arl-owner", "arl-other", "arl-agent"
SCOPES = {OWNER: ("agent", "feedback", "admin"), OTHER: ("agent", "feedback"), AGENT: ("agent",)}


@dataclass(frozen=True)
class Gateway:
    url: str
    settings: Settings
    store: Store
    policy: Policy
    engine: scripted.ScriptedEngine
    stop_engine: Callable[[], Awaitable[None]]

    async def transcript(self, turn_id: str) -> Transcript:
        """A turn as SQL has it, as soon as it does."""
        for _ in range(1000):
            if found := await self.store.transcript(turn_id):
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(f"turn {turn_id} was not recorded within 10 s")

    async def idle(self) -> None:
        """Until the engine has no answer in progress."""
        for _ in range(500):
            if not self.engine.jobs:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"the engine still answers {list(self.engine.jobs)}")

    def http(self, key: str = OWNER) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=20)

    def openai(self, key: str = OWNER) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@asynccontextmanager
async def running_gateway(
    model: Path,
    redis_url: str,
    home: Path,
    *,
    script: dict[str, Any] | None = None,
    max_context: int = 1024,
    **options: object,
) -> AsyncIterator[Gateway]:
    """`options`: settings of the gateway, by name."""
    async with AsyncExitStack() as stack:
        engine = scripted.ScriptedEngine(model, scripted.Script.model_validate(script or {}), max_context)
        engine_server = await stack.enter_async_context(AsyncExitStack())
        engine_url = await engine_server.enter_async_context(serving(protocol.create_app(engine, None)))
        settings = load(
            overrides={
                "home": str(home),
                "store.redis": redis_url,
                "engine.url": engine_url,
                "engine.model": str(model),
                **{f"gateway.{name}": value for name, value in options.items()},
            }
        )
        store, policy = await _prepared(settings)
        stack.push_async_callback(store.close)
        stop = asyncio.Event()
        recording = asyncio.create_task(recorder.run(settings, stop))
        try:
            url = await stack.enter_async_context(
                serving(app.create_app(settings), **uvicorn_options(settings.gateway))
            )
            yield Gateway(url, settings, store, policy, engine, engine_server.aclose)
        finally:
            stop.set()
            await recording


@asynccontextmanager
async def second_gateway(first: Gateway, home: Path) -> AsyncIterator[str]:
    """The URL of another with the same engine, Redis and database, and a journal of its own."""
    store = first.settings.store.model_copy(update={"database": first.settings.database_url})
    home.mkdir()
    async with serving(app.create_app(first.settings.model_copy(update={"home": home, "store": store}))) as url:
        yield url


async def _prepared(settings: Settings) -> tuple[Store, Policy]:
    await migrate(settings.database_url)
    store = await Store.open(settings.database_url)
    await store.ensure_tenant("default", "default")
    policy = await lineage.ensure_policy(store, "default", "default", "0" * 64)
    for key, scopes in SCOPES.items():
        await store.add_key("default", hashlib.sha256(key.encode()).hexdigest(), scopes)
    return store, policy
