"""The gateway's door: whose key this is, what it may do, how much it may send, and from where."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import HTTPConnection, Request

from agent_rl.experience.store import Tenant
from agent_rl.settings import GatewaySettings
from server.directory import Directory
from server.refusal import Refusal

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
LOCAL_TENANT = "default"
ALL_SCOPES = frozenset({"agent", "feedback", "admin"})


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: Tenant
    api_key_id: str | None  # None: loopback without a key
    scopes: frozenset[str]
    requests_per_minute: int | None = None  # None: no limit
    max_concurrency: int | None = None


class Door:
    def __init__(self, directory: Directory, settings: GatewaySettings) -> None:
        self._directory, self._settings = directory, settings

    async def caller(self, request: HTTPConnection, scope: str) -> Caller:
        """Raises Refusal: 401 without a good key, 403 where the key lacks `scope`."""
        secret = secret_of(request)
        if secret is None and not self._settings.require_key and self._settings.host in LOOPBACK:
            return Caller(await self._directory.tenant(LOCAL_TENANT), None, ALL_SCOPES)
        if secret is None:
            raise Refusal(401, "no API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'", code="no_api_key")
        key = await self._directory.key(secret)
        if key is None:
            raise Refusal(401, "this API key is not known or was revoked", code="invalid_api_key")
        if scope not in key.scopes:
            has = ", ".join(sorted(key.scopes)) or "nothing"
            raise Refusal(403, f"this needs a key with the scope '{scope}'; this one has: {has}", code="missing_scope")
        tenant = await self._directory.tenant(key.tenant_id)
        return Caller(tenant, key.api_key_id, key.scopes, key.requests_per_minute, key.max_concurrency)

    async def body(self, request: Request) -> bytes:
        """The request's body. Raises Refusal (413) as soon as it is too large, before all of it is read."""
        limit = self._settings.max_body_bytes
        announced = request.headers.get("content-length", "0")
        size, parts = int(announced) if announced.isdigit() else 0, []
        if size <= limit:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
        if size > limit:
            raise Refusal(413, f"the body is larger than {limit} bytes, the limit here", code="body_too_large")
        return b"".join(parts)


def secret_of(connection: HTTPConnection) -> str | None:
    """The API key that a request or a handshake came with."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer or connection.headers.get("x-api-key") or None
