"""What was forgotten in SQL is forgotten by this gateway too: in its memory, and in its journal."""

from __future__ import annotations

import asyncio
import logging
import time

from agent_rl.experience import deletion
from agent_rl.experience.journal import Journal
from agent_rl.experience.store import Store, StoreUnavailable
from server.core import Core

log = logging.getLogger("agent_rl.gateway")


async def watch(store: Store, core: Core, journal: Journal, every_s: float) -> None:
    """Until cancelled. The journal is turned over at the start too: something may have been forgotten meanwhile."""
    seen = time.time()
    await journal.turn_over()
    while True:
        await asyncio.sleep(every_s)
        try:
            graves, seen = await deletion.buried_since(store, seen)
        except StoreUnavailable as error:
            log.warning("what was forgotten meanwhile is not known: %r", error)
            continue
        if graves:
            core.forget({target for kind, target in graves if kind == "session"})
            await journal.turn_over()
