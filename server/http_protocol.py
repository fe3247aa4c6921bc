"""HTTP/1.1 as the gateway speaks it: uvicorn's httptools protocol, which lets nobody hold a connection for nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agent_rl.settings import GatewaySettings
from server.wires.socket import frame_limit

HEAD_BYTES = 131_072  # more than the edge takes, so that most are told why
SEND_BUFFER = 262_144  # bytes that the kernel keeps for a slow reader
SOCKET = (
    ("SO_SNDBUF", SEND_BUFFER),
    ("SO_KEEPALIVE", 1),
    ("TCP_KEEPIDLE", 60),
    ("TCP_KEEPINTVL", 15),
    ("TCP_KEEPCNT", 4),
)
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class PatientProtocol(HttpToolsProtocol):
    """Cuts off a client that takes longer than `stall_s` for a request's head, longer than `body_s` for its body, or
    reads nothing of an answer for `stall_s`. Peers that vanished are found by TCP keep-alive within two minutes. At
    most 64 KiB of what an answer sent wait in memory for a slow reader, and SEND_BUFFER in the kernel."""

    stall_s: ClassVar[float] = 60.0
    body_s: ClassVar[float] = 65.0
    _arriving: asyncio.TimerHandle | None = None  # what is being read must be whole by then
    _unread: asyncio.TimerHandle | None = None  # what was written must be read by then
    _head_bytes: int | None = 0  # so far; None while no head is being read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (raw := transport.get_extra_info("socket")) is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            for name, value in SOCKET:
                level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
                raw.setsockopt(level, getattr(socket, name), value)
        self._expect(self.stall_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._expect(self.stall_s)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._expect(self.body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._expect(None)
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._expect(None)
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def _expect(self, seconds: float | None) -> None:
        """The next part of a request within so many seconds; None: nothing is expected."""
        if self._arriving is not None:
            self._arriving.cancel()
        self._arriving = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def uvicorn_options(settings: GatewaySettings) -> dict[str, Any]:
    """How uvicorn listens for a gateway. A body gets a little longer here than at the edge, so that its 408 goes out
    first."""
    patience = {"stall_s": settings.stall_timeout_s, "body_s": settings.body_timeout_s + 5.0}
    return {
        "http": type("PatientProtocol", (PatientProtocol,), patience),
        "limit_concurrency": 16 * settings.max_concurrency,  # connections; one more gets 503
        "timeout_keep_alive": 30,
        "ws_max_size": frame_limit(settings),
        "ws_ping_interval": 20.0,
        "ws_ping_timeout": 20.0,
    }
