"""What stands before every route: limits of headers and time, the session in the URL, pages that may not call.

Pure ASGI, for requests and WebSocket handshakes alike. What it refuses never reaches a route.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote_to_bytes, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import LOOPBACK
from server.identity import URL_SESSION
from server.refusal import Refusal, error_response

MOST_HEADERS = 100
HEADER_BYTES = 65_536  # names and values together
URL_BYTES = 8192
SESSION_PATH = re.compile(r"/s/([^/]+)(/v1/.*)", re.DOTALL)
BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Edge:
    """Refuses with 400, 408 (a body that takes longer than `body_timeout_s`), 414 or 431."""

    def __init__(self, app: ASGIApp, body_timeout_s: float) -> None:
        self._app, self._body_timeout_s = app, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            check_head(scope)
            scope = with_session(scope)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
            return
        if scope["type"] == "http":
            receive = _in_time(receive, self._body_timeout_s)
        await self._app(scope, receive, send)


class LoopbackOnly:
    """Refuses what a web page elsewhere could send to a server on loopback (DNS rebinding), `origins` excepted."""

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
            foreign = origin and origin not in self._origins and _hostname(origin) not in LOOPBACK
            if _hostname(f"//{host}") not in LOOPBACK or foreign:
                message = "this server answers on loopback only: Host and Origin must be localhost"
                await refuse(Refusal(403, message, code="not_loopback"), scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_head(scope: Scope) -> None:
    """Raises Refusal (400, 414, 431) for a head that nothing behind should have to read."""
    headers, url = scope["headers"], scope.get("raw_path") or b""
    if len(headers) > MOST_HEADERS:
        raise Refusal(431, f"{len(headers)} headers, the limit here is {MOST_HEADERS}", code="headers_too_large")
    size = sum(len(name) + len(value) for name, value in headers)
    if size > HEADER_BYTES:
        raise Refusal(431, f"{size} bytes of headers, the limit here is {HEADER_BYTES}", code="headers_too_large")
    if len(url) + len(scope["query_string"]) > URL_BYTES:
        raise Refusal(414, f"the URL is longer than {URL_BYTES} bytes, the limit here", code="url_too_long")
    if BAD_ESCAPE.search(url) or not _is_text(unquote_to_bytes(url)):
        raise Refusal(400, "the URL's path is not percent-encoded UTF-8", code="bad_url")


def with_session(scope: Scope) -> Scope:
    """`/s/{session}/v1/…` as `/v1/…` with the session in a header that clients cannot send. Raises Refusal (400)."""
    headers = [(name, value) for name, value in scope["headers"] if name != URL_SESSION.encode()]
    if match := SESSION_PATH.fullmatch(scope["path"]):
        session, path = match[1], match[2]
        if not session.isascii() or not session.isprintable():
            raise Refusal(400, "/s/SESSION/v1/…: a session is printable ASCII", code="bad_url", param="session")
        headers.append((URL_SESSION.encode(), session.encode()))
        return {**scope, "headers": headers, "path": path, "raw_path": quote(path).encode()}
    return {**scope, "headers": headers}


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """In the shape of its path; a WebSocket's handshake gets it where the server can say so, else is turned down."""
    if scope["type"] == "http":
        await error_response(scope["path"], refusal)(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        await receive()  # websocket.connect
        await error_response(scope["path"], refusal)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _in_time(receive: Receive, seconds: float) -> Receive:
    """`receive` that raises Refusal (408) when the body is not whole after `seconds`; nothing else has a limit."""
    deadline, whole = asyncio.get_running_loop().time() + seconds, False

    async def timely() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            whole = True
            raise Refusal(408, f"the body did not arrive within {seconds:.0f} s", code="body_too_slow") from None
        whole = not message.get("more_body", False)
        return message

    return timely


def _is_text(raw: bytes) -> bool:
    try:
        return "\0" not in raw.decode()
    except UnicodeDecodeError:
        return False


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
