"""The OpenAPI page is whole, and nothing that it allows (or forbids) makes the gateway fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from gateway import OWNER, Gateway, running_gateway
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import status_code_conformance

from server.openapi import OPERATIONS

EXAMPLES = 8  # of each operation, in each mode


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tiny_model, redis_url, tmp_path, adapter_wait_s=0.4) as running:
        yield running


async def test_the_page_has_every_declared_route(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as web:
        page = (await web.get("/openapi.json")).json()
    there = {f"{method.upper()} {path}" for path, methods in page["paths"].items() for method in methods}
    assert there == set(OPERATIONS)
    assert page["x-websockets"]["/v1/agent"].startswith("`/v1/agent`: one WebSocket")
    assert page["paths"]["/healthz"]["get"]["security"] == []


@pytest.mark.timeout(240)
async def test_whatever_is_sent_the_status_is_documented_and_no_fault(gateway: Gateway) -> None:
    """Bodies, queries and paths by the schemas, and against them."""
    async with httpx.AsyncClient(base_url=gateway.url) as web:
        page = (await web.get("/openapi.json")).json()
    await asyncio.to_thread(ask_everything, page, gateway.url)


def ask_everything(page: dict[str, object], url: str) -> None:
    schema = schemathesis.openapi.from_dict(page)
    headers = {"authorization": f"Bearer {OWNER}"}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and not (operation.body or operation.path_parameters or operation.query):
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: schemathesis.Case) -> None:
                response = case.call(base_url=url, headers=headers)
                case.validate_response(
                    response, checks=[schemathesis.checks.not_a_server_error, status_code_conformance]
                )

            ask()
