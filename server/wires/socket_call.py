"""A request that came in a socket's frame, answered by the gateway's own app in process; its answer as frames."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import orjson
from starlette.types import ASGIApp, Message, Scope

from server.identity import HEADERS
from server.refusal import Refusal, bad_field
from server.wires.request import Body, string

LONGEST_DATA = 16_384  # characters of one data frame
PASSED_ON = frozenset(HEADERS) | {
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "content-type",
    "idempotency-key",
    "openai-beta",
    "thread-id",
    "traceparent",
    "user-agent",
    "x-claude-code-agent-id",
    "x-client-request-id",
    "x-codex-turn-metadata",
    "x-stainless-retry-count",
    "x-train",
}
HOP_BY_HOP = frozenset({"connection", "content-length", "date", "server", "transfer-encoding"})
VERBS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD")
Put = Callable[[bytes, bool], Awaitable[None]]  # a frame, and whether it is the request's last


@dataclass(frozen=True, slots=True)
class Call:
    request_id: str
    method: str
    path: str  # as in a URL, query included
    headers: dict[str, str]  # those that may pass
    body: bytes


def parse_call(frame: Body) -> Call:
    """`{"type": "request", id, method?, path, headers?, body?}`; `body` is text, or JSON. Raises Refusal (400)."""
    request_id, path = string(frame, "id", 128), string(frame, "path", 4096)
    method, headers, body = string(frame, "method") or "POST", frame.get("headers") or {}, frame.get("body")
    if not request_id:
        raise bad_field("id", "a request needs an id, a string that no other request of this connection has")
    if not path or not path.startswith(("/v1/", "/s/")) or not path.isascii():
        raise bad_field("path", "must be a path of this server, like /v1/chat/completions")
    if method not in VERBS:
        raise bad_field("method", f"must be one of {', '.join(VERBS)}, not {method!r}")
    if not isinstance(headers, dict) or not all(isinstance(v, str) and v.isascii() for v in headers.values()):
        raise bad_field("headers", "must be an object of ASCII strings")
    return Call(
        request_id,
        method,
        path,
        {name.lower(): value for name, value in headers.items() if name.lower() in PASSED_ON},
        b"" if body is None else body.encode() if isinstance(body, str) else orjson.dumps(body),
    )


async def answer(call: Call, outer: Scope, secret: str | None, hung_up: asyncio.Event, put: Put) -> None:
    """The app's answer as frames start, data …, end; `outer` is the socket's scope, `secret` the key it came with.

    Setting `hung_up` is what a client's disconnection is to the app.
    """
    app: ASGIApp = outer["app"]
    inbox, decoder = (
        [{"type": "http.request", "body": call.body, "more_body": False}],
        codecs.getincrementaldecoder("utf-8")("replace"),
    )

    async def receive() -> Message:
        if inbox:
            return inbox.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
            kept = {name: value for name, value in headers.items() if name not in HOP_BY_HOP}
            await put(frame("start", call.request_id, status=message["status"], headers=kept), False)
        elif message["type"] == "http.response.body":
            more = message.get("more_body", False)
            text = decoder.decode(message.get("body", b""), final=not more)
            for at in range(0, len(text), LONGEST_DATA):
                await put(frame("data", call.request_id, data=text[at : at + LONGEST_DATA]), False)
            if not more:
                await put(frame("end", call.request_id), True)

    await app(_scope(call, outer, secret), receive, send)


def frame(kind: str, request_id: str, **fields: Any) -> bytes:
    return orjson.dumps({"type": kind, "id": request_id, **fields})


def failed_end(request_id: str, refusal: Refusal) -> bytes:
    """The end of an answer that never came, or was cut."""
    error = {"status": refusal.status, "code": refusal.code, "message": refusal.message}
    return frame("end", request_id, error=error)


def _scope(call: Call, outer: Scope, secret: str | None) -> Scope:
    path, _, query = call.path.partition("?")
    own = {name: value for name, value in outer["headers"] if name == b"host"}
    headers = [*own.items(), *((name.encode(), value.encode()) for name, value in call.headers.items())]
    headers.append((b"content-length", str(len(call.body)).encode()))
    if secret is not None:
        headers.append((b"authorization", f"Bearer {secret}".encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": quote(path, safe="/%:@!$&'()*+,;=~-._").encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "client": outer.get("client"),
        "server": outer.get("server"),
        "state": outer.get("state", {}),
    }
