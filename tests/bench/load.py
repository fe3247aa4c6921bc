"""Streams of requests against one endpoint: when each first token came, how fast the others followed."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

CONTENT = re.compile(rb'"content": ?"[^"]|"output_ids"')  # an event with a token, on any of the wires


@dataclass(frozen=True)
class Target:
    name: str
    url: str
    headers: dict[str, str]
    body: dict[str, Any]  # `{n}` in a message becomes the request's number, so that no two are alike


@dataclass(frozen=True)
class Answered:
    first_s: float  # until the first token
    token_s: float  # per token behind it


@dataclass(frozen=True)
class Load:
    answers: list[Answered]
    seconds: float

    def percentile(self, name: str, percent: int) -> float:
        values = sorted(getattr(answer, name) for answer in self.answers)
        return float(values[min(len(values) * percent // 100, len(values) - 1)])


async def run(target: Target, *, streams: int, requests: int, tokens: int, first: int = 0) -> Load:
    """`requests` answers, `streams` at a time. Raises RuntimeError where one of them is no whole answer."""
    numbers = iter(range(first, first + requests))
    answers: list[Answered] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300)) as session:

        async def stream() -> None:
            for n in numbers:
                answers.append(await ask(session, target, n, tokens))

        start = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(streams)))
        return Load(answers, time.perf_counter() - start)


async def ask(session: aiohttp.ClientSession, target: Target, n: int, tokens: int) -> Answered:
    """Tokens that arrive together may share an event; that none is missing is said by how the answer ends."""
    start, first, last, tail = time.perf_counter(), 0.0, 0.0, b""
    async with session.post(target.url, json=numbered(target.body, n), headers=target.headers) as response:
        async for data in response.content.iter_any():
            if CONTENT.search(data):
                last = time.perf_counter()
                first = first or last
            tail = (tail + data)[-4000:]
        if response.status != 200 or b"[DONE]" not in tail or b'length"' not in tail or not first:
            raise RuntimeError(f"{target.name} gave no whole answer: {response.status}, ends with {tail[-300:]!r}")
    return Answered(first - start, (last - first) / (tokens - 1))


def numbered(body: dict[str, Any], n: int) -> dict[str, Any]:
    if "messages" not in body:
        return body
    return body | {"messages": [m | {"content": m["content"].replace("{n}", str(n))} for m in body["messages"]]}
