"""Tenants, what they decide, and their keys. A key's secret is made here, given out once, and stored as its hash."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sqlalchemy import or_, select, update

from agent_rl.experience import lineage
from agent_rl.experience.database import Refused
from agent_rl.experience.store import ApiKey, Store, Tenant, key_of, tenant_of
from agent_rl.experience.tables import api_keys, policies, tenants
from agent_rl.types import Policy

OPERATOR = "default"  # the tenant whose admins administer all
SHARED_POLICY = "default"  # the name that every tenant knows
SCOPES = ("agent", "feedback", "admin")
CHOICES = {"unstored": ("learn", "keep", "discard"), "policies": ("shared", "own", "subject")}
TENANT_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


def hash_key(secret: str) -> str:
    """What is stored of a key: sha256 hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- tenants


async def tenants_of(store: Store) -> list[Tenant]:
    """Oldest first."""
    async with store.read() as connection:
        rows = await connection.execute(select(tenants).order_by(tenants.c.created_at, tenants.c.tenant_id))
        return [tenant_of(row) for row in rows.mappings()]


async def set_tenant(store: Store, tenant_id: str, **decided: object) -> Tenant:
    """Make a tenant, or change one. `decided`: name, learn, unstored, policies, retention_s.

    A new one has a policy of its own, unless it is decided that its lessons may teach the one that it shares with
    others. Policies of its own, or of its subjects, begin with the server's base. Raises Refused.
    """
    _check(tenant_id, decided)
    if await store.tenant(tenant_id) is None:
        decided = {"policies": "own", **decided}
    if decided.get("policies", "shared") != "shared":
        await lineage.ensure_policy(store, tenant_id, SHARED_POLICY, (await shared_policy(store)).base_hash)
    tenant = await store.ensure_tenant(tenant_id, str(decided.get("name") or tenant_id))
    if decided:
        async with store.write() as connection:
            await connection.execute(update(tenants).where(tenants.c.tenant_id == tenant_id).values(**decided))
    return await store.tenant(tenant_id) or tenant


def _check(tenant_id: str, decided: Mapping[str, object]) -> None:
    if not TENANT_ID.fullmatch(tenant_id):
        raise Refused(f"a tenant's id is 1 to 32 letters, digits, '-' and '_', not {tenant_id!r}")
    for name, choices in CHOICES.items():
        if decided.get(name, choices[0]) not in choices:
            raise Refused(f"{name} is one of {', '.join(choices)}, not {decided[name]!r}")
    retention_s = decided.get("retention_s")
    if retention_s is not None and not (isinstance(retention_s, int | float) and retention_s > 0):
        raise Refused(f"retention_s is a number of seconds above 0, or null for ever, not {retention_s!r}")


async def create_policy(store: Store, tenant_id: str, name: str) -> Policy:
    """Another policy that the tenant's clients may name as `model`; it begins with the server's base. Raises Refused,
    and ValueError for a name that cannot be one."""
    if await store.tenant(tenant_id) is None:
        raise Refused(f"there is no tenant {tenant_id!r}; see `agent-rl tenants list`")
    return await lineage.ensure_policy(store, tenant_id, name, (await shared_policy(store)).base_hash)


async def shared_policy(store: Store) -> Policy:
    """The operator's policy, which tenants without one of their own are answered by. Raises Refused."""
    found = next((p for p in await store.policies(OPERATOR) if p.name == SHARED_POLICY), None)
    if found is None:
        raise Refused("there is no policy yet: run `agent-rl serve` first")
    return found


def subject_policy(parent: Policy, tenant_id: str, subject: str) -> Policy:
    """The policy of one subject alone; the recorder writes its row with the subject's first turn."""
    mark = hashlib.sha256(f"{tenant_id}\0{subject}".encode()).hexdigest()[:16]
    return replace(
        parent, policy_id=f"{parent.policy_id}:{mark}", tenant_id=tenant_id, name=f"{parent.name}@{mark}", head=None
    )


async def policies_of(store: Store, tenant_id: str | None) -> list[tuple[Policy, str | None]]:
    """(policy, the subject that alone teaches it), oldest first; None: of every tenant."""
    query = select(policies.c.policy_id, policies.c.subject)
    async with store.read() as connection:
        subjects = {row.policy_id: row.subject for row in await connection.execute(query)}
    return [(policy, subjects.get(policy.policy_id)) for policy in await store.policies(tenant_id)]


# ------------------------------------------------------------------------------------------------------------ keys


async def create_key(
    store: Store,
    tenant_id: str,
    scopes: Iterable[str] = ("agent", "feedback"),
    label: str = "",
    *,
    requests_per_minute: int | None = None,
    max_concurrency: int | None = None,
) -> tuple[ApiKey, str]:
    """(the key, its secret: shown now and never again). Raises Refused."""
    wanted = sorted(set(scopes))
    if not wanted or not set(wanted) <= set(SCOPES):
        raise Refused(f"scopes are some of {', '.join(SCOPES)}, not {wanted}")
    for name, limit in (("requests_per_minute", requests_per_minute), ("max_concurrency", max_concurrency)):
        if limit is not None and limit < 1:
            raise Refused(f"{name} is 1 or more, or null for no limit, not {limit}")
    if await store.tenant(tenant_id) is None:
        raise Refused(f"there is no tenant {tenant_id!r}; see `agent-rl tenants list`")
    secret = "arl-" + secrets.token_urlsafe(32)
    limits = {"requests_per_minute": requests_per_minute, "max_concurrency": max_concurrency}
    api_key_id = await store.add_key(tenant_id, hash_key(secret), wanted, label, **limits)
    return await _key(store, api_key_id, tenant_id), secret


async def keys_of(store: Store, tenant_id: str | None) -> list[ApiKey]:
    """Oldest first, revoked ones too; None: of every tenant."""
    query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.api_key_id)
    if tenant_id is not None:
        query = query.where(api_keys.c.tenant_id == tenant_id)
    async with store.read() as connection:
        return [key_of(row) for row in (await connection.execute(query)).mappings()]


async def rotate_key(store: Store, api_key_id: str, tenant_id: str | None, overlap_s: float) -> tuple[ApiKey, str]:
    """Another key with the same rights; the old one goes on for `overlap_s`. Raises Refused."""
    old = await _key(store, api_key_id, tenant_id)
    fresh, secret = await create_key(
        store,
        old.tenant_id,
        old.scopes,
        old.label,
        requests_per_minute=old.requests_per_minute,
        max_concurrency=old.max_concurrency,
    )
    await revoke_key(store, api_key_id, tenant_id, after_s=overlap_s)
    return fresh, secret


async def revoke_key(store: Store, api_key_id: str, tenant_id: str | None, *, after_s: float = 0.0) -> None:
    """From then on the key is refused; gateways hear of it within twice `gateway.cache_s`. Raises Refused."""
    await _key(store, api_key_id, tenant_id)
    end = time.time() + max(0.0, after_s)
    sooner = or_(api_keys.c.revoked_at.is_(None), api_keys.c.revoked_at > end)
    async with store.write() as connection:
        revoking = update(api_keys).where(api_keys.c.api_key_id == api_key_id, sooner)
        await connection.execute(revoking.values(revoked_at=end))


async def _key(store: Store, api_key_id: str, tenant_id: str | None) -> ApiKey:
    found = next((key for key in await keys_of(store, tenant_id) if key.api_key_id == api_key_id), None)
    if found is None:
        raise Refused(f"there is no key {api_key_id!r}; see `agent-rl keys list`")
    return found
