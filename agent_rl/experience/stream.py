"""Redis: the stream from gateways to the recorder, and the heads of running conversations.

Redis may lose everything and nothing is lost: the journal sends again what SQL does not have. Each journal's last
sent seq is written in the same MULTI as the entries, so that whoever sends next sees whether Redis still has them.

    {name}                       the stream: entries of journal, seq, body
    {name}:dead                  entries that belong to no journal, with the error
    {name}:sent:{journal}        last seq sent
    {name}:watermarks            hash: journal → every record up to this seq is in SQL
    {name}:head:{turn}           a conversation's head
    {name}:chain:{scope}:{chain} sorted set: the newest turns that end with this chain, by time
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError, ResponseError

from agent_rl.experience.codec import encode
from agent_rl.types import Arrival, Turn

GROUP = "recorder"  # recorders share one consumer: an entry is taken over when it was not acknowledged in time
CLAIM_AFTER_S = 5.0
PARENT_TTL_S = 120  # a continued conversation's old head stays this long, for a retry or a fork
HEADS_PER_CHAIN = 8
TIMEOUT_S = 5.0


class StreamUnavailable(ConnectionError):
    """Redis does not answer, or cannot be used now; try again."""


class StreamForgot(RuntimeError):
    """Redis does not have what this journal sent last; it must be sent again."""

    def __init__(self, journal_id: str, expected: int, sent: int | None) -> None:
        super().__init__(f"Redis was sent journal {journal_id} up to {expected} and has it up to {sent or 0}")


@dataclass(frozen=True, slots=True)
class Head:
    """Where a conversation stands after a turn: what the next request's prompt extends."""

    turn_id: str
    session_id: str
    policy_id: str
    ids: tuple[int, ...]  # the whole prompt and the response
    n_messages: int  # messages so far, the answer included
    chain: str
    thoughts: str = ""  # keyed hash of all reasoning so far, message by message
    tools: str = ""  # keyed hash of the tools that the prompt was rendered with
    recorded: bool = True  # False: of a turn that is kept in a gateway's memory alone


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry of the stream as the recorder gets it."""

    entry_id: str
    journal_id: str
    seq: int
    body: bytes  # for `codec.decode`


class Stream:
    """One Redis connection pool, for either side. Every method raises StreamUnavailable while Redis is away."""

    def __init__(self, url: str, name: str) -> None:
        self._redis: Redis = Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self.name = name
        self._head = msgspec.msgpack.Decoder(Head)

    async def close(self) -> None:
        await self._redis.aclose()

    # ----------------------------------------------------------------------------------- the gateway's
    async def send(
        self,
        arrivals: Sequence[tuple[Arrival, Head | None, str | None]],
        head_ttl_s: float,
        *,
        after: int | None = None,
    ) -> list[str]:
        """Entries of one journal, in its order, and for turns their heads (scoped by the key given third), in one
        MULTI. Returns entry ids.

        `after`: the seq that this journal sent last. Raises StreamForgot, having sent nothing, if Redis lost it.
        """
        journal_id = arrivals[0][0].journal_id
        async with boundary(), self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(f"{self.name}:sent:{journal_id}")  # a Redis that goes away from here on fails the MULTI
            sent = _int(await pipe.get(f"{self.name}:sent:{journal_id}"))
            if after is not None and sent != after:
                raise StreamForgot(journal_id, after, sent)
            pipe.multi()  # type: ignore[no-untyped-call]
            for arrival, _, _ in arrivals:
                entry = {"journal": journal_id, "seq": arrival.seq, "body": encode(arrival.body)}
                pipe.xadd(self.name, entry)  # type: ignore[arg-type]  # bytes are taken as they are
            pipe.set(f"{self.name}:sent:{journal_id}", arrivals[-1][0].seq)
            for arrival, head, scope in arrivals:
                if head is not None:
                    self._set_head(pipe, arrival, head, scope or "", head_ttl_s)
            answers = await pipe.execute()
        return [entry_id.decode() for entry_id in answers[: len(arrivals)]]

    def _set_head(self, pipe: Pipeline, arrival: Arrival, head: Head, scope: str, ttl_s: float) -> None:
        chain, life = f"{self.name}:chain:{scope}:{head.chain}", max(1, round(ttl_s * 1000))
        pipe.set(f"{self.name}:head:{head.turn_id}", msgspec.msgpack.encode(head), px=life)
        pipe.zadd(chain, {head.turn_id: time.time()})
        pipe.zremrangebyrank(chain, 0, -HEADS_PER_CHAIN - 1)
        pipe.pexpire(chain, life)
        if isinstance(arrival.body, Turn) and arrival.body.parent_id is not None:
            pipe.expire(f"{self.name}:head:{arrival.body.parent_id}", PARENT_TTL_S)

    async def heads(self, scope: str, chains: Sequence[str]) -> list[Head]:
        """Heads that end with the first of these chains that any head ends with, newest first; several if it is
        ambiguous, eight at most."""
        if not chains:
            return []
        async with boundary():
            async with self._redis.pipeline(transaction=False) as pipe:
                for chain in chains:
                    pipe.zrange(f"{self.name}:chain:{scope}:{chain}", 0, -1, desc=True)
                members = await pipe.execute()
            for turn_ids in members:
                keys = [f"{self.name}:head:{turn_id.decode()}" for turn_id in turn_ids]
                found = [data for data in await self._redis.mget(keys) if data] if keys else []
                if found:
                    return [self._head.decode(cast(bytes, data)) for data in found]
        return []

    async def forget(self, turn_ids: Sequence[str]) -> None:
        """No conversation goes on behind these turns any more. Entries on their way are stopped by tombstones."""
        for at in range(0, len(turn_ids), 1000):
            async with boundary():
                await self._redis.delete(*(f"{self.name}:head:{turn_id}" for turn_id in turn_ids[at : at + 1000]))

    async def forget_set(self, index: str, keys_of: Callable[[str], Sequence[str]]) -> None:
        """Delete a set, and the keys that belong to each of its members."""
        async with boundary():
            for member in cast(set[bytes], await self._redis.smembers(index)):
                await self._redis.delete(*keys_of(member.decode()))
            await self._redis.delete(index)

    async def progress(self, journal_id: str) -> tuple[int | None, int | None]:
        """(last seq sent, watermark) of a journal as Redis knows them; None where it does not."""
        async with boundary(), self._redis.pipeline(transaction=False) as pipe:
            pipe.get(f"{self.name}:sent:{journal_id}")
            pipe.hget(f"{self.name}:watermarks", journal_id)
            sent, watermark = await pipe.execute()
        return _int(sent), _int(watermark)

    # ----------------------------------------------------------------------------------- the recorder's
    async def receive(self, n: int, block_s: float) -> list[Delivery]:
        """Up to n entries: first those that were not acknowledged in time, then new ones, waiting up to `block_s`.

        Entries that belong to no journal go to the dead-letter stream with their error.
        """
        entries: list[tuple[bytes | None, dict[bytes, bytes] | None]]
        async with boundary():
            try:
                entries = (await self._claim(n)) or (await self._read(n, block_s))
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                await self._make_group()
                entries = await self._read(n, block_s)
        deliveries = []
        for entry_id, fields in entries:
            if entry_id is None or fields is None:  # deleted meanwhile; Redis 6.2 says it so
                continue
            try:
                deliveries.append(_delivery(entry_id, fields))
            except (KeyError, ValueError) as error:
                await self._bury(entry_id, fields, f"{type(error).__name__}: {error}")
        return deliveries

    async def acknowledge(self, entry_ids: Sequence[str], watermarks: dict[str, int]) -> None:
        """Acknowledge, delete, and publish the watermarks, in one MULTI."""
        async with boundary(), self._redis.pipeline(transaction=True) as pipe:
            if entry_ids:
                pipe.xack(self.name, GROUP, *entry_ids)
                pipe.xdel(self.name, *entry_ids)
            if watermarks:
                pipe.hset(f"{self.name}:watermarks", mapping={name: str(seq) for name, seq in watermarks.items()})
            await pipe.execute()

    async def _claim(self, n: int) -> list[Any]:
        idle_ms = int(CLAIM_AFTER_S * 1000)
        answer = await self._redis.xautoclaim(self.name, GROUP, GROUP, idle_ms, count=n)
        return [entry for entry in answer[1] if entry and entry[0]]

    async def _read(self, n: int, block_s: float) -> list[Any]:
        block_ms = max(1, int(min(block_s, TIMEOUT_S / 2) * 1000))
        answer = await self._redis.xreadgroup(GROUP, GROUP, {self.name: ">"}, count=n, block=block_ms)
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer or []]
        return [entry for entries in streams for entry in entries]

    async def _make_group(self) -> None:
        try:
            await self._redis.xgroup_create(self.name, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another recorder was faster
                raise

    async def _bury(self, entry_id: bytes, fields: dict[bytes, bytes], error: str) -> None:
        async with boundary(), self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(f"{self.name}:dead", {**fields, b"error": error})  # type: ignore[dict-item]
            pipe.xack(self.name, GROUP, entry_id)
            pipe.xdel(self.name, entry_id)
            await pipe.execute()


@asynccontextmanager
async def boundary() -> AsyncIterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise StreamUnavailable(f"Redis cannot be used now: {error}") from error


def _delivery(entry_id: bytes, fields: dict[bytes, bytes]) -> Delivery:
    return Delivery(entry_id.decode(), fields[b"journal"].decode(), int(fields[b"seq"]), fields[b"body"])


def _int(value: bytes | str | None) -> int | None:
    return None if value is None else int(value)
