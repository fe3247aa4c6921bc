"""`/v1/agent`: one socket for every wire, and what happens when it drops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from gateway import AGENT, OTHER, OWNER, Gateway, running_gateway, second_gateway
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from agent_rl.experience.outbox import forget_outboxes
from agent_rl.experience.stream import Stream
from agent_rl.experience.tenancy import hash_key
from server.engines.scripted import Rule, Script

SCRIPT = {
    "rules": [{"user": "slowly", "text": "one two three four five six", "token_s": 0.05}],
    "default": {"text": "Okay."},
}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    options = {"max_body_bytes": 4000, "outbox_grace_s": 1.0, "cache_s": 0.0}
    async with running_gateway(tiny_model, redis_url, tmp_path, script=SCRIPT, **options) as running:
        yield running


def at(gateway: Gateway, key: str | None = OWNER, **more: Any) -> connect:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return connect(gateway.url.replace("http", "ws") + "/v1/agent", additional_headers={**headers, **more})


async def say(socket: ClientConnection, **frame: Any) -> None:
    await socket.send(orjson.dumps(frame).decode())


async def hear(socket: ClientConnection) -> dict[str, Any]:
    return dict(orjson.loads(await asyncio.wait_for(socket.recv(), 10)))


async def opened(socket: ClientConnection) -> str:
    await say(socket, type="open")
    frame = await hear(socket)
    assert frame["type"] == "opened"
    return str(frame["connection"])


async def ask(socket: ClientConnection, request_id: str, text: str = "Hi", **body: Any) -> None:
    chat = {"model": "default", "messages": [{"role": "user", "content": text}], **body}
    await say(socket, type="request", id=request_id, path=CHAT, body=chat)


async def until_end(socket: ClientConnection, request_id: str) -> list[dict[str, Any]]:
    """Frames up to the end of this request."""
    frames = []
    while not (frames and frames[-1]["type"] == "end" and frames[-1]["id"] == request_id):
        frames.append(await hear(socket))
    return frames


def said(frames: list[dict[str, Any]]) -> str:
    """The text of a streamed chat answer."""
    lines = "".join(frame.get("data", "") for frame in frames).split("\n\n")
    chunks = [orjson.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def turns(gateway: Gateway) -> int:
    async with gateway.http() as web:
        page = (await web.get("/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith("agent_rl_turns_total{")]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines)


# -------------------------------------------------------------------------------------------------------- coming in


async def test_a_wrong_key_gets_no_socket(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with at(gateway, "arl-wrong"):
            pass
    assert refused.value.response.status_code == 401
    assert orjson.loads(refused.value.response.body)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ({"type": "auth", "key": "arl-wrong"}, "invalid_api_key"),
        ({"type": "auth"}, "no_api_key"),
        ({"type": "open"}, "no_api_key"),
    ],
)
async def test_the_first_frame_has_a_good_key(gateway: Gateway, first: dict[str, str], code: str) -> None:
    async with at(gateway, None) as socket:
        await say(socket, **first)
        assert (await hear(socket))["code"] == code
        with pytest.raises(ConnectionClosed):
            await socket.recv()
    assert socket.close_code == 1008


async def test_the_key_may_come_in_the_first_frame(gateway: Gateway) -> None:
    async with at(gateway, None) as socket:
        await say(socket, type="auth", key=AGENT)
        await opened(socket)
        await ask(socket, "a")
        assert (await hear(socket))["status"] == 200


async def test_a_web_page_elsewhere_gets_no_socket(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with at(gateway, OWNER, origin="https://evil.example"):
            pass
    assert refused.value.response.status_code == 403


# ---------------------------------------------------------------------------------------------------------- answers


async def test_requests_and_feedback_interleave_and_are_numbered(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        await opened(socket)
        await ask(socket, "slow", "slowly", stream=True)
        start = await hear(socket)
        assert (start["seq"], start["type"], start["id"], start["status"]) == (1, "start", "slow", 200)
        turn_id = start["headers"]["x-turn-id"]
        feedback = {"turn_id": turn_id, "value": 1}
        await say(socket, type="request", id="told", path="/v1/feedback", body=feedback)
        await say(socket, type="request", id="models", path="/v1/models", method="GET")
        await say(socket, type="ping", nonce=7)
        frames = await until_end(socket, "slow")
    ends = [frame["id"] for frame in frames if frame["type"] == "end"]
    assert sorted(ends) == ["models", "slow", "told"]
    assert ends[-1] == "slow"
    assert {"type": "pong", "nonce": 7} in frames
    assert [frame["seq"] for frame in frames if "seq" in frame] == list(range(2, 2 + len(frames) - 1))
    assert said([frame for frame in frames if frame.get("id") == "slow"]) == "one two three four five six"
    assert sum(frame.get("id") == "slow" and frame["type"] == "data" for frame in frames) > 4  # token by token
    assert (await gateway.transcript(turn_id)).turn.finish == "stop"


async def test_a_request_that_cannot_be_answered_is_answered_all_the_same(gateway: Gateway) -> None:
    async with at(gateway, AGENT) as socket:
        await opened(socket)
        await say(socket, type="request", id="a", path="/v1/feedback", body={"turn_id": "t", "value": 1})
        assert (await hear(socket))["status"] == 403
        await until_end(socket, "a")
        await say(socket, type="request", id="b", path=CHAT, body="not JSON")
        assert (await hear(socket))["status"] == 400
        await until_end(socket, "b")
        await say(socket, type="request", id="c", path=CHAT, body="x" * 5000)
        assert (await hear(socket))["status"] == 413


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"type": "dance"}, "'type'"),
        ({"type": "request", "path": CHAT}, "'id'"),
        ({"type": "request", "id": "a", "path": "http://elsewhere/"}, "'path'"),
        ({"type": "request", "id": "a", "path": CHAT, "method": "TRACE"}, "'method'"),
        ({"type": "request", "id": "a", "path": CHAT, "headers": {"x-train": 1}}, "'headers'"),
        ({"type": "ack", "seq": 5}, "never sent"),
    ],
)
async def test_frames_that_mean_nothing_close_the_socket(gateway: Gateway, frame: dict[str, Any], words: str) -> None:
    async with at(gateway) as socket:
        await opened(socket)
        await say(socket, **frame)
        error = await hear(socket)
        assert (error["type"], error["status"]) == ("error", 400)
        assert words in error["message"]
        with pytest.raises(ConnectionClosed):
            await socket.recv()


async def test_no_header_speaks_for_another(gateway: Gateway) -> None:
    async with at(gateway, AGENT) as socket:
        await opened(socket)
        headers = {"authorization": f"Bearer {OWNER}", "x-api-key": OWNER, "X-Session-Id": "mine"}
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        await say(socket, type="request", id="a", path=CHAT, headers=headers, body=body)
        start = await hear(socket)
    assert start["headers"]["x-session-id"] == "mine"
    turn = (await gateway.transcript(start["headers"]["x-turn-id"])).turn
    key = await gateway.store.key(hash_key(AGENT))
    assert key is not None
    assert turn.api_key_id == key.api_key_id


async def test_a_cancelled_request_stops_and_what_was_sampled_is_kept(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        await opened(socket)
        await ask(socket, "a", "slowly", stream=True)
        turn_id = (await hear(socket))["headers"]["x-turn-id"]
        await hear(socket)
        await hear(socket)
        await say(socket, type="cancel", id="a")
        assert (await until_end(socket, "a"))[-1]["error"]["code"] == "cut"
    assert (await gateway.transcript(turn_id)).turn.finish == "aborted"


# ---------------------------------------------------------------------------------------------------------- dropping


async def test_a_drop_in_mid_answer_loses_and_repeats_nothing(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        connection = await opened(socket)
        await ask(socket, "a", "slowly", stream=True)
        first = [await hear(socket) for _ in range(3)]
        socket.transport.abort()
    async with at(gateway) as socket:
        await say(socket, type="resume", connection=connection, after=first[-1]["seq"])
        assert (await hear(socket))["type"] == "resumed"
        await ask(socket, "a", "slowly", stream=True)  # a client cannot know that it arrived
        rest = await until_end(socket, "a")
    assert [frame["seq"] for frame in first + rest] == list(range(1, len(first + rest) + 1))
    assert said(first + rest) == "one two three four five six"
    assert await turns(gateway) == 1


async def test_an_acknowledged_frame_is_not_sent_again(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        connection = await opened(socket)
        await ask(socket, "a")
        frames = await until_end(socket, "a")
        await say(socket, type="ack", seq=2)
        await say(socket, type="ping")
        await hear(socket)
    async with at(gateway) as socket:
        await say(socket, type="resume", connection=connection, after=0)
        await hear(socket)
        assert (await hear(socket))["seq"] == 3 == frames[-1]["seq"]


async def test_an_answer_that_nobody_waits_for_is_given_up_after_the_grace(gateway: Gateway) -> None:
    gateway.engine.script = Script(default=Rule(text="one two three four five six", token_s=1.0))
    async with at(gateway) as socket:
        await opened(socket)
        await ask(socket, "a", "slowly", stream=True)
        turn_id = (await hear(socket))["headers"]["x-turn-id"]
    assert (await gateway.transcript(turn_id)).turn.finish == "aborted"


async def test_a_connection_is_its_own_keys(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        connection = await opened(socket)
    async with at(gateway, OTHER) as socket:
        await say(socket, type="resume", connection=connection, after=0)
        assert (await hear(socket))["code"] == "connection_not_found"


async def test_a_forgotten_tenant_has_no_connections(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        await opened(socket)
        await ask(socket, "a")
        await until_end(socket, "a")
        stream = Stream(gateway.settings.redis_url, gateway.settings.store.stream)
        await forget_outboxes(stream, "default")
        await stream.close()
        assert (await hear(socket))["code"] == "connection_not_found"


async def test_the_newest_socket_has_the_connection(gateway: Gateway) -> None:
    async with at(gateway) as old, at(gateway) as new:
        connection = await opened(old)
        await say(new, type="resume", connection=connection, after=0)
        await hear(new)
        await ask(new, "a")
        assert (await until_end(new, "a"))[0]["seq"] == 1
        assert (await hear(old))["code"] == "connection_not_found"


async def test_too_many_requests_without_an_acknowledged_end(gateway: Gateway) -> None:
    async with at(gateway) as socket:
        await opened(socket)
        for n in range(32):
            await say(socket, type="request", id=f"r{n}", path="/v1/models", method="GET")
        ends: set[str] = set()
        while len(ends) < 32:
            frame = await hear(socket)
            ends |= {frame["id"]} if frame["type"] == "end" else set()
        await say(socket, type="request", id="more", path="/v1/models", method="GET")
        assert (await hear(socket))["error"]["status"] == 429
        await say(socket, type="ack", seq=frame["seq"])
        await say(socket, type="request", id="again", path="/v1/models", method="GET")
        assert (await hear(socket))["status"] == 200


async def test_a_connection_resumes_on_another_gateway(gateway: Gateway, tmp_path: Path) -> None:
    async with second_gateway(gateway, tmp_path / "second") as url:
        async with at(gateway) as socket:
            connection = await opened(socket)
            await ask(socket, "a", "slowly", stream=True)
            first = [await hear(socket) for _ in range(3)]
            socket.transport.abort()
        headers = {"authorization": f"Bearer {OWNER}"}
        async with connect(url.replace("http", "ws") + "/v1/agent", additional_headers=headers) as socket:
            await say(socket, type="resume", connection=connection, after=first[-1]["seq"])
            await hear(socket)
            await ask(socket, "b")
            frames = await until_end(socket, "a")
    mine = [frame for frame in first + frames if frame["id"] == "a"]
    assert said(mine) == "one two three four five six"
    assert [frame["seq"] for frame in first + frames] == list(range(1, len(first + frames) + 1))
