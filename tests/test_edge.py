"""The edge: what is refused before any route, clients that stall or vanish, and what logs do not show."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from gateway import OWNER, Gateway, running_gateway

from server.redaction import Redacting, redact
from server.wires.request import depth

SCRIPT = {
    "rules": [
        {"user": "slowly", "text": "one two three four five six", "token_s": 0.05},
        {"user": "for ever", "text": "word " * 900, "token_s": 0.0},
    ],
    "default": {"text": "Okay."},
}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(
        tiny_model,
        redis_url,
        tmp_path,
        script=SCRIPT,
        stall_timeout_s=0.5,
        body_timeout_s=0.5,
        cache_s=0.0,
        cors_origins=["https://app.example"],
    ) as running:
        yield running


def body(text: str = "Hi", **more: Any) -> bytes:
    return orjson.dumps({"model": "default", "messages": [{"role": "user", "content": text}], **more})


def head(path: str, *lines: str, method: str = "POST", size: int | None = None) -> bytes:
    length = [] if size is None else [f"content-length: {size}"]
    host = [] if any(line.startswith("host:") for line in lines) else ["host: localhost"]
    all_lines = [f"{method} {path} HTTP/1.1", *host, f"authorization: Bearer {OWNER}", *length, *lines]
    return "\r\n".join(all_lines).encode("latin-1") + b"\r\n\r\n"


async def raw(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def status(gateway: Gateway, request: bytes) -> int:
    """Of the answer to these bytes."""
    reader, writer = await raw(gateway)
    writer.write(request)
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return int(line.split()[1])


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""


# ------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (head("/v1/models", method="GET"), 200),
        (head("/v1/models", *[f"x-{n}: 1" for n in range(101)], method="GET"), 431),
        (head("/v1/models", f"x-long: {'a' * 70_000}", method="GET"), 431),
        (head(f"/v1/models?{'a' * 9000}", method="GET"), 414),
        (head("/v1/models/%zz", method="GET"), 400),
        (head("/v1/models/%ff", method="GET"), 400),
        (head("/v1/models/a%00b", method="GET"), 400),
        (head("/v1/models/caf%C3%A9", method="GET"), 404),
        (head("/v1/models", "x-session-id: caf\xe9", method="GET"), 200),
        (head("/v1/models", method="BREW"), 400),
        (head("/v1/models", method="DELETE"), 405),
        (head("/v1/nothing", method="GET"), 404),
        (head("/v1/models", "host: evil.example", method="GET"), 403),
        (head("/v1/models", "origin: https://evil.example", method="GET"), 403),
        (head("/v1/models", "origin: null", method="GET"), 403),
        (b"GET / HTTP/1.1\r\nhost localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
async def test_heads(gateway: Gateway, request_bytes: bytes, expected: int) -> None:
    assert await status(gateway, request_bytes) == expected


async def test_what_is_not_allowed_says_what_is(gateway: Gateway) -> None:
    async with gateway.http() as web:
        answer = await web.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_an_id_that_is_not_ascii_is_refused_by_name(gateway: Gateway) -> None:
    async with gateway.http() as web:
        answer = await web.post(CHAT, content=body(), headers={"x-session-id": "caf\xe9".encode("latin-1")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-session-id")


async def test_a_page_that_may_call_is_told_so(gateway: Gateway) -> None:
    async with gateway.http() as web:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        allowed = await web.options(CHAT, headers=asked)
        other = await web.options(CHAT, headers={**asked, "origin": "https://evil.example"})
        answer = await web.post(CHAT, content=body(), headers={"origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert (other.status_code, "access-control-allow-origin" in other.headers) == (403, False)


# -------------------------------------------------------------------------------------------- sessions in the URL


async def test_the_session_in_the_url_wins(gateway: Gateway) -> None:
    async with gateway.http() as web:
        named = await web.post(f"/s/from-url{CHAT}", content=body(), headers={"x-session-id": "from-header"})
        spoofed = await web.post(CHAT, content=body(), headers={"x-agent-rl-session": "spoofed"})
    assert (named.headers["x-session-id"], named.headers["x-session-rule"]) == ("from-url", "url")
    assert spoofed.headers["x-session-rule"] != "url"


@pytest.mark.parametrize("path", [f"/s/caf%C3%A9{CHAT}", f"/s/a%0Ab{CHAT}"])
async def test_a_session_in_the_url_that_cannot_be_one(gateway: Gateway, path: str) -> None:
    assert await status(gateway, head(path, size=0)) == 400


# ------------------------------------------------------------------------------------------------------- bodies


async def test_nesting_has_a_limit(gateway: Gateway) -> None:
    async with gateway.http() as web:
        deep = b"[" * 65 + b"]" * 65
        answers = [await web.post(CHAT, content=b'{"a":' + inner + b"}") for inner in (deep, b"[" * 100_000)]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json()["error"]["code"] == "too_deep"


def test_depth() -> None:
    assert [depth(value) for value in (1, {}, {"a": [1, {"b": 2}], "c": 3}, [[[[]]], []])] == [0, 1, 3, 4]


async def test_a_body_that_does_not_come_is_a_408(gateway: Gateway) -> None:
    assert await status(gateway, head(CHAT, size=100) + b'{"model":') == 408


# ------------------------------------------------------------------------------------- clients that stall or vanish


@pytest.mark.parametrize("sent", [b"", b"GET /v1/mod", b"GET /healthz HTTP/1.1\r\nhost: loc"])
async def test_half_a_head_is_not_waited_for(gateway: Gateway, sent: bytes) -> None:
    reader, writer = await raw(gateway)
    writer.write(sent)
    assert await closed(reader) == b""
    writer.close()


async def test_a_head_without_end_is_cut_off(gateway: Gateway) -> None:
    reader, writer = await raw(gateway)
    writer.write(b"GET /healthz HTTP/1.1\r\nx-long: " + b"a" * 200_000)
    assert (await closed(reader)).startswith(b"HTTP/1.1 431")
    writer.close()


async def test_a_client_that_vanishes_in_mid_stream(gateway: Gateway) -> None:
    reader, writer = await raw(gateway)
    asked = body("slowly", stream=True)
    writer.write(head(CHAT, size=len(asked)) + asked)
    answer = await reader.readuntil(b"\r\n\r\n")
    turn_id = next(line for line in answer.decode().splitlines() if line.startswith("x-turn-id"))[11:]
    for _ in range(3):
        await reader.readuntil(b"data: ")
    writer.transport.abort()
    await gateway.idle()
    assert (await gateway.transcript(turn_id)).turn.finish == "aborted"


async def test_a_client_that_vanishes_before_its_answer(gateway: Gateway) -> None:
    _, writer = await raw(gateway)
    asked = body("slowly")
    writer.write(head(CHAT, size=len(asked)) + asked)
    await asyncio.sleep(0.1)
    writer.transport.abort()
    await gateway.idle()
    async with gateway.http() as web:
        assert "agent_rl_answers_running 0.0" in (await web.get("/metrics")).text


async def test_a_client_that_reads_nothing_is_cut_off(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    loop, asked = asyncio.get_running_loop(), body("for ever", stream=True, logprobs=True, max_tokens=900)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, 12 * (head(CHAT, size=len(asked)) + asked))  # more than the buffers hold
        await asyncio.sleep(2.0)
        got = b""
        try:
            while part := await asyncio.wait_for(loop.sock_recv(client, 65_536), 5):
                got += part
        except ConnectionResetError:
            pass
    assert got.count(b"data: [DONE]") < 12
    await gateway.idle()
    async with gateway.http() as web:
        assert "agent_rl_answers_running 0.0" in (await web.get("/metrics")).text


# ------------------------------------------------------------------------------------------------------------ logs


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Authorization: Bearer arl-abcdef123", "Authorization: Bearer ***"),
        ("{'authorization': 'Bearer abc.def'}", "{'authorization': 'Bearer ***'}"),
        ("(b'x-api-key', b'secret')", "(b'x-api-key', b'***')"),
        ("GET /v1/models?api_key=secret&limit=2", "GET /v1/models?api_key=***&limit=2"),
        ("redis://user:pass@host/0", "redis://user:***@host/0"),
        ("key arl-owner_1 was used", "key arl-*** was used"),
        ("3 tokens of turn 01a2", "3 tokens of turn 01a2"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    ],
)
def test_secrets_are_redacted(line: str, expected: str) -> None:
    assert redact(line) == expected


def test_stack_traces_are_redacted_too() -> None:
    try:
        raise ValueError("bad key arl-abcdef123")
    except ValueError as error:
        record = logging.LogRecord("x", 40, "f", 1, "failed", None, (type(error), error, error.__traceback__))
    assert "arl-***" in Redacting("%(message)s").format(record)
    assert "abcdef" not in Redacting("%(message)s").format(record)
