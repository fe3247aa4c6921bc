"""`agent-rl connect`: real clients on a local endpoint, over a network that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from gateway import OWNER, Gateway, running_gateway, second_gateway
from serving import serving

from server.connect import Bridge, ConnectError, agent_url, create_app

WORDS = "one two three four five six seven eight"
SCRIPT = {
    "rules": [{"user": "slowly", "text": WORDS, "token_s": 0.05}],
    "default": {"text": "Okay."},
}


@dataclass
class Network:
    """A TCP proxy between connect and the server, which can be cut and led elsewhere."""

    url: str  # where it leads
    port: int = 0
    open: bool = True
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.open:
                there, back = await asyncio.open_connection("127.0.0.1", urlsplit(self.url).port)
                self._writers.add(back)
                await asyncio.gather(_pump(reader, back), _pump(there, writer))
        except OSError:
            return  # it was cut
        finally:
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


@dataclass
class Local:
    url: str
    network: Network
    gateway: Gateway

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="nothing", max_retries=0)


@asynccontextmanager
async def connected(gateway: Gateway, key: str = OWNER) -> AsyncIterator[Local]:
    network = Network(gateway.url)
    server = await asyncio.start_server(network.carry, "127.0.0.1", 0)
    bridge = Bridge(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", key)
    running = asyncio.create_task(bridge.run())
    try:
        async with serving(create_app(bridge, patience_s=2.0), lifespan="off") as url:
            yield Local(url, network, gateway)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()
        network.cut()


@pytest.fixture
async def local(tiny_model: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Local]:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(
            running_gateway(tiny_model, redis_url, tmp_path / "first", script=SCRIPT, cache_s=0.0)
        )
        yield await stack.enter_async_context(connected(gateway))


async def stream(ai: openai.AsyncOpenAI) -> AsyncIterator[str]:
    """The pieces of a slow answer."""
    answer = await ai.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "slowly"}], stream=True
    )
    async for chunk in answer:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


async def test_the_openai_sdk_through_the_bridge(local: Local) -> None:
    async with local.openai() as ai:
        answer = await ai.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}])
        assert answer.choices[0].message.content == "Okay."
        assert [model.id async for model in ai.models.list()] == ["default"]
        with pytest.raises(openai.NotFoundError, match="models here: default"):
            await ai.models.retrieve("other")
        times, pieces = [], []
        async for piece in stream(ai):
            times.append(asyncio.get_running_loop().time())
            pieces.append(piece)
    assert "".join(pieces) == WORDS
    assert len(pieces) > 5
    assert times[-1] - times[0] > 0.2  # as it is sampled, not at the end


async def test_feedback_through_the_bridge(local: Local) -> None:
    async with httpx.AsyncClient(base_url=local.url) as web:
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        answer = await web.post("/v1/chat/completions", json=body, headers={"x-session-id": "mine"})
        assert answer.headers["x-session-id"] == "mine"
        told = await web.post("/v1/feedback", json={"turn_id": answer.headers["x-turn-id"], "value": 1})
    assert (answer.status_code, told.status_code) == (200, 202)


async def test_a_cut_in_mid_answer_is_not_noticed(local: Local) -> None:
    pieces = []
    async with local.openai() as ai:
        async for piece in stream(ai):
            pieces.append(piece)
            if len(pieces) in (2, 5):
                local.network.cut()
    assert "".join(pieces) == WORDS
    async with local.gateway.http() as web:
        assert 'agent_rl_turns_total{finish="stop",fork="first"} 1.0' in (await web.get("/metrics")).text


async def test_an_answer_goes_on_through_another_gateway(local: Local, tmp_path: Path) -> None:
    pieces = []
    async with second_gateway(local.gateway, tmp_path / "second") as url, local.openai() as ai:
        async for piece in stream(ai):
            pieces.append(piece)
            if len(pieces) == 2:
                local.network.url = url
                local.network.cut()
        answer = await ai.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}])
    assert "".join(pieces) == WORDS
    assert answer.choices[0].message.content == "Okay."


async def test_a_request_while_the_network_is_away_waits_for_it(local: Local) -> None:
    async with local.openai() as ai:
        await ai.models.list()
        local.network.open = False
        local.network.cut()
        await asyncio.sleep(0.1)
        asked = asyncio.create_task(
            ai.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}])
        )
        await asyncio.sleep(0.3)
        local.network.open = True
        assert (await asked).choices[0].message.content == "Okay."


async def test_a_network_that_stays_away_is_a_503(local: Local) -> None:
    async with local.openai() as ai:
        await ai.models.list()
        local.network.open = False
        local.network.cut()
        await asyncio.sleep(0.1)
        with pytest.raises(openai.InternalServerError, match="no connection to the server"):
            await ai.models.list()


async def test_a_local_client_that_hangs_up_hangs_up_over_there(local: Local) -> None:
    async with httpx.AsyncClient(base_url=local.url) as web:
        body = {"model": "default", "messages": [{"role": "user", "content": "slowly"}], "stream": True}
        async with web.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        turn_id = answer.headers["x-turn-id"]
    assert (await local.gateway.transcript(turn_id)).turn.finish == "aborted"


async def test_a_key_that_is_not_known_ends_it(local: Local) -> None:
    with pytest.raises(ConnectError, match="401"):
        await asyncio.wait_for(Bridge(local.gateway.url, "arl-wrong").run(), 10)


def test_urls() -> None:
    urls = ("https://host", "wss://host/", "https://host/v1", "wss://host/v1/agent")
    assert [agent_url(url) for url in urls] == ["wss://host/v1/agent"] * 4
    assert agent_url("http://127.0.0.1:8000/") == "ws://127.0.0.1:8000/v1/agent"
    with pytest.raises(ConnectError, match="takes wss://HOST"):
        agent_url("host:8000")
