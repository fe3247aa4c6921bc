"""From evidence to lessons in SQL: what the judge claims and writes, what the learner claims, uses and drops."""

from __future__ import annotations

from collections.abc import Sequence

from agent_rl.experience.store import Store
from agent_rl.types import DropReason, Evidence, Lease, Lesson, Verdict


async def claim_evidence(store: Store, n: int, lease_s: float) -> list[Evidence]:
    """Up to n turns whose evidence is ahead of their verdict, oldest first, leased to the caller for `lease_s`.

    Only turns that can teach: `no_lesson` is NULL and the tenant learns; others are marked judged in passing.
    """
    raise NotImplementedError


async def settle(
    store: Store, evidence: Evidence, verdict: Verdict, *, method: str | None, standing: str | None = None
) -> str | None:
    """Write a verdict and, if `method` is given, its lesson; `standing` becomes standing feedback of the subject.

    One transaction; a verdict or lesson that is there already stays as it is. An older revision's lesson that nobody
    has used is dropped as superseded. Returns the lesson's id.
    """
    raise NotImplementedError


async def retract_standing(store: Store, preference_id: str) -> None:
    raise NotImplementedError


async def claim_lessons(store: Store, lease: Lease, n: int, *, min_age_s: float = 0.0) -> list[Lesson]:
    """Up to n ready lessons of the lease's policy, oldest first, marked claimed by its epoch; lessons claimed by an
    older epoch are ready again. Returns [] while fewer than n are ready and the oldest is younger than `min_age_s`."""
    raise NotImplementedError


async def claim_replays(store: Store, lease: Lease, n: int, seed: int) -> list[Lesson]:
    """Up to n lessons that the serving lineage has used, drawn at random by `seed`."""
    raise NotImplementedError


async def drop(store: Store, lease: Lease, lesson_id: str, reason: DropReason, detail: str = "") -> None:
    """Say, once and for good, why a lesson is not trained on. Raises LeaseLost under an older epoch."""
    raise NotImplementedError


async def release_lessons(store: Store, lease: Lease, lesson_ids: Sequence[str]) -> None:
    """Give claimed lessons back unused."""
    raise NotImplementedError


async def explain(store: Store, turn_id: str) -> dict[str, object] | None:
    """What is known of a turn: its record, rule, follow-ups, verdicts, lessons, uses, drops and releases."""
    raise NotImplementedError
