"""Tenants, keys, limits and policies of subjects, through the real gateway and its administration."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway import AGENT, OWNER, Gateway, running_gateway

from agent_rl.experience import tenancy
from server.auth import Caller
from server.limits import Limits
from server.refusal import Refusal

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tiny_model, redis_url, tmp_path, cache_s=0.0) as running:
        yield running


async def call(gateway: Gateway, method: str, path: str, key: str = OWNER, **body: Any) -> httpx.Response:
    async with gateway.http(key) as web:
        return await web.request(method, path, json=body or None)


async def chat(gateway: Gateway, key: str, **more: Any) -> httpx.Response:
    return await call(gateway, "POST", "/v1/chat/completions", key, model="default", messages=HELLO, **more)


async def new_tenant(gateway: Gateway, tenant_id: str, **decided: Any) -> str:
    """The secret of a key with every scope in a tenant of its own."""
    made = await call(gateway, "PUT", f"/v1/admin/tenants/{tenant_id}", **decided)
    assert made.status_code == 200, made.text
    body: dict[str, Any] = {"tenant_id": tenant_id, "scopes": ["agent", "feedback", "admin"]}
    key = await call(gateway, "POST", "/v1/admin/keys", **body)
    assert key.status_code == 201, key.text
    return str(key.json()["key"])


async def test_a_key_is_made_shown_once_rotated_and_revoked(gateway: Gateway) -> None:
    made = await call(gateway, "POST", "/v1/admin/keys", label="laptop", scopes=["agent"])
    secret, key_id = made.json()["key"], made.json()["id"]
    assert (await chat(gateway, secret)).status_code == 200
    listed = (await call(gateway, "GET", "/v1/admin/keys")).json()["data"]
    assert [key["label"] for key in listed if key["id"] == key_id] == ["laptop"]
    assert not any("key" in key or "key_hash" in key for key in listed)
    rotated = await call(gateway, "POST", f"/v1/admin/keys/{key_id}/rotate", overlap_s=3600)
    fresh = rotated.json()["key"]
    assert [(await chat(gateway, one)).status_code for one in (secret, fresh)] == [200, 200]
    assert (await call(gateway, "DELETE", f"/v1/admin/keys/{key_id}")).status_code == 200
    assert [(await chat(gateway, one)).status_code for one in (secret, fresh)] == [401, 200]


async def test_only_hashes_are_stored(gateway: Gateway) -> None:
    key, secret = await tenancy.create_key(gateway.store, "default")
    assert key.key_hash == tenancy.hash_key(secret)
    database = gateway.settings.home / "agent-rl.db"
    assert secret.encode() not in database.read_bytes() + Path(f"{database}-wal").read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/admin/keys", {"scopes": ["root"]}, 400),
        ("POST", "/v1/admin/keys", {"tenant_id": "nobody"}, 404),
        ("DELETE", "/v1/admin/keys/nothing", {}, 404),
        ("PUT", "/v1/admin/tenants/a b", {"learn": True}, 400),
        ("PUT", "/v1/admin/tenants/acme", {"policies": "mine"}, 400),
        ("PUT", "/v1/admin/tenants/acme", {"learns": True}, 400),
        ("DELETE", "/v1/admin/tenants/default", {}, 400),
    ],
)
async def test_what_cannot_be_administered(
    gateway: Gateway, method: str, path: str, body: dict[str, Any], status: int
) -> None:
    answer = await call(gateway, method, path, **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


async def test_an_admin_administers_its_own_tenant_alone(gateway: Gateway) -> None:
    acme = await new_tenant(gateway, "acme")
    assert (await call(gateway, "GET", "/v1/admin/keys", AGENT)).status_code == 403
    keys = (await call(gateway, "GET", "/v1/admin/keys", acme)).json()["data"]
    assert {key["tenant_id"] for key in keys} == {"acme"}
    tenants = (await call(gateway, "GET", "/v1/admin/tenants", acme)).json()["data"]
    assert [tenant["id"] for tenant in tenants] == ["acme"]
    assert (await call(gateway, "PUT", "/v1/admin/tenants/default", acme, learn=False)).status_code == 403
    assert (await call(gateway, "POST", "/v1/admin/keys", acme, tenant_id="default")).status_code == 403
    owners = (await call(gateway, "GET", "/v1/admin/keys")).json()["data"]
    foreign = next(key["id"] for key in owners if key["tenant_id"] == "default")
    assert (await call(gateway, "DELETE", f"/v1/admin/keys/{foreign}", acme)).status_code == 404


async def test_nothing_of_one_tenant_is_reachable_from_another(gateway: Gateway) -> None:
    acme, evil = await new_tenant(gateway, "acme"), await new_tenant(gateway, "evil")
    mine = await chat(gateway, acme)
    turn_id = mine.headers["x-turn-id"]
    await gateway.transcript(turn_id)
    assert (await call(gateway, "GET", f"/v1/turns/{turn_id}", acme)).status_code == 200
    for path in (f"/v1/turns/{turn_id}", f"/v1/turns/chatcmpl-{turn_id}"):
        assert (await call(gateway, "GET", path, evil)).status_code == 404
    session_id = mine.headers["x-session-id"]
    gone = await call(gateway, "DELETE", f"/v1/sessions/{session_id}", evil)
    assert gone.json()["turns"] == 0
    assert (await call(gateway, "GET", f"/v1/turns/{turn_id}", acme)).status_code == 200


async def test_a_tenant_decides_what_store_false_means(gateway: Gateway) -> None:
    for unstored, reason in (("learn", None), ("keep", "store")):
        key = await new_tenant(gateway, f"t-{unstored}", unstored=unstored)
        turn = (await gateway.transcript((await chat(gateway, key, store=False)).headers["x-turn-id"])).turn
        assert (turn.no_lesson, turn.retrievable) == (reason, False)
    key = await new_tenant(gateway, "t-discard", unstored="discard")
    silent = await chat(gateway, key, store=False)
    recorded = await chat(gateway, key)
    await gateway.transcript(recorded.headers["x-turn-id"])
    assert await gateway.store.transcript(silent.headers["x-turn-id"]) is None


async def test_a_turn_behind_one_that_was_discarded_is_recorded_whole(gateway: Gateway) -> None:
    key = await new_tenant(gateway, "acme", unstored="discard")
    silent = await chat(gateway, key, store=False)
    past = [*HELLO, silent.json()["choices"][0]["message"], {"role": "user", "content": "More"}]
    body = {"model": "default", "messages": past}
    told = await call(gateway, "POST", "/v1/chat/completions", key, **body)
    found = await gateway.transcript(told.headers["x-turn-id"])
    assert (found.turn.parent_id, found.turn.shared_len, found.turn.fork_reason) == (None, 0, "unrecorded")
    assert [message.content for message in found.messages] == ["Hello", "Okay.", "More"]
    assert found.turn.session_id == silent.headers["x-session-id"]
    assert len(found.prompt_ids) == told.json()["usage"]["prompt_tokens"]
    more = [*past, told.json()["choices"][0]["message"], {"role": "user", "content": "Last"}]
    last = await call(gateway, "POST", "/v1/chat/completions", key, model="default", messages=more)
    assert (await gateway.transcript(last.headers["x-turn-id"])).turn.parent_id == told.headers["x-turn-id"]


async def test_each_subject_has_a_policy_of_its_own(gateway: Gateway) -> None:
    key = await new_tenant(gateway, "acme", policies="subject")
    turns = [
        (await gateway.transcript((await chat(gateway, key, user=user)).headers["x-turn-id"])).turn
        for user in ("ann", "bob", "ann")
    ]
    assert turns[0].policy_id == turns[2].policy_id != turns[1].policy_id
    assert turns[0].policy_id.startswith("acme~default:")
    made = await tenancy.policies_of(gateway.store, "acme")
    assert {subject for _, subject in made} == {None, "ann", "bob"}
    names = [model["id"] for model in (await call(gateway, "GET", "/v1/models", key)).json()["data"]]
    assert names == ["default"]
    other = next(policy.name for policy, subject in made if subject == "bob")
    refused = await call(gateway, "POST", "/v1/chat/completions", key, model=other, messages=HELLO, user="ann")
    assert refused.status_code == 404


async def test_tenants_share_the_servers_policy_or_have_their_own(gateway: Gateway) -> None:
    for policies, policy_id in (("shared", "default"), ("own", "own~default")):
        key = await new_tenant(gateway, policies, policies=policies)
        turn = (await gateway.transcript((await chat(gateway, key)).headers["x-turn-id"])).turn
        assert turn.policy_id == policy_id


async def test_a_new_tenant_teaches_nobody_elses_policy_unless_it_says_so(gateway: Gateway) -> None:
    key = await new_tenant(gateway, "acme")
    turn = (await gateway.transcript((await chat(gateway, key)).headers["x-turn-id"])).turn
    assert turn.policy_id == "acme~default"
    await call(gateway, "PUT", "/v1/admin/tenants/acme", learn=False)
    tenant = await gateway.store.tenant("acme")
    assert tenant is not None
    assert (tenant.policies, tenant.learn) == ("own", False)


async def test_a_subjects_policy_fits_its_column_whatever_the_names(gateway: Gateway) -> None:
    longest = "t" * 32
    key = await new_tenant(gateway, longest, policies="subject")
    turn = (await gateway.transcript((await chat(gateway, key, user="u" * 256)).headers["x-turn-id"])).turn
    assert len(turn.policy_id) <= 64
    assert (await call(gateway, "PUT", f"/v1/admin/tenants/{longest}t", learn=True)).status_code == 400
    await tenancy.create_policy(gateway.store, longest, "p" * 14)
    with pytest.raises(ValueError, match="at most 47 letters"):
        await tenancy.create_policy(gateway.store, longest, "p" * 15)
    with pytest.raises(ValueError, match="cannot have"):
        await tenancy.create_policy(gateway.store, "default", "a:b")


async def test_a_key_has_a_rate(gateway: Gateway) -> None:
    made = await call(gateway, "POST", "/v1/admin/keys", requests_per_minute=2)
    answers = [await chat(gateway, made.json()["key"]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 25 <= int(answers[2].headers["retry-after"]) <= 31
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["2"] * 3
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert 55 <= float(answers[2].headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert "x-ratelimit-limit-requests" not in (await chat(gateway, OWNER)).headers


async def test_a_bucket_fills_again_and_answers_end() -> None:
    now = 0.0
    limits = Limits(lambda: now)
    caller = Caller(None, "k", frozenset(), requests_per_minute=60, max_concurrency=1)  # type: ignore[arg-type]
    limits.enter(caller)
    with pytest.raises(Refusal, match="1 answers running"):
        limits.enter(caller)
    limits.leave(caller)
    for _ in range(59):
        limits.enter(caller)
        limits.leave(caller)
    with pytest.raises(Refusal, match="60 requests a minute"):
        limits.enter(caller)
    now = 1.0
    limits.enter(caller)
