"""Releases and their exams in SQL."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from sqlalchemy import RowMapping, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.records import insert
from agent_rl.experience.rows import deployment_of, jsonable, release_of
from agent_rl.experience.store import Store
from agent_rl.experience.tables import checkpoints, deployments, exams
from agent_rl.experience.tables import releases as releases_table
from agent_rl.types import BASE_RELEASE, Deployment, ExamReport, Release, ReleaseState

_newest = select(releases_table).order_by(releases_table.c.created_at.desc(), releases_table.c.release_id)


async def staged(store: Store, policy_id: str) -> list[Release]:
    """Releases waiting for an exam (staged, or examining since a publisher died), newest first."""
    waiting = [ReleaseState.STAGED.value, ReleaseState.EXAMINING.value]
    query = _newest.where(releases_table.c.policy_id == policy_id, releases_table.c.state.in_(waiting))
    async with store.read() as connection:
        return [release_of(row) for row in (await connection.execute(query)).mappings()]


async def in_state(store: Store, policy_id: str, state: ReleaseState) -> list[Release]:
    """Newest first."""
    query = _newest.where(releases_table.c.policy_id == policy_id, releases_table.c.state == state.value)
    async with store.read() as connection:
        return [release_of(row) for row in (await connection.execute(query)).mappings()]


async def deployed(store: Store) -> list[Deployment]:
    """Where something serves beside the untouched base, or waits to; of all other policies there is nothing to do."""
    coming = select(releases_table.c.policy_id).where(releases_table.c.state.in_(["staged", "examining", "canary"]))
    serving = (deployments.c.live_release_id != BASE_RELEASE) | deployments.c.canary_release_id.is_not(None)
    query = select(deployments).where(or_(serving, deployments.c.policy_id.in_(coming)))
    async with store.read() as connection:
        found = (await connection.execute(query.order_by(deployments.c.policy_id))).mappings()
        return [deployment_of(row) for row in found]


async def wanted(store: Store) -> dict[str, list[Release]]:
    """What the engine should have, by policy: the live release, the canary, and the newest adapter that has passed and
    waits for a hand."""
    named = releases_table.c.release_id.in_([deployments.c.live_release_id, deployments.c.canary_release_id])
    passed = releases_table.c.state == ReleaseState.CANARY.value
    query = _newest.join(deployments, deployments.c.policy_id == releases_table.c.policy_id).where(or_(named, passed))
    query = query.add_columns(named.label("named"))
    found: dict[str, list[Release]] = {}
    waiting: set[str] = set()
    async with store.read() as connection:
        for row in (await connection.execute(query)).mappings():
            release = release_of(row)
            if not row["named"]:
                if release.policy_id in waiting or release.kind == "full":
                    continue
                waiting.add(release.policy_id)
            found.setdefault(release.policy_id, []).append(release)
    return found


async def releases(store: Store, policy_id: str | None = None, limit: int = 50) -> list[Release]:
    """Newest first; None: of every policy."""
    query = _newest if policy_id is None else _newest.where(releases_table.c.policy_id == policy_id)
    async with store.read() as connection:
        return [release_of(row) for row in (await connection.execute(query.limit(limit))).mappings()]


async def find_release(store: Store, release_id: str) -> Release | None:
    """By id, or by an unambiguous beginning of one. Raises ValueError where several begin so."""
    begins = releases_table.c.release_id.startswith(release_id, autoescape=True)
    async with store.read() as connection:
        found = [release_of(row) for row in (await connection.execute(_newest.where(begins))).mappings()]
    if exact := [release for release in found if release.release_id == release_id]:
        return exact[0]
    if len(found) > 1:
        raise ValueError(f"{release_id!r} begins {len(found)} releases: {[release.release_id for release in found]}")
    return found[0] if found else None


async def set_state(
    store: Store, release_id: str, state: ReleaseState, *, expect: Sequence[ReleaseState], reasons: Sequence[str] = ()
) -> bool:
    """Compare-and-swap of a release's state; False if it was in none of the expected ones."""
    async with store.write() as connection:
        return await change_state(connection, release_id, state, reasons, expect=expect)


async def add_exam(store: Store, report: ExamReport) -> None:
    row = {
        "exam_id": uuid4().hex,
        "release_id": report.release_id,
        "passed": report.passed,
        "reasons": jsonable(report.reasons),
        "report": jsonable(report),
        "created_at": time.time(),
    }
    async with store.write() as connection:
        await connection.execute(exams.insert(), row)


async def last_exam(store: Store, release_id: str) -> ExamReport | None:
    """A value that was no number when it was measured comes back as NaN."""
    query = select(exams.c.report).where(exams.c.release_id == release_id)
    async with store.read() as connection:
        report = (await connection.execute(query.order_by(exams.c.created_at.desc()).limit(1))).scalar_one_or_none()
    if report is None:
        return None
    values = {name: float("nan") if value is None else value for name, value in report["values"].items()}
    return msgspec.convert({**report, "values": values}, ExamReport)


# ------------------------------------------------------------------------------------------- inside a transaction


async def insert_release(connection: AsyncConnection, release: Release) -> None:
    """Staged, and staged again if its checkpoint is made a second time."""
    row = {**jsonable(release), "state": ReleaseState.STAGED.value, "state_at": time.time()}
    again = {"state": row["state"], "state_at": row["state_at"], "reasons": []}
    statement = insert(connection, releases_table)
    await connection.execute(statement.on_conflict_do_update(index_elements=["checkpoint_id", "kind"], set_=again), row)


async def locked_release(connection: AsyncConnection, release_id: str) -> RowMapping:
    """The release's row, locked. Raises LookupError if there is none."""
    query = select(releases_table).where(releases_table.c.release_id == release_id).with_for_update()
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise LookupError(f"there is no release {release_id!r}; `agent-rl releases list` shows what there is")
    return row


async def change_state(
    connection: AsyncConnection,
    release_id: str,
    state: ReleaseState,
    reasons: Sequence[str] = (),
    *,
    expect: Sequence[ReleaseState] = tuple(ReleaseState),
) -> bool:
    """False if the release was in none of the expected states. Reasons stay those of the last change that had some."""
    values = {"state": state.value, "state_at": time.time(), **({"reasons": list(reasons)} if reasons else {})}
    where = (releases_table.c.release_id == release_id) & releases_table.c.state.in_([one.value for one in expect])
    return (await connection.execute(update(releases_table).where(where).values(values))).rowcount == 1


async def stands(connection: AsyncConnection, checkpoint_id: str) -> bool:
    """True for a checkpoint that is committed and was not cut off."""
    query = select(checkpoints.c.rejected).where(checkpoints.c.checkpoint_id == checkpoint_id)
    return (await connection.execute(query)).scalar_one_or_none() is False
