"""`/healthz`: the process answers. `/readyz`: it can answer and record, or what is missing. `/metrics`."""

from __future__ import annotations

import os

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agent_rl.engine import Engine
from agent_rl.settings import Settings
from server.metrics import Metrics


def routes(engine: Engine, settings: Settings, metrics: Metrics) -> list[BaseRoute]:
    async def healthz(request: Request) -> Response:
        return _json({"alive": True})

    async def readyz(request: Request) -> Response:
        missing = []
        if not await engine.healthy():
            missing.append(f"engine: {settings.engine.url} does not answer")
        if complaint := disk_complaint(settings):
            missing.append(f"journal: {complaint}")
        return _json({"ready": not missing, "missing": missing}, 503 if missing else 200)

    async def page(request: Request) -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", page)]


def disk_complaint(settings: Settings) -> str | None:
    """Why the journal could not take another segment; None if it can."""
    folder = settings.home / "journal"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    disk = os.statvfs(folder)
    free, wanted = disk.f_bavail * disk.f_frsize, settings.store.segment_bytes
    return f"{free} bytes are free at {folder}, a segment takes {wanted}" if free < wanted else None


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
