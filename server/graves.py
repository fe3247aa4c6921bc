"""What was forgotten in SQL is forgotten by this gateway too: in its memory, in Redis, and in its journal."""

from __future__ import annotations

import asyncio
import logging
import time

from agent_rl.experience import deletion
from agent_rl.experience.journal import Journal
from agent_rl.experience.store import Store, StoreUnavailable
from agent_rl.experience.stream import Stream, StreamUnavailable
from server.core import Core

OVERLAP_S = 10.0  # clocks differ, and a transaction is seen a little after the time that it wrote
log = logging.getLogger("agent_rl.gateway")


async def watch(store: Store, stream: Stream, core: Core, journal: Journal, every_s: float) -> None:
    """Until cancelled. The journal is turned over at the start too: something may have been forgotten meanwhile."""
    newest, known, full = time.time(), set[tuple[str, str, float]](), True
    while True:
        try:
            buried = await deletion.buried_since(store, newest - OVERLAP_S)
            fresh = [grave for grave in buried if grave not in known]
            if fresh or full:
                full = True  # until all of it is done
                core.forget({target for kind, target, _ in fresh if kind in ("session", "late")})
                await stream.forget([target for kind, target, _ in fresh if kind == "turn"])
                await journal.turn_over()
                full = False
            known = set(buried)
            newest = max(newest, *(moment for _, _, moment in buried)) if buried else newest
        except (StoreUnavailable, StreamUnavailable, OSError) as error:
            log.warning("what was forgotten is not forgotten here yet: %r", error)
        await asyncio.sleep(every_s)
