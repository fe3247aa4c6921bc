"""The gateway around its wires: keys, limits, health, models, feedback, releases, and parts that are away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway import AGENT, OWNER, Gateway, running_gateway

from agent_rl.experience.store import StoreUnavailable
from server.directory import Cache, share
from server.engines.scripted import Rule, Script
from server.refusal import Refusal

SCRIPT = {
    "rules": [{"user": "slowly", "text": "one two three four five six", "token_s": 0.05}],
    "default": {"text": "Okay."},
}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    options = {"max_body_bytes": 2000, "max_concurrency": 2, "adapter_wait_s": 0.4, "cache_s": 0.0}
    async with running_gateway(tiny_model, redis_url, tmp_path, script=SCRIPT, **options) as running:
        yield running


def body(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [{"role": "user", "content": text}], **more}


# ----------------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "no_api_key"),
        ({"authorization": "Bearer arl-wrong"}, 401, "invalid_api_key"),
        ({"authorization": "Basic arl-owner"}, 401, "no_api_key"),
        ({"x-api-key": OWNER}, 200, None),
        ({"authorization": f"bearer {OWNER}"}, 200, None),
        ({"x-api-key": OWNER, "host": "evil.example"}, 403, "not_loopback"),
        ({"x-api-key": OWNER, "origin": "https://evil.example"}, 403, "not_loopback"),
        ({"x-api-key": OWNER, "host": "localhost:1", "origin": "http://localhost:3000"}, 200, None),
    ],
)
async def test_who_may_come_in(gateway: Gateway, headers: dict[str, str], status: int, code: str | None) -> None:
    async with gateway.http() as web:
        del web.headers["authorization"]
        answer = await web.post(CHAT, json=body(), headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["code"] == code


async def test_a_key_does_only_what_its_scopes_say(gateway: Gateway) -> None:
    async with gateway.http(AGENT) as web:
        answer = await web.post("/v1/feedback", json={"turn_id": "t", "value": 1})
    assert answer.status_code == 403
    assert "scope 'feedback'; this one has: agent" in answer.json()["error"]["message"]


async def test_without_keys_on_loopback(tiny_model: Path, redis_url: str, tmp_path: Path) -> None:
    async with running_gateway(tiny_model, redis_url, tmp_path, require_key=False) as gateway, gateway.http() as web:
        del web.headers["authorization"]
        assert (await web.post(CHAT, json=body())).status_code == 200


async def test_too_large_a_body_is_refused_while_it_is_read(gateway: Gateway) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 1000

    async with gateway.http() as web:
        announced = await web.post(CHAT, json=body("x" * 2000))
        in_pieces = await web.post(CHAT, content=pieces())
    for answer in (announced, in_pieces):
        assert answer.status_code == 413
        assert "larger than 2000 bytes" in answer.json()["error"]["message"]


async def test_one_more_than_the_limit_waits_for_its_turn(gateway: Gateway) -> None:
    async with gateway.http() as web:
        answers = await asyncio.gather(*(web.post(CHAT, json=body("slowly")) for _ in range(3)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert [answer.status_code for answer in refused] == [429]
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


async def test_what_is_not_there(gateway: Gateway) -> None:
    async with gateway.http() as web:
        nowhere, wrong_verb = await web.get("/v1/nothing"), await web.get(CHAT)
    assert (nowhere.status_code, wrong_verb.status_code) == (404, 405)
    assert nowhere.json()["error"]["message"] == "GET /v1/nothing: Not Found"


# --------------------------------------------------------------------------------------------- what it says of itself


async def test_models(gateway: Gateway) -> None:
    async with gateway.openai() as ai:
        assert [model.id async for model in ai.models.list()] == ["default"]
        assert (await ai.models.retrieve("default")).owned_by == "default"
        with pytest.raises(openai.NotFoundError, match="models here: default"):
            await ai.models.retrieve("other")


async def test_health_and_metrics(gateway: Gateway) -> None:
    async with gateway.http() as web:
        await web.post(CHAT, json=body())
        await web.post(CHAT, json={})
        assert (await web.get("/healthz")).json() == {"alive": True}
        assert (await web.get("/readyz")).json() == {"ready": True, "missing": []}
        page = (await web.get("/metrics")).text
    assert 'agent_rl_turns_total{finish="stop",fork="first"} 1.0' in page
    assert 'agent_rl_refusals_total{status="400"} 1.0' in page
    assert "agent_rl_answers_running 0.0" in page


async def test_not_ready_says_what_is_missing(tiny_model: Path, redis_url: str, tmp_path: Path) -> None:
    async with running_gateway(tiny_model, redis_url, tmp_path) as gateway, gateway.http() as web:
        await gateway.stop_engine()
        answer = await web.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["missing"] == [f"engine: {gateway.settings.engine.url} does not answer"]


async def test_a_turn_is_explained_to_its_own_key_alone(gateway: Gateway) -> None:
    async with gateway.http(AGENT) as agent, gateway.http("arl-other") as other, gateway.http(OWNER) as owner:
        turn_id = (await agent.post(CHAT, json=body())).headers["x-turn-id"]
        await gateway.transcript(turn_id)
        answers = [await web.get(f"/v1/turns/chatcmpl-{turn_id}") for web in (agent, other, owner)]
    assert [answer.status_code for answer in answers] == [200, 404, 200]
    assert answers[0].json()["turn"]["answer"]["content"] == "Okay."


# --------------------------------------------------------------------------------------------------------- feedback


async def test_feedback_reaches_its_turn_and_is_an_upsert(gateway: Gateway) -> None:
    async with gateway.http() as web:
        turn_id = (await web.post(CHAT, json=body(), headers={"x-session-id": "mine"})).headers["x-turn-id"]
        await gateway.transcript(turn_id)
        said = [
            await web.post("/v1/feedback", json={"response_id": f"chatcmpl-{turn_id}", "id": "f1", "value": -1}),
            await web.post("/v1/feedback", json={"turn_id": turn_id, "id": "f1", "comment": "Too long."}),
            await web.post("/v1/feedback", json={"session_id": "mine", "id": "f2", "label": "rude"}),
        ]
        assert [answer.status_code for answer in said] == [202, 202, 202]
        for _ in range(500):
            known = (await web.get(f"/v1/turns/{turn_id}")).json()["feedback"]
            if len(known) == 2:  # the last that was said
                break
            await asyncio.sleep(0.01)
    assert [(f["feedback_id"], f["value"], f["comment"], f["label"]) for f in known] == [
        ("f1", None, "Too long.", None),
        ("f2", None, None, "rude"),
    ]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"value": 1}, "name one target"),
        ({"turn_id": "t", "session_id": "s", "value": 1}, "name one target"),
        ({"turn_id": "t"}, "says nothing"),
        ({"turn_id": "t", "value": 2}, "between -1 and 1"),
        ({"turn_id": "t", "comment": 3}, "must be a string"),
    ],
)
async def test_feedback_that_cannot_be_used(gateway: Gateway, bad: dict[str, Any], words: str) -> None:
    async with gateway.http() as web:
        answer = await web.post("/v1/feedback", json=bad)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


# --------------------------------------------------------------------------------------------------------- releases


async def deploy(gateway: Gateway, **columns: object) -> None:
    names = ", ".join(f"{name} = '{value}'" for name, value in columns.items())
    async with gateway.store.write() as connection:
        await connection.exec_driver_sql(f"UPDATE deployments SET {names}")


async def test_a_release_that_comes_in_time_is_waited_for(gateway: Gateway) -> None:
    await deploy(gateway, live_release_id="r1")
    async with gateway.http() as web:
        asked = asyncio.create_task(web.post(CHAT, json=body()))
        await asyncio.sleep(0.15)
        gateway.engine.adapters["r1"] = "checksum"
        answer = await asked
        assert (answer.status_code, answer.headers["x-policy-version"]) == (200, "r1")
    spans = (await gateway.transcript(answer.headers["x-turn-id"])).turn.spans
    assert [span.release for span in spans] == ["r1"]


async def test_a_release_that_does_not_come_is_a_503(gateway: Gateway) -> None:
    await deploy(gateway, live_release_id="r1")
    async with gateway.http() as web:
        answer = await web.post(CHAT, json=body())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"]["code"] == "engine_unavailable"


async def test_the_canary_gets_its_share_of_sessions_for_good(gateway: Gateway) -> None:
    await deploy(gateway, canary_release_id="r1", canary_share=0.5)
    gateway.engine.adapters["r1"] = "checksum"
    got = {}
    async with gateway.http() as web:
        for name in "abcdefgh":
            answers = [await web.post(CHAT, json=body(), headers={"x-session-id": name}) for _ in range(2)]
            assert len({answer.headers["x-policy-version"] for answer in answers}) == 1
            turn = (await gateway.transcript(answers[0].headers["x-turn-id"])).turn
            got[turn.session_id] = answers[0].headers["x-policy-version"]
    assert got == {name: "r1" if share(name) < 0.5 else "base" for name in got}


# ------------------------------------------------------------------------------------------------- parts that are away


async def test_an_engine_that_is_away_is_a_503(gateway: Gateway) -> None:
    async with gateway.http() as web:
        await web.post(CHAT, json=body())
        gateway.engine.script = Script(default=Rule(unavailable=True))
        whole, stream = await web.post(CHAT, json=body()), await web.post(CHAT, json=body(stream=True))
    assert (whole.status_code, stream.status_code) == (503, 503)


async def test_the_cache_serves_on_while_sql_is_away() -> None:
    answers: list[str | Exception] = ["one", StoreUnavailable("down"), StoreUnavailable("down"), "two"]

    async def load(key: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cache = Cache(load, 0.0)
    assert [await cache.get("known"), await cache.get("known")] == ["one", "one"]
    with pytest.raises(Refusal) as refusal:
        await cache.get("never seen")
    assert (refusal.value.status, await cache.get("known")) == (503, "two")


async def test_the_cache_asks_once_for_all_who_want_it() -> None:
    asked = []

    async def load(key: str) -> str:
        asked.append(key)
        await asyncio.sleep(0.01)
        return "one"

    cache = Cache(load, 60.0)
    assert await asyncio.gather(*(cache.get("k") for _ in range(5))) == ["one"] * 5
    assert asked == ["k"]


async def test_what_is_older_than_its_life_is_waited_for_by_all() -> None:
    answers = ["old", "new"]

    async def load(key: str) -> str:
        await asyncio.sleep(0.01)
        return answers.pop(0)

    cache = Cache(load, 0.02)
    assert await cache.get("k") == "old"
    await asyncio.sleep(0.1)
    assert await asyncio.gather(*(cache.get("k") for _ in range(5))) == ["new"] * 5


async def test_answers_go_on_without_redis_and_are_recorded_later(
    tiny_model: Path, tmp_path: Path, redis_process: Any
) -> None:
    async with running_gateway(tiny_model, redis_process.url, tmp_path) as gateway, gateway.http() as web:
        redis_process.stop(forget=True)
        answer = await web.post(CHAT, json=body())
        redis_process.start()
        assert answer.status_code == 200
        assert (await gateway.transcript(answer.headers["x-turn-id"])).turn.answer.content == "Okay."


def test_shares_are_even() -> None:
    assert 0.45 < sum(share(str(n)) < 0.5 for n in range(1000)) / 1000 < 0.55
