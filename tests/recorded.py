"""Records turns and feedback into a store as the recorder does, numbered by itself."""

from __future__ import annotations

from agent_rl.experience.store import Store
from agent_rl.types import Arrival, Feedback, Turn


class Recorded:
    """A store that numbers what is recorded into it."""

    def __init__(self, store: Store) -> None:
        self.store, self.seq = store, 0

    async def __call__(self, *bodies: Turn | Feedback) -> None:
        arrivals = [Arrival("j1", self.seq + n, body) for n, body in enumerate(bodies, 1)]
        self.seq += len(bodies)
        await self.store.record(arrivals)
