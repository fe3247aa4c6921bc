"""The gateway's journal: an answered turn is on disk, synced, before its last byte leaves. One path, not a fallback.

Segments of checksummed records, appended by one writer with group commit: everything that arrives while one fsync
runs shares the next. A torn tail is cut on opening. Segments wholly below the recorder's watermark are deleted.

A record is its length and the CRC-32 of its payload, both little-endian 32 bits, then the payload. A segment is named
by the seq of its first record, the others count up from it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import queue
import struct
import threading
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

from agent_rl.experience.codec import decode, encode
from agent_rl.types import Arrival, Feedback, Turn

HEADER = struct.Struct("<II")  # length, crc32
TURN_OVER = b""  # no record, but the wish for a new segment
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class JournalFull(OSError):
    """The disk takes no more; new work must be refused until it does."""


class JournalDamaged(ValueError):
    """A record before the journal's end cannot be read: the disk lost what it had promised to keep."""


@dataclass(slots=True)
class Segment:
    path: Path
    first: int  # seq of its first record
    starts: array[int] = field(default_factory=lambda: array("Q"))  # byte offset of each record
    size: int = 0  # bytes of whole records

    @property
    def end(self) -> int:
        """The seq after its last record."""
        return self.first + len(self.starts)


Waiting = tuple[bytes, "asyncio.Future[int]", asyncio.AbstractEventLoop]


class Journal:
    """Append, replay, trim. One process at a time; `append` from one event loop, `replay` from any thread."""

    journal_id: str

    def __init__(self, folder: Path, *, segment_bytes: int) -> None:
        """Open or make the journal in `folder`; its id is made once and kept there. One process at a time (flock).

        Raises BlockingIOError if another process has it, JournalDamaged if a record before the end is unreadable.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._segment_bytes = folder, segment_bytes
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._file, self._closed = -1, False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.journal_id = _make_id(folder)
            self._segments = _open_segments(folder)
            self._file = os.open(self._segments[-1].path, os.O_RDWR)
            os.ftruncate(self._file, self._segments[-1].size)
            os.fsync(self._file)
        except BaseException:
            self._close_files()
            raise
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_forever, name="journal", daemon=True)
        self._writer.start()

    @property
    def last_seq(self) -> int:
        """Seq of the newest synced record, 0 if there never was one."""
        return self._segments[-1].end - 1

    async def append(self, body: Turn | Feedback) -> Arrival:
        """Returns when the record is synced. Raises JournalFull, having written nothing, RuntimeError once closed."""
        if self._closed:
            raise RuntimeError(f"the journal in {self._folder} is closed")
        loop = asyncio.get_running_loop()
        synced: asyncio.Future[int] = loop.create_future()
        self._queue.put((_record(encode(body)), synced, loop))
        return Arrival(self.journal_id, await synced, body)

    def replay(self, after: int) -> Iterator[Arrival]:
        """Synced records with a seq above `after`, in order."""
        for segment in list(self._segments):
            if segment.end > after + 1:
                yield from self._read(segment, max(after + 1, segment.first))

    def trim(self, watermark: int) -> None:
        """Delete the segments that hold nothing above `watermark`; the newest stays, it knows the next seq."""
        while len(self._segments) > 1 and self._segments[0].end <= watermark + 1:
            self._segments[0].path.unlink()
            del self._segments[0]

    async def turn_over(self) -> None:
        """Begin a new segment, so that the one so far can be trimmed. Raises as `append` does."""
        if self._closed:
            raise RuntimeError(f"the journal in {self._folder} is closed")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        self._queue.put((TURN_OVER, done, loop))
        await done

    async def close(self) -> None:
        """Write what was appended, then let the folder go."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._close_files()

    # ------------------------------------------------------------------------------------------ reading
    def _read(self, segment: Segment, seq: int) -> Iterator[Arrival]:
        with segment.path.open("rb") as file:
            for at in range(seq, segment.end):
                file.seek(segment.starts[at - segment.first])
                length, crc = HEADER.unpack(file.read(HEADER.size))
                payload = file.read(length)
                if zlib.crc32(payload) != crc:
                    raise JournalDamaged(f"record {at} in {segment.path} has changed since it was written")
                yield Arrival(self.journal_id, at, decode(payload))

    # ------------------------------------------------------------------------------------------ the writer's thread
    def _write_forever(self) -> None:
        open_for_more = True
        while open_for_more:
            group = [self._queue.get()]
            while not self._queue.empty():
                group.append(self._queue.get())
            open_for_more = None not in group
            waiting = [one for one in group if one is not None]
            if records := [one for one in waiting if one[0] != TURN_OVER]:
                self._commit(records, self._write)
            if turning := [one for one in waiting if one[0] == TURN_OVER]:
                self._commit(turning, self._turn_over)

    def _commit(self, group: list[Waiting], do: Callable[[list[bytes]], int]) -> None:
        """All of the group or nothing; whoever waits hears of it."""
        try:
            first = do([record for record, _, _ in group])
        except OSError as error:
            reason = JournalFull(error.errno, f"the journal in {self._folder} takes no more: {error.strerror}")
            failure: OSError = reason if error.errno in FULL else error
            for _, synced, loop in group:
                _tell(loop, synced, failure)
        else:
            for seq, (_, synced, loop) in enumerate(group, first):
                _tell(loop, synced, seq)

    def _write(self, records: list[bytes]) -> int:
        """Returns the seq of the first record. On failure the file ends where it did before."""
        if self._segments[-1].size >= self._segment_bytes:
            self._next_segment()
        segment, data = self._segments[-1], b"".join(records)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], segment.size + written)
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, segment.size)
            raise
        first = segment.end
        for record in records:
            segment.starts.append(segment.size)
            segment.size += len(record)
        return first

    def _turn_over(self, _: list[bytes]) -> int:
        if self._segments[-1].size:
            self._next_segment()
        return self._segments[-1].first

    def _next_segment(self) -> None:
        segment = _make_segment(self._folder, self._segments[-1].end)
        file = os.open(segment.path, os.O_RDWR)
        os.close(self._file)
        self._file = file
        self._segments.append(segment)

    def _close_files(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1


def open_journal(root: Path, *, segment_bytes: int) -> Journal:
    """The first journal `root`/0, `root`/1, … that no other process has: several gateways have several."""
    for n in count():
        try:
            return Journal(root / str(n), segment_bytes=segment_bytes)
        except BlockingIOError:
            continue
    raise AssertionError


def _record(payload: bytes) -> bytes:
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def _tell(loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[int], outcome: int | OSError) -> None:
    """From the writer's thread; a waiter that gave up, or whose loop is closed, is not told."""

    def tell() -> None:
        if waiting.done():
            return
        if isinstance(outcome, OSError):
            waiting.set_exception(outcome)
        else:
            waiting.set_result(outcome)

    if not loop.is_closed():
        loop.call_soon_threadsafe(tell)


def _make_id(folder: Path) -> str:
    path = folder / "id"
    if not path.exists():
        fresh = folder / "id.new"
        fresh.write_text(uuid.uuid4().hex)
        _sync(fresh)
        fresh.rename(path)
        _sync(folder)
    return path.read_text()


def _make_segment(folder: Path, first: int) -> Segment:
    path = folder / f"{first:020d}.segment"
    path.touch(mode=0o600)
    _sync(folder)
    return Segment(path, first)


def _open_segments(folder: Path) -> list[Segment]:
    """At least one. Only the newest may have a torn tail, which is no part of its size."""
    segments = [_scan(path) for path in sorted(folder.glob("*.segment"))]
    for segment, following in pairwise(segments):
        if segment.end != following.first or segment.path.stat().st_size != segment.size:
            raise JournalDamaged(
                f"{segment.path} is readable up to byte {segment.size}, record {segment.end - 1}, but "
                f"{following.path.name} follows: restore the file, or move both away and lose what SQL does not have"
            )
    return segments or [_make_segment(folder, 1)]


def _scan(path: Path) -> Segment:
    segment = Segment(path, int(path.stem))
    total = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(HEADER.size)) == HEADER.size:
            length, crc = HEADER.unpack(header)
            end = segment.size + HEADER.size + length
            if length == 0 or end > total or zlib.crc32(file.read(length)) != crc:
                break
            segment.starts.append(segment.size)
            segment.size = end
    return segment


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
