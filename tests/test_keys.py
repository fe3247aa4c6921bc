"""Administration by command, on the database of a served home."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from agent_rl.experience import lineage, tenancy
from agent_rl.experience.store import ApiKey, Store, migrate
from agent_rl.settings import load
from server.cli import app
from server.launch import write_settings

Command = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, redis_url: str) -> Path:
    """As `serve` leaves it: settings, schema, the operator's tenant and policy."""
    settings = load(overrides={"home": str(tmp_path), "store.redis": redis_url})

    async def prepare() -> None:
        await migrate(settings.database_url)
        store = await Store.open(settings.database_url)
        await store.ensure_tenant("default", "default")
        await lineage.ensure_policy(store, "default", "default", "b" * 64)
        await store.close()

    write_settings(settings)
    asyncio.run(prepare())
    return tmp_path


@pytest.fixture
def command(home: Path) -> Command:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--home", str(home)], env={"COLUMNS": "250"})
        if done.exception:
            raise done.exception
        return done.output

    return run


def key_of(home: Path, secret: str) -> ApiKey | None:
    async def look() -> ApiKey | None:
        store = await Store.open(load(overrides={"home": str(home)}).database_url)
        try:
            return await store.key(tenancy.hash_key(secret))
        finally:
            await store.close()

    return asyncio.run(look())


def test_a_key_is_shown_once_rotated_with_an_overlap_and_revoked(home: Path, command: Command) -> None:
    first, secret = command("keys", "create", "--scope", "agent", "--label", "laptop").split("\n")[:2]
    key_id = first.split()[0]
    assert secret.startswith("arl-")
    made = key_of(home, secret)
    assert made is not None
    assert (made.api_key_id, made.scopes, made.revoked_at) == (key_id, frozenset({"agent"}), None)
    listed = command("keys", "list")
    assert key_id in listed
    assert secret not in listed
    assert made.key_hash not in listed
    fresh = command("keys", "rotate", key_id, "--overlap-s", "3600").split("\n")[1]
    old, new = key_of(home, secret), key_of(home, fresh)
    assert old is not None
    assert old.revoked_at is not None
    assert new is not None
    assert (new.scopes, new.label, new.revoked_at) == (frozenset({"agent"}), "laptop", None)
    command("keys", "revoke", key_id)
    assert (key_of(home, secret), key_of(home, fresh)) == (None, new)


def test_limits_are_the_keys_and_go_along_when_it_is_rotated(home: Path, command: Command) -> None:
    limits = ("--requests-per-minute", "60", "--max-concurrency", "2")
    key_id = command("keys", "create", *limits).split()[0]
    fresh = key_of(home, command("keys", "rotate", key_id).split("\n")[1])
    assert fresh is not None
    assert (fresh.requests_per_minute, fresh.max_concurrency) == (60, 2)


def test_tenants_and_policies(command: Command) -> None:
    assert "policies: subject" in command("tenants", "set", "acme", "--policies", "subject", "--no-learn")
    command("policies", "create", "coder", "--tenant", "acme")
    listed = command("policies", "list", "--tenant", "acme")
    assert "acme~default" in listed
    assert "acme~coder" in listed
    assert "acme" in command("tenants", "list")


def test_a_forgotten_tenant_is_gone_and_the_operators_stays(command: Command, redis_url: str) -> None:
    command("tenants", "set", "acme")
    with Redis.from_url(redis_url) as redis:
        redis.set("agent-rl:turns:outbox:c1", "kept")
        redis.sadd("agent-rl:turns:outboxes:acme", "c1")
        assert "acme~default" in command("forget", "tenant", "acme")
        assert redis.keys("*") == []
    assert "acme" not in command("tenants", "list")
    with pytest.raises(ValueError, match="cannot be deleted"):
        command("forget", "tenant", "default")
