"""Who may ask, for which policy, served by which release: SQL, remembered for a stated life.

While SQL is down what is known serves on (stale is better than refusing); what was never seen cannot be checked and is
refused with 503.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from agent_rl.experience.store import ApiKey, Store, StoreUnavailable, Tenant
from agent_rl.experience.tenancy import OPERATOR, SHARED_POLICY, hash_key, subject_policy
from agent_rl.types import BASE_RELEASE, Deployment, Policy
from server.refusal import Refusal

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
LOOKUP_S = 2.0
CAPACITY = 10_000
log = logging.getLogger("agent_rl.gateway")


class Cache(Generic[K, V]):
    """Answers of `load`, each good for `life_s`, and as long again while a newer one is asked for; an older one only
    where `load` cannot answer."""

    def __init__(self, load: Callable[[K], Awaitable[V]], life_s: float) -> None:
        self._load, self._life_s = load, life_s
        self._known: OrderedDict[K, tuple[float, V]] = OrderedDict()  # (when it was heard, what)
        self._asking: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K) -> V:
        """Asked once for all who want it. Raises Refusal (503) where nothing is known and SQL does not answer."""
        known, asking = self._known.get(key), self._asking.get(key)
        if known and time.monotonic() - known[0] < self._life_s * (2 if asking else 1):
            return known[1]
        if asking is None:
            asking = self._asking[key] = asyncio.create_task(self._ask(key))
            asking.add_done_callback(lambda _: self._asking.pop(key))
        return await asyncio.shield(asking)

    async def _ask(self, key: K) -> V:
        known = self._known.get(key)
        try:
            async with asyncio.timeout(LOOKUP_S):
                value = await self._load(key)
        except (StoreUnavailable, TimeoutError) as error:
            if known is None:
                raise Refusal(503, "the database does not answer; try again", retry_after_s=2) from error
            log.warning("SQL does not answer, serving on with what is known: %r", error)
            value = known[1]
        self._known[key] = (time.monotonic(), value)
        self._known.move_to_end(key)
        while len(self._known) > CAPACITY:
            self._known.popitem(last=False)
        return value


class Directory:
    """The gateway's view of keys, tenants, policies and deployments."""

    def __init__(self, store: Store, life_s: float) -> None:
        self._store = store
        self._keys: Cache[str, ApiKey | None] = Cache(store.key, life_s)
        self._tenants: Cache[str, Tenant | None] = Cache(store.tenant, life_s)
        self._policies: Cache[str, list[Policy]] = Cache(store.named_policies, life_s)
        self._deployments: Cache[str, Deployment | None] = Cache(store.deployment, life_s)

    async def key(self, secret: str) -> ApiKey | None:
        hashed = hash_key(secret)
        key = await self._keys.get(hashed)
        if key is None or not hmac.compare_digest(key.key_hash, hashed):
            return None
        return key if key.revoked_at is None or key.revoked_at > time.time() else None

    async def tenant(self, tenant_id: str) -> Tenant:
        tenant = await self._tenants.get(tenant_id)
        if tenant is None:
            raise Refusal(503, f"tenant {tenant_id} is not there yet; run `agent-rl serve`", retry_after_s=5)
        return tenant

    async def policies(self, tenant: Tenant) -> list[Policy]:
        """Those that the tenant may name: its own, and the server's shared one where it has chosen that."""
        own = await self._policies.get(tenant.tenant_id)
        if tenant.policies != "shared" or any(policy.name == SHARED_POLICY for policy in own):
            return own
        shared = [policy for policy in await self._policies.get(OPERATOR) if policy.name == SHARED_POLICY]
        return shared + own

    async def policy(self, tenant: Tenant, name: str, subject: str | None) -> Policy:
        """The policy that answers `subject`. Raises Refusal (404) that lists what there is."""
        there = await self.policies(tenant)
        found = next((policy for policy in there if policy.name == name), None)
        if found is None:
            names = ", ".join(sorted(policy.name for policy in there)) or "none"
            raise Refusal(
                404, f"there is no model {name!r}; models here: {names}", code="model_not_found", param="model"
            )
        if tenant.policies == "subject" and subject is not None:
            return subject_policy(found, tenant.tenant_id, subject)
        return found

    async def live(self, policy_id: str) -> str:
        deployment = await self._deployments.get(policy_id)
        return BASE_RELEASE if deployment is None else deployment.live

    async def release(self, policy_id: str, session_id: str) -> str:
        """The release that this session gets: the canary's share of sessions is sticky."""
        deployment = await self._deployments.get(policy_id)
        if deployment is None:
            return BASE_RELEASE
        if deployment.canary is not None and share(session_id) < deployment.canary_share:
            return deployment.canary
        return deployment.live


def share(session_id: str) -> float:
    """Where a session lies in [0, 1), evenly and for good."""
    return int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:8]) / 2**64
