"""`agent-rl connect`: a server far away, or one that cannot reach back, as an endpoint on this machine's loopback.

Every request to the local endpoint goes through one WebSocket (`/v1/agent`) that this side opens, keeps and resumes;
answers stream piece by piece. Whoever is on this machine's loopback speaks with the key that connect was given.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from server.refusal import Refusal, error_response

LONGEST_BODY = 16 * 2**20
PATIENCE_S = 60.0  # how long a request waits for the server before it is answered 503
LONGEST_PAUSE_S = 10.0  # between two tries to connect
ACK_EVERY = 64  # frames
ACK_AFTER_S = 5.0
FATAL = (400, 401, 403, 404)  # answers to the handshake that trying again does not mend
log = logging.getLogger("agent_rl.connect")
Frame = dict[str, Any]


class ConnectError(RuntimeError):
    """The server does not let this client in; the message says why."""


@dataclass(slots=True)
class _Call:
    """One local request: what was sent, and the frames of its answer as they come."""

    request: str
    frames: asyncio.Queue[Frame] = field(default_factory=asyncio.Queue)


class Bridge:
    """One connection of the server's outbox, over as many sockets as it takes."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url, self._key = agent_url(url), key
        self._socket: ClientConnection | None = None
        self._connection: str | None = None
        self._seen = self._acknowledged = 0
        self._calls: dict[str, _Call] = {}
        self.up = asyncio.Event()

    async def run(self) -> None:
        """Connect, and connect again, until cancelled. Raises ConnectError where that is of no use."""
        pause = 0.0
        while True:
            try:
                async with self._connected() as socket:
                    pause = 0.0
                    await self._receive(socket)
            except InvalidStatus as error:
                if error.response.status_code in FATAL:
                    raise ConnectError(f"{self._url} says {_words(error)}") from error
                log.warning("the server says %s; trying again", _words(error))
            except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
                log.warning("the server cannot be reached (%s); trying again", error or type(error).__name__)
            pause = min(LONGEST_PAUSE_S, max(0.1, 2 * pause))
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    async def answer(self, method: str, path: str, headers: dict[str, str], body: str) -> AsyncGenerator[Frame, None]:
        """Frames start, data …, end of one request. Leaving early tells the server that the client has gone."""
        request_id = uuid4().hex
        request = {
            "type": "request",
            "id": request_id,
            "method": method,
            "path": path,
            "headers": headers,
            "body": body,
        }
        call = self._calls[request_id] = _Call(orjson.dumps(request).decode())
        ended = False
        try:
            await self._say(call.request)
            while not ended:
                frame = await call.frames.get()
                ended = frame["type"] == "end"
                yield frame
        finally:
            self._calls.pop(request_id, None)
            if not ended:
                await self._say(orjson.dumps({"type": "cancel", "id": request_id}).decode())

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[ClientConnection]:
        """A socket with its connection opened or resumed, and whatever has no end yet asked (again)."""
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        async with connect(self._url, additional_headers=headers, max_size=2**22, open_timeout=10) as socket:
            await self._join(socket)
            for call in list(self._calls.values()):
                await socket.send(call.request)
            self._socket = socket
            self.up.set()
            acknowledging = asyncio.create_task(self._acknowledge_late(socket))
            try:
                yield socket
            finally:
                acknowledging.cancel()
                self.up.clear()
                self._socket = None

    async def _join(self, socket: ClientConnection) -> None:
        if self._connection:
            self._acknowledged = 0  # the last acknowledgement may not have arrived
            resume = {"type": "resume", "connection": self._connection, "after": self._seen}
            await socket.send(orjson.dumps(resume).decode())
        else:
            await socket.send('{"type":"open"}')
        frame = orjson.loads(await asyncio.wait_for(socket.recv(), 10))
        if frame["type"] == "error":
            if frame["code"] == "connection_not_found":
                self._forget()
            elif frame["status"] in FATAL:
                raise ConnectError(f"{self._url} says: {frame['message']}")
            raise OSError(frame["message"])
        self._connection = frame["connection"]

    def _forget(self) -> None:
        """The server has nothing of the connection any more: what was begun cannot go on."""
        lost = {"type": "end", "error": {"status": 503, "code": "connection_lost", "message": "the answer was lost"}}
        for call in self._calls.values():
            call.frames.put_nowait(lost)
        self._calls.clear()
        self._connection, self._seen, self._acknowledged = None, 0, 0

    async def _receive(self, socket: ClientConnection) -> None:
        async for text in socket:
            frame = orjson.loads(text)
            if frame["type"] == "error":
                log.warning("the server says: %s", frame["message"])
                if frame["code"] == "connection_not_found":
                    self._forget()
                continue
            seq = frame.get("seq")
            if seq is not None:
                if seq <= self._seen:
                    continue
                self._seen = seq
            ended = frame["type"] == "end"
            call = (self._calls.pop if ended else self._calls.get)(frame.get("id", ""), None)
            if call is not None:
                call.frames.put_nowait(frame)
            if ended or self._seen - self._acknowledged >= ACK_EVERY:
                await self._acknowledge(socket)

    async def _acknowledge(self, socket: ClientConnection) -> None:
        self._acknowledged = self._seen
        await socket.send(orjson.dumps({"type": "ack", "seq": self._seen}).decode())

    async def _acknowledge_late(self, socket: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            while True:
                await asyncio.sleep(ACK_AFTER_S)
                if self._seen > self._acknowledged:
                    await self._acknowledge(socket)

    async def _say(self, text: str) -> None:
        """Now, if there is a socket; what has no end is asked again at the next one."""
        if self._socket is not None:
            with suppress(ConnectionClosed):
                await self._socket.send(text)


def agent_url(url: str) -> str:
    """`https://host/v1`, `wss://host` and the like as the address of the socket. Raises ConnectError."""
    scheme, sign, rest = url.partition("://")
    scheme = {"http": "ws", "https": "wss"}.get(scheme, scheme)
    if not sign or scheme not in ("ws", "wss") or not rest:
        raise ConnectError(f"--url takes wss://HOST or https://HOST, got {url!r}")
    return f"{scheme}://{rest.rstrip('/').removesuffix('/agent').removesuffix('/v1')}/v1/agent"


def create_app(bridge: Bridge, patience_s: float = PATIENCE_S) -> ASGIApp:
    """The local endpoint: HTTP in, frames through the bridge, HTTP out."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        try:
            body = await _body(receive)
            await _wait(bridge, patience_s)
            await _relay(bridge, scope, body, receive, send)
        except Refusal as refusal:
            await error_response(scope["path"], refusal)(scope, receive, send)

    return app


async def _wait(bridge: Bridge, patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            await bridge.up.wait()
    except TimeoutError:
        message = f"there is no connection to the server since {patience_s:.0f} s"
        raise Refusal(503, message, code="not_connected", retry_after_s=5) from None


async def _body(receive: Receive) -> str:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(499, "the client has gone", code="client_gone")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > LONGEST_BODY:
            raise Refusal(413, f"the body is larger than {LONGEST_BODY} bytes, the limit here", code="body_too_large")
    try:
        return b"".join(parts).decode()
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: {error}", code="invalid_json") from error


async def _relay(bridge: Bridge, scope: Scope, body: str, receive: Receive, send: Send) -> None:
    """The answer, until it ends or the client hangs up. Raises Refusal where it fails before it starts."""
    task, gone = asyncio.create_task(_copy(bridge, scope, body, send)), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _copy(bridge: Bridge, scope: Scope, body: str, send: Send) -> None:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    query = scope.get("query_string", b"").decode("latin-1")
    path = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    ascii_headers = {name: value for name, value in headers.items() if value.isascii()}
    started = False
    async with aclosing(bridge.answer(scope["method"], path, ascii_headers, body)) as frames:
        async for frame in frames:
            if frame["type"] == "start":
                started = True
                pairs = [(name.encode(), value.encode("latin-1")) for name, value in frame["headers"].items()]
                await send({"type": "http.response.start", "status": frame["status"], "headers": pairs})
            elif frame["type"] == "data":
                await send({"type": "http.response.body", "body": frame["data"].encode(), "more_body": True})
            elif error := frame.get("error"):
                if not started:
                    raise Refusal(error["status"], error["message"], code=error["code"], retry_after_s=1)
                raise ConnectionResetError(error["message"])  # the client sees a stream that was cut, which it was
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _words(error: InvalidStatus) -> str:
    """What the server answered instead of a handshake."""
    return f"{error.response.status_code} {error.response.body.decode(errors='replace')[:500]}"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def run(url: str, key: str | None, host: str, port: int) -> None:
    """Serve the local endpoint until SIGINT or SIGTERM. Raises ConnectError."""
    import uvicorn

    from server.edge import LoopbackOnly

    bridge = Bridge(url, key)
    app = LoopbackOnly(create_app(bridge))
    config = uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    serving, bridging = asyncio.create_task(server.serve()), asyncio.create_task(bridge.run())
    done, _ = await asyncio.wait({serving, bridging}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    bridging.cancel()
    await asyncio.gather(serving, bridging, return_exceptions=True)
    for task in done:
        task.result()
