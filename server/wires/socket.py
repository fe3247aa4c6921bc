"""`/v1/agent`: one WebSocket that a personal agent opens from behind its NAT, and every wire of ours through it.

In, one JSON object a frame:

    {"type": "auth", "key"}                                 first, unless the handshake had the key; within 10 s
    {"type": "open"}                                        then one of these two, within 10 s
    {"type": "resume", "connection", "after"}               `after`: the last seq that arrived
    {"type": "request", "id", "path", "method"?, "headers"?, "body"?}
    {"type": "cancel", "id"}                                the request's client has hung up
    {"type": "ack", "seq"}                                  everything up to here arrived
    {"type": "ping", "nonce"?}

Out: `opened` and `resumed` (with `connection` and the limits), `pong`, `error` (with status, code and message; the
socket closes after one), and for each request, numbered through the connection:

    {"seq", "type": "start", "id", "status", "headers"}
    {"seq", "type": "data", "id", "data"}                   text, as it comes
    {"seq", "type": "end", "id", "error"?}                  `error`: the answer never came, or was cut

A request whose id is known is not run again until its end is acknowledged. Answers go on without a socket for
`outbox_grace_s`, and what was said is kept for `outbox_ttl_s`, for any gateway with the same Redis to send on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

import orjson
from starlette.requests import Request
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from agent_rl.experience.outbox import MOST_FRAMES, MOST_REQUESTS, Outbox, OutboxGone, Put
from agent_rl.experience.stream import StreamUnavailable
from agent_rl.settings import GatewaySettings
from server.auth import Caller, Door, secret_of
from server.refusal import Refusal, openai_error
from server.wires.request import Body, integer, json_object, string
from server.wires.socket_call import failed_end, parse_call
from server.wires.socket_calls import Calls

FIRST_FRAME_S = 10.0
READ_S = 1.0  # how long the outbox is listened to before the connection is touched
CHECK_S = 5.0  # how often its key is checked
IDLE_S = 900.0  # without any frame from the client
POLICY_VIOLATION, TOO_BIG, TRY_AGAIN = 1008, 1009, 1013
log = logging.getLogger("agent_rl.gateway")


def routes(door: Door, calls: Calls, outbox: Outbox, settings: GatewaySettings) -> list[BaseRoute]:
    async def agent(websocket: WebSocket) -> None:
        code = POLICY_VIOLATION
        try:
            secret, caller = await _enter(websocket, door)
            await Session(websocket, door, calls, outbox, settings, secret, caller).run()
            return
        except WebSocketDisconnect:
            return
        except Refusal as refusal:
            if websocket.client_state.name == "CONNECTING":
                await websocket.send_denial_response(openai_error(refusal))
                return
            code = TOO_BIG if refusal.status == 413 else POLICY_VIOLATION
            last = _error(refusal)
        except OutboxGone as error:
            last = _error(Refusal(404, str(error), code="connection_not_found"))
        except StreamUnavailable:
            code, last = TRY_AGAIN, _error(Refusal(503, "Redis does not answer; resume later", code="unavailable"))
        with suppress(WebSocketDisconnect, RuntimeError):  # it may be closed already
            await websocket.send_text(last)
            await websocket.close(code)

    return [WebSocketRoute("/v1/agent", agent)]


class Session:
    """One socket from its first frame to its close; the connection in the outbox outlives it."""

    def __init__(
        self,
        websocket: WebSocket,
        door: Door,
        calls: Calls,
        outbox: Outbox,
        settings: GatewaySettings,
        secret: str | None,
        caller: Caller,
    ) -> None:
        self._websocket, self._door, self._calls, self._outbox = websocket, door, calls, outbox
        self._settings, self._secret, self._caller = settings, secret, caller
        self._reader, self._connection, self._over = uuid4().hex, "", False

    async def run(self) -> None:
        """Until it closes. Raises what closes it."""
        async with asyncio.timeout(FIRST_FRAME_S):
            after = await self._join(await self._frame())
        tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._deliver(after))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._over = True  # redis-py may swallow a cancellation that comes with its answer
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _join(self, frame: Body) -> int:
        """The connection that the first frame opens or resumes; returns the number after which frames are sent."""
        tenant = self._caller.tenant.tenant_id
        owner = f"{tenant}/{self._caller.api_key_id}"
        if frame.get("type") == "open":
            self._connection, after, answer = await self._outbox.open(tenant, owner, self._reader), 0, "opened"
        elif frame.get("type") == "resume":
            self._connection, after = string(frame, "connection", 64) or "", integer(frame, "after", 0, 2**53) or 0
            last = await self._outbox.resume(self._connection, owner, self._reader)
            answer = "resumed"
            if after > last:
                raise Refusal(400, f"'after': {after} was never sent, the last is {last}", param="after")
        else:
            raise Refusal(400, f"the first frame is 'open' or 'resume', not {frame.get('type')!r}")
        limits = {
            "frame_bytes": frame_limit(self._settings),
            "requests": MOST_REQUESTS,
            "unacknowledged_frames": MOST_FRAMES,
            "idle_s": IDLE_S,
            "resumable_s": self._settings.outbox_ttl_s,
            "answering_s": self._settings.outbox_grace_s,
        }
        await self._send({"type": answer, "connection": self._connection, "limits": limits})
        return after

    async def _listen(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    frame = await self._frame()
            except TimeoutError:
                raise Refusal(408, f"nothing came for {IDLE_S:.0f} s; send pings", code="idle") from None
            kind = frame.get("type")
            if kind == "request":
                await self._request(frame)
            elif kind == "cancel":
                self._calls.hang_up(self._connection, string(frame, "id", 128) or "")
            elif kind == "ack":
                seq = integer(frame, "seq", 0, 2**53) or 0
                if await self._outbox.acknowledge(self._connection, seq) is Put.GONE:
                    raise Refusal(400, f"'seq': {seq} was never sent", param="seq")
            elif kind == "ping":
                await self._send({"type": "pong", "nonce": frame.get("nonce")})
            else:
                raise Refusal(400, f"'type': request, cancel, ack or ping, not {kind!r}", param="type")

    async def _request(self, frame: Body) -> None:
        call = parse_call(frame)
        began = await self._calls.begin(self._connection, call, self._websocket.scope, self._secret)
        if began is Put.FULL:
            message = f"{MOST_REQUESTS} requests have no acknowledged end, the limit here: acknowledge"
            refusal = Refusal(429, message, code="too_many_requests")
            await self._websocket.send_text(failed_end(call.request_id, refusal).decode())  # without a number
        elif began is Put.GONE:
            raise OutboxGone("this connection has expired")

    async def _deliver(self, after: int) -> None:
        """Send on what the outbox gets, whichever gateway writes it."""
        checked = 0.0
        while not self._over:
            if time.monotonic() - checked > CHECK_S:
                await self._outbox.touch(self._connection)
                await self._outbox.bury(self._connection, _lost)
                await self._door.caller(_with_key(self._websocket, self._secret), "agent")
                checked = time.monotonic()
            for seq, frame in await self._outbox.read(self._connection, self._reader, after, READ_S):
                await self._websocket.send_text(f'{{"seq":{seq},{frame[1:].decode()}')
                after = seq

    async def _frame(self) -> dict[str, Any]:
        return await _receive(self._websocket, frame_limit(self._settings))

    async def _send(self, frame: dict[str, Any]) -> None:
        await self._websocket.send_text(orjson.dumps(frame).decode())


def frame_limit(settings: GatewaySettings) -> int:
    """Bytes of the largest frame: a body as a JSON string, where some characters take two, and what is around it."""
    return 2 * settings.max_body_bytes + 65_536


async def _enter(websocket: WebSocket, door: Door) -> tuple[str | None, Caller]:
    """The key of the handshake or of the first frame, and whose it is; the socket is accepted. Raises Refusal."""
    secret = secret_of(websocket)
    try:
        caller = await door.caller(_with_key(websocket, secret), "agent")
        await websocket.accept()
        return secret, caller
    except Refusal as refusal:
        if refusal.code != "no_api_key":
            raise
    await websocket.accept()
    try:
        async with asyncio.timeout(FIRST_FRAME_S):
            frame = await _receive(websocket, 4096)
    except TimeoutError:
        raise Refusal(401, f"no 'auth' frame came within {FIRST_FRAME_S:.0f} s", code="no_api_key") from None
    secret = string(frame, "key", 256) if frame.get("type") == "auth" else None
    return secret, await door.caller(_with_key(websocket, secret), "agent")


async def _receive(websocket: WebSocket, limit: int) -> dict[str, Any]:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    raw = (message.get("text") or "").encode() or message.get("bytes") or b""
    if len(raw) > limit:
        raise Refusal(413, f"a frame may have {limit} bytes, not {len(raw)}", code="frame_too_large")
    return json_object(raw)


def _with_key(websocket: WebSocket, secret: str | None) -> Request:
    """The handshake as the door sees requests."""
    headers = [] if secret is None else [(b"authorization", f"Bearer {secret}".encode("latin-1", "replace"))]
    return Request({**websocket.scope, "type": "http", "method": "GET", "headers": headers})


def _lost(request_id: str) -> bytes:
    return failed_end(request_id, Refusal(503, "the gateway that answered has gone; ask again", code="gateway_lost"))


def _error(refusal: Refusal) -> str:
    error = {"type": "error", "status": refusal.status, "code": refusal.code, "message": refusal.message}
    return orjson.dumps(error).decode()
