"""The gateway's journal: an answered turn is on disk, synced, before its last byte leaves. One path, not a fallback.

Segments of checksummed records, appended by one writer with group commit: everything that arrives while one fsync
runs shares the next. A torn tail is cut on opening. Segments wholly below the recorder's watermark are deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent_rl.types import Arrival, Feedback, Turn


class JournalFull(OSError):
    """The disk takes no more; new work must be refused until it does."""


class Journal:
    journal_id: str

    def __init__(self, folder: Path, *, segment_bytes: int) -> None:
        """Open or make the journal in `folder`; its id is made once and kept there. One process at a time (flock)."""
        raise NotImplementedError

    async def append(self, body: Turn | Feedback) -> Arrival:
        """Returns when the record is synced. Raises JournalFull, having written nothing."""
        raise NotImplementedError

    def replay(self, after: int) -> Iterator[Arrival]:
        """Synced records with a seq above `after`, in order."""
        raise NotImplementedError

    def trim(self, watermark: int) -> None:
        """Delete the segments that hold nothing above `watermark`."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
