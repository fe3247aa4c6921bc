"""The outbox of a personal agent's socket: what was sent and not yet acknowledged, in Redis, for any gateway to resume.

Frames get their numbers where they are stored, so that several gateways may write to one outbox; whoever holds the
socket reads it. A frame is written once, however often its writer tries. Everything of a connection lives `ttl_s`
longer than its last sign of life.

    {name}:outbox:{connection}           stream: frame number → the frame's JSON
    {name}:outbox:{connection}:state     hash: owner, reader, seq (last number), n (requests), and for each request
                                         k:{id} parts written, g:{id} gateway that answers, e:{id} number of its end
    {name}:outbox:{connection}:attended  there while a socket reads, and `grace_s` longer
    {name}:outboxes:{tenant}             set: the tenant's connections
    {name}:gateway:{gateway}             there while that gateway lives
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, cast
from uuid import uuid4

from redis.asyncio import Redis

from agent_rl.experience.stream import TIMEOUT_S, Stream, boundary

MOST_FRAMES = 1024  # unacknowledged; a writer waits for room
MOST_REQUESTS = 32  # whose end is not acknowledged
READ_AT_ONCE = 128
ALIVE_S = 15.0
BURIAL = 2**53  # the part number of an end that another gateway writes

BEGIN = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 'gone' end
if redis.call('HEXISTS', KEYS[1], 'k:' .. ARGV[1]) == 1 then return 'known' end
if tonumber(redis.call('HGET', KEYS[1], 'n')) >= tonumber(ARGV[3]) then return 'full' end
redis.call('HINCRBY', KEYS[1], 'n', 1)
redis.call('HSET', KEYS[1], 'k:' .. ARGV[1], 0, 'g:' .. ARGV[1], ARGV[2])
return 'new'
"""
APPEND = """
local k = redis.call('HGET', KEYS[2], 'k:' .. ARGV[1])
if not k then return 'gone' end
if tonumber(ARGV[2]) <= tonumber(k) then return 'known' end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[5]) then return 'full' end
local seq = redis.call('HINCRBY', KEYS[2], 'seq', 1)
redis.call('XADD', KEYS[1], seq .. '-0', 'frame', ARGV[3])
redis.call('HSET', KEYS[2], 'k:' .. ARGV[1], ARGV[2])
if ARGV[4] == '1' then
  redis.call('HSET', KEYS[2], 'e:' .. ARGV[1], seq)
  redis.call('HDEL', KEYS[2], 'g:' .. ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return 'new'
"""
ACKNOWLEDGE = """
local last = redis.call('HGET', KEYS[2], 'seq')
if not last or tonumber(ARGV[1]) > tonumber(last) then return 'gone' end
redis.call('XTRIM', KEYS[1], 'MINID', (tonumber(ARGV[1]) + 1) .. '-0')
local state = redis.call('HGETALL', KEYS[2])
for i = 1, #state, 2 do
  if string.sub(state[i], 1, 2) == 'e:' and tonumber(state[i + 1]) <= tonumber(ARGV[1]) then
    redis.call('HDEL', KEYS[2], state[i], 'k:' .. string.sub(state[i], 3))
    redis.call('HINCRBY', KEYS[2], 'n', -1)
  end
end
return 'new'
"""


class Put(Enum):
    """What became of a request or of a frame."""

    NEW = "new"  # it is in the outbox
    KNOWN = "known"  # it was there before
    FULL = "full"  # no room until something is acknowledged
    GONE = "gone"  # the outbox has no such connection, request or number (any more)


class OutboxGone(LookupError):
    """There is no such connection of this owner any more, or another socket reads it now."""


class Outbox:
    """One gateway's view of all outboxes. Every method raises StreamUnavailable while Redis is away."""

    def __init__(self, url: str, name: str, *, ttl_s: float, grace_s: float) -> None:
        self._redis: Redis = Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._name, self._ttl_ms, self._grace_ms = name, int(ttl_s * 1000), int(grace_s * 1000)
        self.gateway = uuid4().hex

    async def close(self) -> None:
        await self._redis.aclose()

    async def alive(self) -> None:
        """Says that this gateway lives, for ALIVE_S."""
        async with boundary():
            await self._redis.set(f"{self._name}:gateway:{self.gateway}", "1", px=int(ALIVE_S * 1000))

    # ------------------------------------------------------------------------------------------------ the reader's
    async def open(self, tenant_id: str, owner: str, reader: str) -> str:
        """A new connection of `owner`, a string that names tenant and key; returns its id."""
        connection = uuid4().hex
        stream, state = self._keys(connection)
        index = f"{self._name}:outboxes:{tenant_id}"
        async with boundary(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(state, mapping={"owner": owner, "reader": reader, "seq": "0", "n": "0"})
            pipe.sadd(index, connection)
            pipe.expire(index, 86_400)
            self._touch(pipe, stream, state)
            await pipe.execute()
        return connection

    async def resume(self, connection: str, owner: str, reader: str) -> int:
        """From now on `reader` reads it; returns the last number. Raises OutboxGone."""
        stream, state = self._keys(connection)
        async with boundary():
            if await self._redis.hget(state, "owner") != owner.encode():
                raise OutboxGone(f"there is no connection {connection} of this key (any more): open a new one")
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(state, "reader", reader)
                pipe.hget(state, "seq")
                self._touch(pipe, stream, state)
                return int((await pipe.execute())[1])

    async def read(self, connection: str, reader: str, after: int, block_s: float) -> list[tuple[int, bytes]]:
        """(number, frame) in order, those after `after`, waiting up to `block_s`. Raises OutboxGone."""
        stream, state = self._keys(connection)
        async with boundary(), self._redis.pipeline(transaction=False) as pipe:
            pipe.xread({stream: f"{after}-0"}, count=READ_AT_ONCE, block=max(1, int(block_s * 1000)))
            pipe.hget(state, "reader")
            answer, holder = await pipe.execute()
        if holder != reader.encode():
            raise OutboxGone("this connection was resumed elsewhere or has expired")
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer or []]
        return [
            (int(entry_id.split(b"-")[0]), fields[b"frame"])
            for entries in streams
            for entry_id, fields in _flat(entries)
        ]

    async def acknowledge(self, connection: str, seq: int) -> Put:
        """Everything up to this number arrived; GONE for a number that was never given."""
        async with boundary():
            return await self._run(ACKNOWLEDGE, self._keys(connection), seq)

    async def touch(self, connection: str) -> None:
        """A socket still reads it."""
        async with boundary(), self._redis.pipeline(transaction=True) as pipe:
            self._touch(pipe, *self._keys(connection))
            await pipe.execute()

    async def bury(self, connection: str, frame_of: Callable[[str], bytes]) -> None:
        """End the requests of gateways that live no more: `frame_of(request_id)` is the last frame."""
        async with boundary():
            state = cast(dict[bytes, bytes], await self._redis.hgetall(self._keys(connection)[1]))
            owners = {field[2:].decode(): gateway.decode() for field, gateway in state.items() if field[:2] == b"g:"}
            for request_id, gateway in owners.items():
                if not await self._redis.exists(f"{self._name}:gateway:{gateway}"):
                    await self._append(connection, request_id, BURIAL, frame_of(request_id), last=True)

    # ------------------------------------------------------------------------------------------------ the writer's
    async def begin(self, connection: str, request_id: str) -> Put:
        """NEW: this gateway answers it; KNOWN: its answer is on the way, or waits in the outbox."""
        async with boundary():
            return await self._run(BEGIN, self._keys(connection)[1:], request_id, self.gateway, MOST_REQUESTS)

    async def append(self, connection: str, request_id: str, part: int, frame: bytes, *, last: bool) -> Put:
        """The `part`-th frame (from 1) of a request's answer, a JSON object; KNOWN where it was stored before."""
        async with boundary():
            return await self._append(connection, request_id, part, frame, last=last)

    async def attended(self, connections: list[str]) -> set[str]:
        """Those with a socket, or without one for less than `grace_s`."""
        if not connections:
            return set()
        async with boundary(), self._redis.pipeline(transaction=False) as pipe:
            for connection in connections:
                pipe.exists(f"{self._keys(connection)[0]}:attended")
            there = await pipe.execute()
        return {connection for connection, found in zip(connections, there, strict=True) if found}

    async def _append(self, connection: str, request_id: str, part: int, frame: bytes, *, last: bool) -> Put:
        room = MOST_FRAMES + MOST_REQUESTS if last else MOST_FRAMES  # an end always finds room
        keys, ended = self._keys(connection), "1" if last else "0"
        return await self._run(APPEND, keys, request_id, part, frame, ended, room, self._ttl_ms)

    async def _run(self, script: str, keys: tuple[str, ...], *values: str | int | bytes) -> Put:
        answer = await self._redis.eval(script, len(keys), *keys, *values)
        return Put(answer.decode())

    def _keys(self, connection: str) -> tuple[str, str]:
        return _keys(self._name, connection)[:2]

    def _touch(self, pipe: Any, stream: str, state: str) -> None:
        pipe.pexpire(stream, self._ttl_ms)
        pipe.pexpire(state, self._ttl_ms)
        pipe.set(f"{stream}:attended", "1", px=self._grace_ms)


async def forget_outboxes(stream: Stream, tenant_id: str) -> None:
    """Nothing of the tenant's connections is left: a socket that reads one closes."""
    await stream.forget_set(f"{stream.name}:outboxes:{tenant_id}", lambda member: _keys(stream.name, member))


def _keys(name: str, connection: str) -> tuple[str, str, str]:
    """Stream, state and mark of attendance."""
    stream = f"{name}:outbox:{connection}"
    return stream, f"{stream}:state", f"{stream}:attended"


def _flat(entries: Any) -> Any:
    """redis-py gives XREAD's entries as they are, or in one more list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries
