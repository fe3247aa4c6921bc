"""From evidence to lessons in SQL: what the judge claims and writes, what the learner claims, uses and drops.

evidence ahead of its verdict ──claim_evidence, settle──▶ ready ──claim_lessons──▶ claimed ──lineage.commit──▶ used
                                                           ▲  └──newer verdict──┐   │ └──drop──▶ dropped
                                                           └──release_lessons───┼───┘               ▲
                                                                                └───────────────────┘
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, FromClause, Select, and_, func, not_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.evidence import evidence_of, lessons_of, standing_of, subject_of
from agent_rl.experience.leases import free_for, hold
from agent_rl.experience.records import insert
from agent_rl.experience.store import Store
from agent_rl.experience.tables import (
    drops,
    lesson_uses,
    lessons,
    policies,
    preferences,
    releases,
    tenants,
    turns,
    verdicts,
)
from agent_rl.types import DropReason, Evidence, Lease, Lesson, Turn, Verdict

REPLAY_POOL = 10_000  # replays are drawn from this many of the newest used lessons


# ------------------------------------------------------------------------------------------------- the judge


async def claim_evidence(store: Store, n: int, lease_s: float) -> list[Evidence]:
    """Up to n turns whose evidence is ahead of their verdict, oldest first, leased to the caller for `lease_s`.

    Only turns that can teach: the tenant learns, and `no_lesson` is NULL, or "side", where something followed such a
    request after all; others are marked judged in passing.
    """
    now = time.time()
    ahead = turns.c.evidence_revision > turns.c.judged_revision
    free = ahead & or_(turns.c.judge_lease_until.is_(None), turns.c.judge_lease_until < now)
    oldest = select(turns.c.turn_id).where(free).order_by(turns.c.created_at).limit(n)
    async with store.read() as connection:
        if (await connection.execute(oldest.limit(1))).first() is None:
            return []
    mute = ahead & or_(turns.c.no_lesson != "side", turns.c.tenant_id.in_(_silent()))
    async with store.write() as connection:
        await connection.execute(update(turns).where(mute).values(judged_revision=turns.c.evidence_revision))
        claimed = list((await connection.execute(oldest.with_for_update(skip_locked=True))).scalars())
        leased = update(turns).where(turns.c.turn_id.in_(claimed)).values(judge_lease_until=now + lease_s)
        await connection.execute(leased)
    return await _evidence(store, claimed)


async def _evidence(store: Store, turn_ids: Sequence[str]) -> list[Evidence]:
    """Evidence of these turns, oldest first; one whose past is not recorded yet waits for the end of its lease."""
    query = select(turns.c.turn_id, turns.c.evidence_revision).where(turns.c.turn_id.in_(turn_ids))
    async with store.read() as connection:
        rows = (await connection.execute(query.order_by(turns.c.created_at))).all()
        found = [await evidence_of(connection, row.turn_id, row.evidence_revision) for row in rows]
    return [evidence for evidence in found if evidence is not None]


async def settle(
    store: Store,
    evidence: Evidence,
    verdict: Verdict,
    *,
    method: str | None,
    standing: str | None = None,
    takes_back: str | None = None,
) -> str | None:
    """Write a verdict and, if `method` is given, its lesson; `standing` becomes standing feedback of the subject, and
    its feedback `takes_back` stands no longer (once: an older verdict on the turn that took back has done it).

    One transaction; a verdict or lesson that is there already stays as it is. An older revision's lesson that nobody
    has used is dropped as superseded, an older revision's standing feedback is retracted unless it is said again.
    Returns the lesson's id.
    """
    turn, now = evidence.transcript.turn, time.time()
    if (verdict.turn_id, verdict.revision) != (turn.turn_id, evidence.revision):
        raise ValueError(
            f"the verdict is on turn {verdict.turn_id} revision {verdict.revision}, the evidence on turn "
            f"{turn.turn_id} revision {evidence.revision}; they must be the same"
        )
    lesson_id = _lesson_id(turn.turn_id, evidence.revision, method) if method else None
    async with store.write() as connection:
        judged = select(turns.c.judged_revision).where(turns.c.turn_id == turn.turn_id).with_for_update()
        newest = ((await connection.execute(judged)).scalar_one_or_none() or 0) <= evidence.revision
        if takes_back:
            await _take_back(connection, turn, verdict, takes_back, now)
        await _insert_verdict(connection, verdict, now)
        if newest:
            done = update(turns).where(turns.c.turn_id == turn.turn_id)
            await connection.execute(done.values(judged_revision=evidence.revision, judge_lease_until=None))
            await _set_standing(connection, turn, standing, now)
        if lesson_id and await _said_before(connection, verdict):
            lesson_id = None
        if lesson_id:
            row = {
                "lesson_id": lesson_id,
                "policy_id": turn.policy_id,
                "target_id": turn.turn_id,
                "revision": evidence.revision,
                "method": method,
                "state": "ready",
                "created_at": now,
            }
            await connection.execute(insert(connection, lessons).on_conflict_do_nothing(), row)
        await drop_superseded(connection, lessons.c.target_id == turn.turn_id)
    return lesson_id


async def _said_before(connection: AsyncConnection, verdict: Verdict) -> bool:
    """Whether an earlier revision's verdict says the same and its lesson waits or was used: a follow-up that is sent
    twice teaches once."""
    earlier = verdicts.alias("earlier")
    its_lesson = (lessons.c.target_id == earlier.c.turn_id) & (lessons.c.revision == earlier.c.revision)
    query = (
        select(lessons.c.lesson_id)
        .join(earlier, its_lesson)
        .join(verdicts, (verdicts.c.turn_id == earlier.c.turn_id) & (verdicts.c.revision == verdict.revision))
        .where(verdicts.c.turn_id == verdict.turn_id, earlier.c.revision < verdict.revision)
        .where(_says_the_same(earlier, verdicts), lessons.c.state != "dropped")
    )
    return (await connection.execute(query.limit(1))).first() is not None


def _says_the_same(a: FromClause, b: FromClause) -> ColumnElement[bool]:
    return and_(*(a.c[name].is_not_distinct_from(b.c[name]) for name in ("score", "hint", "source")))


def _lesson_id(target_id: str, revision: int, method: str) -> str:
    """The same lesson has the same id, whoever settles it and however often."""
    return hashlib.sha256(f"{target_id}\0{revision}\0{method}".encode()).hexdigest()[:32]


async def _insert_verdict(connection: AsyncConnection, verdict: Verdict, now: float) -> None:
    row = {
        "turn_id": verdict.turn_id,
        "revision": verdict.revision,
        "source": verdict.source,
        "score": verdict.score,
        "hint": verdict.hint,
        "related": verdict.related,
        "reason": verdict.reason,
        "created_at": now,
    }
    await connection.execute(insert(connection, verdicts).on_conflict_do_nothing(), row)


async def _set_standing(connection: AsyncConnection, turn: Turn, standing: str | None, now: float) -> None:
    """What this turn makes standing is `standing` and nothing else."""
    mine = (preferences.c.turn_id == turn.turn_id) & preferences.c.retracted_at.is_(None)
    other = mine if standing is None else mine & (preferences.c.text != standing)
    await connection.execute(update(preferences).where(other).values(retracted_at=now))
    if standing is None:
        return
    row = {
        "preference_id": uuid4().hex,
        "tenant_id": turn.tenant_id,
        "policy_id": turn.policy_id,
        "subject": subject_of(turn),
        "turn_id": turn.turn_id,
        "text": standing,
        "created_at": now,
    }
    again = insert(connection, preferences).on_conflict_do_update(
        index_elements=["policy_id", "tenant_id", "subject", "text"],
        set_={"turn_id": turn.turn_id, "retracted_at": None},
    )
    await connection.execute(again, row)


async def _take_back(connection: AsyncConnection, turn: Turn, verdict: Verdict, text: str, now: float) -> None:
    """Retract a standing feedback of the turn's subject, unless a verdict on the same grounds did so before."""
    same = (verdicts.c.turn_id == turn.turn_id) & (verdicts.c.reason == verdict.reason)
    if (await connection.execute(select(verdicts.c.revision).where(same).limit(1))).first() is not None:
        return
    standing = standing_of(turn) & (preferences.c.text == text)
    await connection.execute(update(preferences).where(standing).values(retracted_at=now))


# ----------------------------------------------------------------------------------------------- the learner


async def waiting(store: Store, base_hash: str, owner: str, n: int, *, min_age_s: float = 0.0) -> list[str]:
    """Policies on this base that `owner` could lease and of which `claim_lessons` would give lessons, that with the
    oldest one first. What was claimed by a learner that holds its policy no more counts as ready."""
    now = time.time()
    query = (
        select(lessons.c.policy_id)
        .join(policies, policies.c.policy_id == lessons.c.policy_id)
        .where(policies.c.base_hash == base_hash, free_for(owner, now), lessons.c.state.in_(["ready", "claimed"]))
        .group_by(lessons.c.policy_id)
        .having(or_(func.count() >= n, func.min(lessons.c.created_at) <= now - min_age_s))
        .order_by(func.min(lessons.c.created_at), lessons.c.policy_id)
    )
    async with store.read() as connection:
        return list((await connection.execute(query)).scalars())


async def claim_lessons(store: Store, lease: Lease, n: int, *, min_age_s: float = 0.0) -> list[Lesson]:
    """Up to n ready lessons of the lease's policy, oldest first, marked claimed by its epoch; lessons claimed by an
    older epoch are ready again. Returns [] while fewer than n are ready and the oldest is younger than `min_age_s`.
    A lesson whose turn was deleted, or whose tenant learns no more, is dropped. Raises LeaseLost."""
    mine = lessons.c.policy_id == lease.policy_id
    orphaned = mine & (lessons.c.state == "claimed") & (lessons.c.claim_epoch < lease.epoch)
    ready = or_(mine & (lessons.c.state == "ready"), orphaned)
    oldest = select(lessons.c.lesson_id, lessons.c.created_at).where(ready)
    oldest = oldest.order_by(lessons.c.created_at, lessons.c.lesson_id).limit(n)
    async with store.read() as connection:
        there = (await connection.execute(oldest)).all()
        if not there or (len(there) < n and there[0].created_at > time.time() - min_age_s):
            return []
    async with store.write() as connection:
        await hold(connection, lease)
        await make_ready(connection, orphaned)
        claimed = list((await connection.execute(oldest)).scalars())
        taken = update(lessons).where(lessons.c.lesson_id.in_(claimed))
        await connection.execute(taken.values(state="claimed", claim_epoch=lease.epoch))
    async with store.read() as connection:
        found = await lessons_of(connection, claimed)
        silent = set((await connection.execute(_silent())).scalars())
    kept = []
    for lesson_id, lesson in zip(claimed, found, strict=True):
        if lesson is None:
            await drop(store, lease, lesson_id, DropReason.RETRACTED, "its turn is not there any more")
        elif lesson.evidence.transcript.turn.tenant_id in silent:
            await drop(store, lease, lesson_id, DropReason.RETRACTED, "its tenant does not learn any more")
        else:
            kept.append(lesson)
    return kept


def _silent() -> Select[Any]:
    """Tenants that do not learn."""
    return select(tenants.c.tenant_id).where(tenants.c.learn.is_(False))


async def claim_replays(store: Store, lease: Lease, n: int, seed: int) -> list[Lesson]:
    """Up to n lessons that the serving lineage has used, drawn at random by `seed` from the newest ten thousand."""
    standing_use = (lesson_uses.c.lesson_id == lessons.c.lesson_id) & lesson_uses.c.returned_at.is_(None)
    used = select(lessons.c.lesson_id).where(
        lessons.c.policy_id == lease.policy_id,
        lessons.c.state == "used",
        select(lesson_uses).where(standing_use).exists(),
    )
    newest = used.order_by(lessons.c.created_at.desc(), lessons.c.lesson_id).limit(REPLAY_POOL)
    async with store.read() as connection:
        pool = sorted((await connection.execute(newest)).scalars())
        drawn = random.Random(seed).sample(pool, min(n, len(pool)))
        found = await lessons_of(connection, drawn)
    return [lesson for lesson in found if lesson is not None]


async def drop(store: Store, lease: Lease, lesson_id: str, reason: DropReason, detail: str = "") -> None:
    """Say, once and for good, why a lesson is not trained on. A lesson that is dropped already stays as it is.

    Raises LeaseLost under an older epoch, LookupError for a lesson that the lease's policy has not, or has used.
    """
    this = (lessons.c.lesson_id == lesson_id) & (lessons.c.policy_id == lease.policy_id)
    async with store.write() as connection:
        await hold(connection, lease)
        if await drop_where(connection, this & lessons.c.state.in_(["ready", "claimed"]), reason, detail):
            return
        state = (await connection.execute(select(lessons.c.state).where(this))).scalar_one_or_none()
        if state != "dropped":
            raise LookupError(
                f"lesson {lesson_id} of policy {lease.policy_id} is {state or 'not there'}: it cannot be dropped"
            )


async def pending(store: Store, policy_id: str) -> int:
    """How much of what was said is on its way: turns not judged, lessons not used or dropped, releases not examined."""
    unjudged = turns.c.policy_id == policy_id, turns.c.evidence_revision > turns.c.judged_revision
    waiting = lessons.c.policy_id == policy_id, lessons.c.state.in_(["ready", "claimed"])
    unexamined = releases.c.policy_id == policy_id, releases.c.state.in_(["staged", "examining", "canary"])
    async with store.read() as connection:
        counts = [
            (await connection.execute(select(func.count()).select_from(table).where(*where))).scalar_one()
            for table, where in ((turns, unjudged), (lessons, waiting), (releases, unexamined))
        ]
    return sum(counts)


async def release_lessons(store: Store, lease: Lease, lesson_ids: Sequence[str]) -> None:
    """Give claimed lessons back unused. No error if the lease is lost: whoever has it now takes them over."""
    claimed = and_(lessons.c.state == "claimed", lessons.c.claim_epoch == lease.epoch)
    mine = and_(lessons.c.lesson_id.in_(list(lesson_ids)), lessons.c.policy_id == lease.policy_id, claimed)
    async with store.write() as connection:
        await make_ready(connection, mine)


# ------------------------------------------------------------------------------------------- inside a transaction


async def make_ready(connection: AsyncConnection, which: ColumnElement[bool]) -> None:
    """These lessons may be claimed again, except where a newer verdict made them void meanwhile."""
    back = update(lessons).where(which).values(state="ready", claim_epoch=None).returning(lessons.c.lesson_id)
    if ids := list((await connection.execute(back)).scalars()):
        await drop_superseded(connection, lessons.c.lesson_id.in_(ids))


async def drop_superseded(connection: AsyncConnection, which: ColumnElement[bool]) -> None:
    """Drop the ready ones of these lessons of whose turns a newer verdict says something else."""
    own, newer = verdicts.alias("own"), verdicts.alias("newer")
    its_own = (own.c.turn_id == lessons.c.target_id) & (own.c.revision == lessons.c.revision)
    since = (newer.c.turn_id == lessons.c.target_id) & (newer.c.revision > lessons.c.revision)
    otherwise = select(newer.c.turn_id).where(since, its_own, not_(_says_the_same(own, newer)))
    void = and_(which, lessons.c.state == "ready", otherwise.exists())
    await drop_where(connection, void, DropReason.SUPERSEDED, "newer evidence was judged otherwise")


async def drop_where(
    connection: AsyncConnection, which: ColumnElement[bool], reason: DropReason, detail: str = ""
) -> int:
    """How many lessons were dropped, each with a row that says why."""
    dropping = update(lessons).where(which).values(state="dropped", claim_epoch=None)
    dropped = (await connection.execute(dropping.returning(lessons.c.lesson_id, lessons.c.policy_id))).all()
    rows = [
        {
            "drop_id": uuid4().hex,
            "lesson_id": row.lesson_id,
            "policy_id": row.policy_id,
            "reason": reason.value,
            "detail": detail,
            "created_at": time.time(),
        }
        for row in dropped
    ]
    if rows:
        await connection.execute(drops.insert(), rows)
    return len(rows)
