"""The gateway: `create_app` puts its parts together; nothing runs at import."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from agent_rl.engine import Engine
from agent_rl.experience.journal import open_journal
from agent_rl.experience.shipper import Shipper
from agent_rl.experience.store import Store
from agent_rl.experience.stream import Stream
from agent_rl.rendering import Renderer
from agent_rl.settings import Settings
from server import catalog, feedback, health
from server.auth import LOOPBACK, Door, LoopbackOnly
from server.core import Core
from server.directory import Directory
from server.metrics import Metrics
from server.refusal import Refusal, openai_error
from server.sessions import Sessions
from server.wires import WIRES

log = logging.getLogger("agent_rl.gateway")


def create_app(settings: Settings) -> FastAPI:
    """The gateway of complete settings (`settings.engine.url` and `.model` set). Starts its parts when it starts."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.router.routes.extend(await _open(settings, metrics, stack))
            yield

    app = FastAPI(title="agent-rl", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        metrics.refused(refusal.status)
        return openai_error(refusal)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return openai_error(Refusal(error.status_code, message, code="not_found"))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return openai_error(Refusal(500, "internal error; the gateway's log has it", code="internal"))

    if settings.gateway.host in LOOPBACK:
        app.add_middleware(LoopbackOnly)
    return app


async def _open(settings: Settings, metrics: Metrics, stack: AsyncExitStack) -> list[BaseRoute]:
    """Every part, closed by `stack` in the opposite order."""
    gateway, engine_settings = settings.gateway, settings.engine
    if engine_settings.url is None or engine_settings.model is None:
        raise ValueError("the gateway needs engine.url and engine.model: start it by `agent-rl serve`")
    admin_key = engine_settings.admin_key
    engine = Engine(engine_settings.url, admin_key=admin_key.get_secret_value() if admin_key else None)
    stack.push_async_callback(engine.close)
    store = await Store.open(settings.database_url)
    stack.push_async_callback(store.close)
    stream = Stream(settings.redis_url, settings.store.stream)
    stack.push_async_callback(stream.close)
    journal = open_journal(settings.home / "journal", segment_bytes=settings.store.segment_bytes)
    stack.push_async_callback(journal.close)
    shipper = Shipper(journal, stream, head_ttl_s=gateway.head_ttl_s)
    await stack.enter_async_context(_running(shipper.run()))
    directory = Directory(store, gateway.cache_s)
    core = Core(
        gateway,
        engine=engine,
        renderer=await asyncio.to_thread(Renderer, engine_settings.model),
        directory=directory,
        sessions=Sessions(store, stream, gateway.heads_in_memory),
        store=store,
        shipper=shipper,
        metrics=metrics,
    )
    stack.push_async_callback(core.close)
    door = Door(directory, gateway)
    return [
        *(route for wire in WIRES.values() for route in wire(core, door, gateway)),
        *feedback.routes(core, door),
        *catalog.routes(directory, store, door),
        *health.routes(engine, settings, metrics),
    ]


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` beside the block, cancelled at its end. If it fails, so does this process: the supervisor starts another,
    which goes on from the journal."""
    task = asyncio.create_task(work)
    task.add_done_callback(_end_if_failed)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _end_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("the gateway cannot go on", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)
