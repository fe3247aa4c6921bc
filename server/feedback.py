"""`POST /v1/feedback`: what somebody says of an answer outside the conversation; many per target, upsert by id."""

from __future__ import annotations

import time
from uuid import uuid4

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agent_rl.types import Feedback
from server.auth import Caller, Door
from server.core import Core
from server.refusal import Refusal
from server.sessions import OURS, derive_session_id
from server.wires.request import Body, boolean, json_object, number, string

SAYS_SOMETHING = ("value", "label", "comment", "correction")
LONGEST_TEXT = 65_536


def routes(core: Core, door: Door) -> list[BaseRoute]:
    async def tell(request: Request) -> Response:
        caller = await door.caller(request, "feedback")
        feedback = parse(json_object(await door.body(request)), caller)
        await core.tell(feedback)
        target = {"turn_id": feedback.turn_id, "session_id": feedback.session_id}
        return Response(orjson.dumps({"id": feedback.feedback_id, **target}), 202, media_type="application/json")

    return [Route("/v1/feedback", tell, methods=["POST"])]


def parse(body: Body, caller: Caller) -> Feedback:
    """Raises Refusal (400) that names the field."""
    turn_id, session_id = _target(body, caller)
    feedback = Feedback(
        feedback_id=string(body, "id", 128) or uuid4().hex,
        tenant_id=caller.tenant.tenant_id,
        created_at=time.time(),
        turn_id=turn_id,
        session_id=session_id,
        name=string(body, "name", 200) or "feedback",
        value=number(body, "value", -1, 1),
        label=string(body, "label", 200),
        comment=string(body, "comment", LONGEST_TEXT),
        correction=string(body, "correction", LONGEST_TEXT),
        source=string(body, "source", 64) or "user",
        retracted=boolean(body, "retracted") or False,
    )
    if not feedback.retracted and all(getattr(feedback, name) in (None, "") for name in SAYS_SOMETHING):
        raise Refusal(400, f"the feedback says nothing: give one of {', '.join(SAYS_SOMETHING)}, or retract it")
    return feedback


def _target(body: Body, caller: Caller) -> tuple[str | None, str | None]:
    """(turn id, our session id), one of them given; a session may be named by the client's own id."""
    response_id, session_id = string(body, "response_id", 256), string(body, "session_id", 256)
    turn_id = string(body, "turn_id", 64) or (response_id and response_id.rpartition("-")[2])
    if bool(turn_id) == bool(session_id):
        raise Refusal(400, "name one target: turn_id, response_id or session_id", code="missing_field", param="turn_id")
    if turn_id:
        return turn_id, None
    assert session_id
    if session_id.startswith(OURS):
        return None, session_id
    end_user = string(body, "user", 256)
    return None, derive_session_id(caller.tenant.tenant_id, caller.api_key_id, end_user, session_id)
