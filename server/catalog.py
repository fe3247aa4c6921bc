"""What there is: `GET /v1/models`, `/v1/models/{name}`, and `/v1/turns/{id}`: all that is known of one turn."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agent_rl.experience.explaining import explain
from agent_rl.experience.store import Store, StoreUnavailable
from agent_rl.types import Policy
from server.auth import Caller, Door
from server.directory import Directory
from server.refusal import Refusal


def routes(directory: Directory, store: Store, door: Door) -> list[BaseRoute]:
    async def models(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        there = await directory.policies(caller.tenant)
        return _json({"object": "list", "data": [await _model(policy, directory) for policy in there]})

    async def model(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        policy = await directory.policy(caller.tenant, request.path_params["name"], None)
        return _json(await _model(policy, directory))

    async def turn(request: Request) -> Response:
        caller = await door.caller(request, "agent")
        turn_id = request.path_params["turn_id"].removeprefix("chatcmpl-")
        try:
            known = await explain(store, turn_id)
        except StoreUnavailable as error:
            raise Refusal(503, "the database does not answer; try again", retry_after_s=2) from error
        if known is None or not _may_see(caller, known):
            raise Refusal(404, f"there is no turn {turn_id}, or it is not recorded yet", code="turn_not_found")
        return _json(known)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/turns/{turn_id}", turn),
    ]


async def _model(policy: Policy, directory: Directory) -> dict[str, object]:
    """OpenAI's fields, and the release that is live."""
    live = await directory.live(policy.policy_id)
    return {"id": policy.name, "object": "model", "created": 0, "owned_by": policy.tenant_id, "release": live}


def _may_see(caller: Caller, known: dict[str, object]) -> bool:
    """Its own key, or an admin of its tenant."""
    turn = known["turn"]
    assert isinstance(turn, dict)
    own = turn["api_key_id"] == caller.api_key_id or "admin" in caller.scopes
    return own and turn["tenant_id"] == caller.tenant.tenant_id


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
