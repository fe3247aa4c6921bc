"""`GET /openapi.json`: what every route accepts and answers, from the declarations here.

The page lists the routes that the gateway really has; one that is not declared stands there bare. Fields that are
not named are accepted and change nothing, unless their meaning would be lost: then a 400 names the field.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
OBJECT: Schema = {"type": "object"}
MAY_BE_TEXT: Schema = {"type": ["string", "null"]}

ERRORS = {
    400: "The request cannot be used; `param` names the field",
    401: "No API key, or one that is not known",
    403: "The key lacks the scope, or a web page elsewhere asks a server on loopback",
    404: "There is no such thing, or it is not the caller's",
    408: "The body did not arrive in time",
    409: "It conflicts with what is there",
    413: "The body is larger than gateway.max_body_bytes",
    414: "The URL is longer than 8192 bytes",
    429: "Too many at once; `Retry-After` says when to try again",
    431: "More than 100 headers or 64 KiB of them",
    499: "The client hung up before there was an answer",
    500: "A fault of this server; its log has it",
    502: "The engine failed",
    503: "Something is not ready; `Retry-After` says when to try again",
    504: "The answer took longer than gateway.request_timeout_s",
}
EVERYWHERE = (400, 401, 403, 414, 429, 431, 503)  # of what needs a key
WITH_BODY = (*EVERYWHERE, 408, 413)
OF_AN_ADMIN = (*WITH_BODY, 404, 409)
OF_AN_ANSWER = (*WITH_BODY, 404, 499, 502, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    summary: str
    answers: dict[int, Schema | None]  # by status; None: no JSON
    errors: tuple[int, ...] = EVERYWHERE
    body: Schema | None = None
    query: tuple[str, ...] = ()
    stream: bool = False  # may answer with server-sent events
    open: bool = False  # needs no key


def thing(required: str = "", /, **fields: Schema) -> Schema:
    """An object with these fields; `required` names some of them."""
    return {"type": "object", "properties": fields, **({"required": required.split()} if required else {})}


def many(item: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": item, **limits}


def number(low: float, high: float, kind: str = "number") -> Schema:
    return {"type": [kind, "null"], "minimum": low, "maximum": high}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def text(longest: int) -> Schema:
    return {"type": ["string", "null"], "maxLength": longest}


STOPS: Schema = {"anyOf": [TEXT, many(TEXT, maxItems=16), {"type": "null"}]}
COUNT = number(1, 2**31 - 1, "integer")
PARTS: Schema = {"anyOf": [TEXT, many(thing("type text", type=one_of("text"), text=TEXT), minItems=1)]}
FUNCTION = thing("name", name={**TEXT, "maxLength": 128}, description=MAY_BE_TEXT, parameters=OBJECT)
CHAT_MESSAGE = thing(
    "role",
    role=one_of("system", "developer", "user", "assistant", "tool"),
    content={"anyOf": [*PARTS["anyOf"], {"type": "null"}]},
    tool_calls=many(thing("id function", id=TEXT, type=one_of("function"), function=OBJECT)),
    tool_call_id=TEXT,
    reasoning_content=MAY_BE_TEXT,
)
CHAT = thing(
    "model messages",
    model=TEXT,
    messages=many(CHAT_MESSAGE, minItems=1),
    max_tokens=COUNT,
    max_completion_tokens=COUNT,
    temperature=number(0, 2),
    top_p=number(1e-6, 1),
    top_k=number(-1, 2**31 - 1, "integer"),
    min_p=number(0, 1),
    frequency_penalty=number(-2, 2),
    presence_penalty=number(-2, 2),
    seed=number(-(2**63), 2**63 - 16, "integer"),
    n=number(1, 16, "integer"),
    stop=STOPS,
    stream=FLAG,
    stream_options=thing(include_usage=FLAG),
    logprobs=FLAG,
    response_format=thing("type", type=one_of("text", "json_object", "json_schema"), json_schema=OBJECT),
    tools=many(thing("type function", type=one_of("function"), function=FUNCTION)),
    tool_choice={"anyOf": [one_of("auto", "none", "required"), OBJECT]},
    parallel_tool_calls=FLAG,
    metadata=OBJECT,
    user=text(256),
    safety_identifier=text(256),
    prompt_cache_key=text(256),
    store=FLAG,
)
COMPLETION = thing(
    "id object model choices usage", id=TEXT, object=TEXT, model=TEXT, choices=many(OBJECT), usage=OBJECT
)
MESSAGE = thing("role content", role=one_of("user", "assistant", "system"), content={"anyOf": [TEXT, many(OBJECT)]})
MESSAGES = thing(
    "model messages",
    model=TEXT,
    messages=many(MESSAGE, minItems=1),
    system={"anyOf": [TEXT, many(thing("type text", type=one_of("text"), text=TEXT)), {"type": "null"}]},
    max_tokens=COUNT,
    temperature=number(0, 2),
    top_p=number(1e-6, 1),
    top_k=number(0, 2**31 - 1, "integer"),
    stop_sequences={"anyOf": [many(TEXT, maxItems=16), {"type": "null"}]},
    stream=FLAG,
    tools=many(thing("name input_schema", name={**TEXT, "maxLength": 128}, description=TEXT, input_schema=OBJECT)),
    tool_choice=thing("type", type=one_of("auto", "any", "none", "tool"), name=TEXT),
    metadata=thing(user_id=MAY_BE_TEXT),
    thinking=OBJECT,
)
RESPONSES = thing(
    "model input",
    model=TEXT,
    input={"anyOf": [TEXT, many(OBJECT, minItems=1)]},
    instructions=MAY_BE_TEXT,
    previous_response_id=MAY_BE_TEXT,
    max_output_tokens=COUNT,
    temperature=number(0, 2),
    top_p=number(1e-6, 1),
    stream=FLAG,
    store=FLAG,
    tools=many(thing("type", type=TEXT, name={**TEXT, "maxLength": 128}, parameters=OBJECT)),
    tool_choice={"anyOf": [one_of("auto", "none", "required"), OBJECT]},
    parallel_tool_calls=FLAG,
    text=thing(format=thing("type", type=one_of("text", "json_object", "json_schema"), schema=OBJECT)),
    metadata=OBJECT,
    user=text(256),
    safety_identifier=text(256),
    prompt_cache_key=text(256),
)
RESPONSE = thing("id object model output", id=TEXT, object=TEXT, model=TEXT, output=many(OBJECT))
FEEDBACK = thing(
    id=text(128),
    turn_id=text(64),
    response_id=text(256),
    session_id=text(256),
    user=text(256),
    name=text(200),
    value=number(-1, 1),
    label=text(200),
    comment=text(65_536),
    correction=text(65_536),
    source=text(64),
    retracted=FLAG,
)
MODEL = thing("id object owned_by release", id=TEXT, object=TEXT, created={"type": "integer"}, owned_by=TEXT)

NEW_KEY = thing(
    tenant_id=text(64),
    scopes={"anyOf": [many(one_of("agent", "feedback", "admin")), {"type": "null"}]},
    label=text(200),
    requests_per_minute=number(1, 10**6, "integer"),
    max_concurrency=number(1, 10**6, "integer"),
)
KEY = thing("id scopes", id=TEXT, scopes=many(TEXT), tenant_id=TEXT)
KEY_ONCE = thing("id scopes key", id=TEXT, scopes=many(TEXT), key=TEXT)
TENANT = thing(
    name=text(200),
    learn=FLAG,
    unstored={"enum": ["learn", "keep", "discard", None]},
    policies={"enum": ["shared", "own", "subject", None]},
    retention_s=number(1, 10**10),
)
FORGOTTEN: Schema = {**OBJECT, "description": "What was deleted, and which releases had learned from it"}

OPERATIONS: dict[str, Operation] = {
    "GET /": Operation("Whether anybody is there", {200: None}, (400, 403, 414, 431), open=True),
    "POST /v1/chat/completions": Operation(
        "OpenAI's chat completions", {200: COMPLETION}, OF_AN_ANSWER, CHAT, stream=True
    ),
    "POST /v1/messages": Operation(
        "Anthropic's messages; errors in Anthropic's shape",
        {200: thing("id type role content model usage", id=TEXT, type=TEXT, role=TEXT, content=many(OBJECT))},
        OF_AN_ANSWER,
        MESSAGES,
        stream=True,
    ),
    "POST /v1/messages/count_tokens": Operation(
        "Length of the prompt that the messages make",
        {200: thing("input_tokens", input_tokens={"type": "integer"})},
        OF_AN_ANSWER,
        MESSAGES,
        query=("beta",),
    ),
    "POST /v1/responses": Operation(
        "OpenAI's responses; upgraded, a WebSocket", {200: RESPONSE}, OF_AN_ANSWER, RESPONSES, stream=True
    ),
    "GET /v1/responses/{response_id}": Operation("A stored response", {200: RESPONSE}, (*EVERYWHERE, 404)),
    "GET /v1/responses/{response_id}/input_items": Operation(
        "What it answered", {200: thing("data", data=many(OBJECT))}, (*EVERYWHERE, 404)
    ),
    "POST /v1/feedback": Operation(
        "What somebody says of an answer: of one turn or one session; an upsert by `id`",
        {202: thing("id", id=TEXT, turn_id=MAY_BE_TEXT, session_id=MAY_BE_TEXT)},
        WITH_BODY,
        FEEDBACK,
    ),
    "GET /v1/models": Operation("The policies of the caller's tenant", {200: thing("data", data=many(MODEL))}),
    "GET /v1/models/{name}": Operation("One policy", {200: MODEL}, (*EVERYWHERE, 404)),
    "GET /v1/turns/{turn_id}": Operation(
        "All that is known of one turn: what followed it, its verdict, whether it trained, or why not",
        {200: thing("turn", turn=OBJECT)},
        (*EVERYWHERE, 404),
    ),
    "POST /v1/admin/keys": Operation("A new key, shown this once", {201: KEY_ONCE}, OF_AN_ADMIN, NEW_KEY),
    "GET /v1/admin/keys": Operation("The keys that the caller administers", {200: thing("data", data=many(KEY))}),
    "POST /v1/admin/keys/{key_id}/rotate": Operation(
        "A new key for the same; the old one ends `overlap_s` later",
        {201: KEY_ONCE},
        OF_AN_ADMIN,
        thing(overlap_s=number(0, 30 * 24 * 3600)),
    ),
    "DELETE /v1/admin/keys/{key_id}": Operation(
        "The key ends; caches may know it for twice gateway.cache_s", {200: thing("id revoked", id=TEXT)}, OF_AN_ADMIN
    ),
    "GET /v1/admin/tenants": Operation(
        "The tenants that the caller administers", {200: thing("data", data=many(TENANT))}
    ),
    "PUT /v1/admin/tenants/{tenant_id}": Operation(
        "What a tenant decides: only what is named is changed", {200: TENANT}, OF_AN_ADMIN, TENANT
    ),
    "DELETE /v1/admin/tenants/{tenant_id}": Operation("Forget the tenant", {200: FORGOTTEN}, OF_AN_ADMIN),
    "DELETE /v1/sessions/{target}": Operation("Forget the session", {200: FORGOTTEN}, OF_AN_ADMIN),
    "DELETE /v1/subjects/{target}": Operation("Forget the user", {200: FORGOTTEN}, OF_AN_ADMIN),
    "GET /healthz": Operation(
        "The process answers", {200: thing("alive", alive=FLAG)}, (400, 403, 414, 431), open=True
    ),
    "GET /readyz": Operation(
        "It can answer and record, or what is missing",
        {200: thing("ready missing", ready=FLAG, missing=many(TEXT)), 503: thing("ready missing", ready=FLAG)},
        (400, 403, 414, 431),
        open=True,
    ),
    "GET /metrics": Operation("Prometheus' text", {200: None}, (400, 403, 414, 431), open=True),
    "GET /openapi.json": Operation("This page", {200: OBJECT}, (400, 403, 414, 431), open=True),
}
UNDECLARED = Operation("Not described yet", {200: None})


def routes(others: Sequence[BaseRoute]) -> list[BaseRoute]:
    """The page of these routes and of its own."""

    async def answer(request: Request) -> Response:
        return Response(page, media_type="application/json")

    own = [Route("/openapi.json", answer)]
    page = orjson.dumps(document([*others, *own]))
    return [*own]


def document(routes: Sequence[BaseRoute]) -> Schema:
    """OpenAPI 3.1 of these routes."""
    paths: dict[str, Schema] = {}
    for route in routes:
        if isinstance(route, Route):
            path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
            for method in sorted((route.methods or set()) - {"HEAD"}):
                declared = OPERATIONS.get(f"{method} {path}", UNDECLARED)
                paths.setdefault(path, {})[method.lower()] = _operation(path, declared)
    sockets = {route.path: _about(route) for route in routes if isinstance(route, WebSocketRoute)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "agent-rl", "version": "1", "description": __doc__.split("\n\n")[1]},
        "servers": [
            {"url": "/"},
            {"url": "/s/{session}", "variables": {"session": {"default": "main"}}, "description": "/v1 in a session"},
        ],
        "security": [{"bearer": []}, {"x-api-key": []}],
        "paths": paths,
        "x-websockets": sockets,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
    }


def _operation(path: str, declared: Operation) -> Schema:
    names = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in re.findall(r"\{(\w+)\}", path)]
    names += [{"name": name, "in": "query", "schema": TEXT} for name in declared.query]
    answers = {str(status): _answer(schema, declared.stream) for status, schema in declared.answers.items()}
    errors = {
        str(status): {"description": ERRORS[status], "content": {"application/json": {"schema": thing(error=OBJECT)}}}
        for status in sorted(set(declared.errors) - set(declared.answers))
    }
    operation: Schema = {"summary": declared.summary, "parameters": names, "responses": {**answers, **errors}}
    if declared.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": declared.body}}}
    return {**operation, "security": []} if declared.open else operation


def _answer(schema: Schema | None, stream: bool) -> Schema:
    content: Schema = {} if schema is None else {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": TEXT}
    return {"description": "As asked", **({"content": content} if content else {})}


def _about(route: WebSocketRoute) -> str:
    """What the route's module says of it."""
    return sys.modules[route.endpoint.__module__].__doc__ or ""
