"""Administration over HTTP: keys and tenants; and what is forgotten at a user's wish.

All of it needs a key with the scope `admin`. Such a key administers its own tenant; one of the tenant `default`, the
operator's, all of them. These requests alone write SQL from the gateway.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agent_rl.experience import deletion, tenancy
from agent_rl.experience.store import ApiKey, Refused, Store, StoreUnavailable, Tenant
from agent_rl.experience.stream import Stream, StreamUnavailable
from server.auth import Caller, Door
from server.core import Core
from server.refusal import Refusal, bad_field
from server.wires.request import Body, boolean, integer, json_object, kind, number, string

LONGEST_NAME = 200
OVERLAP_S = 24 * 3600.0
Handler = Callable[[Request, Caller, Body], Awaitable[tuple[int, Any]]]


def routes(store: Store, stream: Stream, door: Door, core: Core) -> list[BaseRoute]:
    async def forgotten(what: str, tenant_id: str, target: str) -> tuple[int, Any]:
        report = await deletion.forget(store, stream, what, tenant_id, target)
        core.forget(report.sessions)  # the other gateways hear of it in a moment
        return 200, asdict(report)

    async def make_key(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        tenant_id = _tenant(caller, string(body, "tenant_id", 64))
        key, secret = await tenancy.create_key(
            store,
            tenant_id,
            _scopes(body),
            string(body, "label", LONGEST_NAME) or "",
            requests_per_minute=integer(body, "requests_per_minute", 1, 10**6),
            max_concurrency=integer(body, "max_concurrency", 1, 10**6),
        )
        return 201, key_body(key) | {"key": secret}

    async def list_keys(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        keys = await tenancy.keys_of(store, _whose(caller))
        return 200, {"object": "list", "data": [key_body(key) for key in keys]}

    async def rotate_key(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        overlap_s = number(body, "overlap_s", 0, 30 * 24 * 3600)
        overlap_s = OVERLAP_S if overlap_s is None else overlap_s
        key, secret = await tenancy.rotate_key(store, request.path_params["key_id"], _whose(caller), overlap_s)
        return 201, key_body(key) | {"key": secret}

    async def revoke_key(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        await tenancy.revoke_key(store, request.path_params["key_id"], _whose(caller))
        return 200, {"id": request.path_params["key_id"], "revoked": True}

    async def list_tenants(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        whose = _whose(caller)
        known = [t for t in await tenancy.tenants_of(store) if whose in (None, t.tenant_id)]
        return 200, {"object": "list", "data": [tenant_body(tenant) for tenant in known]}

    async def set_tenant(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        tenant_id = _tenant(caller, request.path_params["tenant_id"])
        return 200, tenant_body(await tenancy.set_tenant(store, tenant_id, **decided(body)))

    async def forget_tenant(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
        tenant_id = _tenant(caller, request.path_params["tenant_id"])
        if tenant_id == tenancy.OPERATOR:
            raise Refusal(400, "the operator's own tenant cannot be deleted", code="invalid_value", param="tenant_id")
        return await forgotten("tenant", tenant_id, tenant_id)

    def forget(what: str) -> Handler:
        async def handle(request: Request, caller: Caller, body: Body) -> tuple[int, Any]:
            return await forgotten(what, caller.tenant.tenant_id, request.path_params["target"])

        return handle

    return [
        _route("/v1/admin/keys", "POST", make_key, door),
        _route("/v1/admin/keys", "GET", list_keys, door),
        _route("/v1/admin/keys/{key_id}/rotate", "POST", rotate_key, door),
        _route("/v1/admin/keys/{key_id}", "DELETE", revoke_key, door),
        _route("/v1/admin/tenants", "GET", list_tenants, door),
        _route("/v1/admin/tenants/{tenant_id}", "PUT", set_tenant, door),
        _route("/v1/admin/tenants/{tenant_id}", "DELETE", forget_tenant, door),
        _route("/v1/sessions/{target}", "DELETE", forget("session"), door),
        _route("/v1/subjects/{target}", "DELETE", forget("subject"), door),
    ]


def key_body(key: ApiKey) -> dict[str, Any]:
    """Everything but the hash."""
    shown = {name: value for name, value in asdict(key).items() if name not in ("api_key_id", "key_hash", "scopes")}
    return {"id": key.api_key_id, "scopes": sorted(key.scopes), **shown}


def tenant_body(tenant: Tenant) -> dict[str, Any]:
    """Everything but the key of its prefix chains."""
    shown = {name: value for name, value in asdict(tenant).items() if name not in ("tenant_id", "hmac_key")}
    return {"id": tenant.tenant_id, **shown}


def decided(body: Body) -> dict[str, object]:
    """What a body says of a tenant: only what it names is changed."""
    said: dict[str, object] = {
        "name": string(body, "name", LONGEST_NAME),
        "learn": boolean(body, "learn"),
        "unstored": string(body, "unstored", 16),
        "policies": string(body, "policies", 16),
        "retention_s": number(body, "retention_s", 1, 10**10),
    }
    for name in body:
        if name not in said:
            raise bad_field(name, f"is no field of a tenant; there are {', '.join(said)}", "unknown_field")
    return {
        name: value for name, value in said.items() if value is not None or (name in body and name == "retention_s")
    }


def _route(path: str, method: str, handle: Handler, door: Door) -> BaseRoute:
    async def respond(request: Request) -> Response:
        caller = await door.caller(request, "admin")
        raw = await door.body(request)
        try:
            status, body = await handle(request, caller, json_object(raw) if raw else {})
        except Refused as error:
            status = 404 if str(error).startswith("there is no") else 400
            raise Refusal(status, str(error), code="not_found" if status == 404 else "invalid_value") from error
        except (StoreUnavailable, StreamUnavailable) as error:
            raise Refusal(503, f"{error}; try again", code="unavailable", retry_after_s=2) from error
        return Response(orjson.dumps(body), status, media_type="application/json")

    return Route(path, respond, methods=[method])


def _whose(caller: Caller) -> str | None:
    """The tenant that the caller administers; None: every one."""
    return None if caller.tenant.tenant_id == tenancy.OPERATOR else caller.tenant.tenant_id


def _tenant(caller: Caller, named: str | None) -> str:
    """The tenant that is meant. Raises Refusal where the caller does not administer it."""
    own = caller.tenant.tenant_id
    if named not in (None, own) and own != tenancy.OPERATOR:
        raise Refusal(403, f"this key administers the tenant {own!r} alone", code="missing_scope")
    return named or own


def _scopes(body: Body) -> list[str]:
    value = body.get("scopes", ["agent", "feedback"])
    if not isinstance(value, list) or not all(isinstance(scope, str) for scope in value):
        raise bad_field("scopes", f"must be a list of strings, not {kind(value)}", "invalid_type")
    return value
