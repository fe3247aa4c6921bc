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
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from agent_rl.engine import Engine
from agent_rl.experience.journal import open_journal
from agent_rl.experience.outbox import Outbox
from agent_rl.experience.shipper import Shipper
from agent_rl.experience.store import Store
from agent_rl.experience.stream import Stream
from agent_rl.rendering import Renderer
from agent_rl.settings import Settings
from server import admin, catalog, feedback, graves, health, openapi
from server.auth import LOOPBACK, Door
from server.core import Core
from server.directory import Directory
from server.edge import Edge, LoopbackOnly
from server.metrics import Metrics
from server.refusal import Refusal, error_response
from server.sessions import Sessions
from server.wires import WIRES, socket
from server.wires.socket_calls import Calls

GRAVES_S = 1.0  # how often it is asked what was forgotten, at most
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
        return error_response(request.url.path, refusal)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code)
        answer = error_response(request.url.path, refusal)
        answer.headers.update(error.headers or {})  # what 405 allows
        return answer

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        refusal = Refusal(500, "internal error; the gateway's log has it", code="internal")
        return error_response(request.url.path, refusal)

    gateway = settings.gateway
    app.add_middleware(Edge, body_timeout_s=gateway.body_timeout_s)
    if gateway.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=gateway.cors_origins, allow_methods=["*"], allow_headers=["*"])
    if gateway.host in LOOPBACK:
        app.add_middleware(LoopbackOnly, origins=gateway.cors_origins)
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
    watching = graves.watch(store, stream, core, journal, max(gateway.cache_s, GRAVES_S))
    await stack.enter_async_context(_running(watching))
    door = Door(directory, gateway)
    outbox = Outbox(
        settings.redis_url, settings.store.stream, ttl_s=gateway.outbox_ttl_s, grace_s=gateway.outbox_grace_s
    )
    stack.push_async_callback(outbox.close)
    calls = Calls(outbox)
    await stack.enter_async_context(_running(calls.run()))
    stack.push_async_callback(calls.close)
    routes = [
        *socket.routes(door, calls, outbox, gateway),
        *(route for wire in WIRES.values() for route in wire(core, door, gateway)),
        *feedback.routes(core, door),
        *catalog.routes(directory, store, door),
        *admin.routes(store, stream, door, core),
        *health.routes(engine, settings, metrics),
    ]
    return [*routes, *openapi.routes(routes)]


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
