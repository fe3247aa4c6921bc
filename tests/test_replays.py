"""Retries through the real gateway: sampled once, answered as often as asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from gateway import AGENT, OTHER, OWNER, Gateway, running_gateway
from sqlalchemy import func, select

from agent_rl.experience.tables import turns

SCRIPT = {"rules": [{"user": "slowly", "text": "one two three", "token_s": 0.1}], "default": {"text": "Okay."}}


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tiny_model, redis_url, tmp_path, script=SCRIPT) as running:
        yield running


async def ask(gateway: Gateway, text: str, key: str = OWNER, **headers: str) -> httpx.Response:
    body = {"model": "default", "messages": [{"role": "user", "content": text}]}
    async with gateway.http(key) as web:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await web.post("/v1/chat/completions", json=body, headers=names)
    assert answer.status_code == 200, answer.text
    return answer


async def recorded(gateway: Gateway, *answers: httpx.Response) -> int:
    """Turns in SQL, when these are there."""
    for answer in answers:
        await gateway.transcript(answer.headers["x-turn-id"])
    async with gateway.store.read() as connection:
        return (await connection.execute(select(func.count()).select_from(turns))).scalar_one()


async def test_a_retry_is_answered_again_and_not_sampled_again(gateway: Gateway) -> None:
    first = await ask(gateway, "Hello", x_stainless_retry_count="0")
    again = await ask(gateway, "Hello", x_stainless_retry_count="1")
    assert again.headers["x-turn-id"] == first.headers["x-turn-id"]
    assert again.json() == first.json()
    assert await recorded(gateway, first) == 1


async def test_a_retry_joins_what_still_runs(gateway: Gateway) -> None:
    first = asyncio.create_task(ask(gateway, "slowly", x_stainless_retry_count="0"))
    await asyncio.sleep(0.1)
    again = await ask(gateway, "slowly", x_stainless_retry_count="1")
    assert again.json() == (await first).json()
    assert await recorded(gateway, again) == 1


async def test_an_idempotency_key_is_a_promise_about_one_body(gateway: Gateway) -> None:
    first = await ask(gateway, "Hello", idempotency_key="k")
    again = await ask(gateway, "Hello", idempotency_key="k")
    other = await ask(gateway, "Other", idempotency_key="k")
    assert again.headers["x-turn-id"] == first.headers["x-turn-id"] != other.headers["x-turn-id"]


async def test_equal_requests_that_are_no_retries_are_two_samples(gateway: Gateway) -> None:
    first, second = await ask(gateway, "Hello"), await ask(gateway, "Hello")
    assert first.headers["x-turn-id"] != second.headers["x-turn-id"]
    assert await recorded(gateway, first, second) == 2


async def test_nobody_gets_the_answer_of_another_key(gateway: Gateway) -> None:
    answers = [await ask(gateway, "Hello", key, idempotency_key="k") for key in (OWNER, OTHER, AGENT)]
    assert len({answer.headers["x-turn-id"] for answer in answers}) == 3


async def test_an_answer_that_its_client_left_is_sampled_anew(gateway: Gateway) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            await ask(gateway, "slowly", x_stainless_retry_count="0")
    await gateway.idle()
    again = await ask(gateway, "slowly", x_stainless_retry_count="1")
    assert again.json()["choices"][0]["message"]["content"] == "one two three"
