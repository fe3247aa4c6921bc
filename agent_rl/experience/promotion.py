"""What serves: promotion, rejection and rollback, each one transaction that keeps head and deployment together.

`reject` and `rollback` cut: the policy's head goes back to the checkpoint of the live (or target) release, the lineage
counter is raised, checkpoints off the line to it are marked rejected, and so are their releases; lessons used afresh
on what was cut are ready again if `attempts + 1 < max_attempts`, else dropped. The learner sees the moved head as
HeadMoved at its next commit (or by `head`) and reloads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.leases import locked_policy
from agent_rl.experience.lessons import drop_where, make_ready
from agent_rl.experience.releases import change_state, locked_release, stands
from agent_rl.experience.rows import deployment_of
from agent_rl.experience.store import Store
from agent_rl.experience.tables import audit, checkpoints, deployments, lesson_uses, lessons, policies
from agent_rl.experience.tables import releases as releases_table
from agent_rl.types import BASE_RELEASE, Deployment, DropReason, ReleaseState


async def promote(
    store: Store, release_id: str, *, actor: str, reason: str, max_attempts: int, expect: ReleaseState | None = None
) -> Deployment:
    """One row changes: this release is live, the one before is retired, the generation is raised; audited.

    With `expect`, a release in another state by now is left as it is, and the deployment too. Without, a release that
    was rejected may be promoted as well: the head then moves to its checkpoint and what was learned
    elsewhere meanwhile is cut. Raises LookupError if there is no such release.
    """
    async with store.write() as connection:
        release = await locked_release(connection, release_id)
        await locked_policy(connection, release["policy_id"])
        deployment = await _deployment(connection, release["policy_id"])
        if deployment.live == release_id or (expect and release["state"] != expect.value):
            return deployment
        if not await stands(connection, release["checkpoint_id"]):
            await _cut(connection, release["policy_id"], release["checkpoint_id"], f"{reason} ({actor})", max_attempts)
        if deployment.live != BASE_RELEASE:
            await change_state(connection, deployment.live, ReleaseState.RETIRED)
        await _audit(connection, actor, "promote", release_id, reason)
        return await _serve(connection, deployment, release_id)


# ----------------------------------------------------------------------------------------------- backwards


async def reject(store: Store, release_id: str, reasons: Sequence[str], *, max_attempts: int) -> None:
    """Reject a candidate and move the head back to the live release's checkpoint; rejecting it again changes nothing.

    Raises ValueError for the live release: that is rolled back.
    """
    async with store.write() as connection:
        release = await locked_release(connection, release_id)
        await locked_policy(connection, release["policy_id"])
        deployment = await _deployment(connection, release["policy_id"])
        if deployment.live == release_id:
            raise ValueError(f"release {release_id} is live: roll it back instead of rejecting it")
        if release["state"] == ReleaseState.REJECTED:
            return
        await change_state(connection, release_id, ReleaseState.REJECTED, reasons)
        live = await _checkpoint_id(connection, deployment.live)
        await _cut(connection, release["policy_id"], live, f"{release_id} was rejected", max_attempts)
        if deployment.canary is not None:
            await _serve(connection, deployment, deployment.live)


async def rollback(
    store: Store, policy_id: str, to: str | None, *, actor: str, reason: str, max_attempts: int
) -> Deployment:
    """Make an earlier release live again (None: the one before; BASE_RELEASE: the base) and move the head there: the
    live release is rolled back and the branch behind the target is cut, as in `reject`.

    Raises ValueError where there is nothing earlier, or the target never was live or is live now.
    """
    async with store.write() as connection:
        await locked_policy(connection, policy_id)
        deployment = await _deployment(connection, policy_id)
        target = await _earlier(connection, deployment, to)
        if deployment.live != BASE_RELEASE:
            await change_state(connection, deployment.live, ReleaseState.ROLLED_BACK, [reason])
        await _cut(connection, policy_id, await _checkpoint_id(connection, target), reason, max_attempts)
        await _audit(connection, actor, "rollback", target, f"from {deployment.live}: {reason}")
        return await _serve(connection, deployment, target)


async def _earlier(connection: AsyncConnection, deployment: Deployment, to: str | None) -> str:
    """The release id that a rollback goes to."""
    if deployment.live == (to or BASE_RELEASE):
        raise ValueError(f"{deployment.live} serves policy {deployment.policy_id} already: nothing to roll back")
    if to == BASE_RELEASE:
        return to
    retired = select(releases_table.c.release_id).where(
        releases_table.c.policy_id == deployment.policy_id, releases_table.c.state == ReleaseState.RETIRED.value
    )
    before = list((await connection.execute(retired.order_by(releases_table.c.state_at.desc()))).scalars())
    if to is None:
        return before[0] if before else BASE_RELEASE
    matching = [release_id for release_id in before if release_id.startswith(to)]
    if len(matching) != 1:
        raise ValueError(
            f"{to!r} names {len(matching)} earlier releases of policy {deployment.policy_id}; it can go back to "
            f"{before} or {BASE_RELEASE!r}, and to any other by promotion"
        )
    return str(matching[0])


async def _checkpoint_id(connection: AsyncConnection, release_id: str) -> str | None:
    """The checkpoint of a release; None for the base."""
    query = select(releases_table.c.checkpoint_id).where(releases_table.c.release_id == release_id)
    return None if release_id == BASE_RELEASE else (await connection.execute(query)).scalar_one()


async def _cut(connection: AsyncConnection, policy_id: str, target: str | None, why: str, max_attempts: int) -> None:
    """Move the head to `target` and take back everything that does not lead to it."""
    mine = checkpoints.c.policy_id == policy_id
    query = select(checkpoints.c.checkpoint_id, checkpoints.c.parent_id, checkpoints.c.rejected).where(mine)
    rows = {row.checkpoint_id: row for row in await connection.execute(query)}
    line = set()
    at = target
    while at is not None:
        line.add(at)
        at = rows[at].parent_id
    off = sorted(checkpoint_id for checkpoint_id, row in rows.items() if not row.rejected and checkpoint_id not in line)
    await _mark(connection, off, rejected=True)
    await _mark(connection, sorted(line), rejected=False)
    await _reject_releases(connection, off, why)
    await _return_lessons(connection, off, max_attempts)
    moved = update(policies).where(policies.c.policy_id == policy_id)
    await connection.execute(moved.values(head_checkpoint_id=target, lineage=policies.c.lineage + 1))


async def _mark(connection: AsyncConnection, checkpoint_ids: Sequence[str], *, rejected: bool) -> None:
    where = checkpoints.c.checkpoint_id.in_(checkpoint_ids)
    await connection.execute(update(checkpoints).where(where).values(rejected=rejected))


async def _reject_releases(connection: AsyncConnection, checkpoint_ids: Sequence[str], why: str) -> None:
    """Nothing that was made on a cut branch may serve by itself."""
    final = [ReleaseState.REJECTED.value, ReleaseState.ROLLED_BACK.value]
    query = select(releases_table.c.release_id).where(
        releases_table.c.checkpoint_id.in_(checkpoint_ids), releases_table.c.state.not_in(final)
    )
    for release_id in (await connection.execute(query)).scalars().all():
        await change_state(connection, release_id, ReleaseState.REJECTED, [f"its branch was cut: {why}"])


async def _return_lessons(connection: AsyncConnection, checkpoint_ids: Sequence[str], max_attempts: int) -> None:
    """Take back the uses on a cut branch; the lessons wait again, or are dropped after their last attempt."""
    standing = lesson_uses.c.checkpoint_id.in_(checkpoint_ids) & lesson_uses.c.returned_at.is_(None)
    back = update(lesson_uses).where(standing).values(returned_at=time.time())
    uses = (await connection.execute(back.returning(lesson_uses.c.lesson_id, lesson_uses.c.kind))).all()
    returned = lessons.c.lesson_id.in_([use.lesson_id for use in uses if use.kind == "fresh"])
    await connection.execute(update(lessons).where(returned).values(attempts=lessons.c.attempts + 1))
    spent = lessons.c.attempts >= max_attempts
    await drop_where(connection, returned & spent, DropReason.CUT_OFF, f"used on {max_attempts} branches, all cut")
    await make_ready(connection, returned & ~spent)


async def _deployment(connection: AsyncConnection, policy_id: str) -> Deployment:
    """The policy's, locked; its base where it never had a release."""
    query = select(deployments).where(deployments.c.policy_id == policy_id).with_for_update()
    row = (await connection.execute(query)).mappings().one_or_none()
    return deployment_of(row) if row else Deployment(policy_id, BASE_RELEASE, 0)


async def _serve(connection: AsyncConnection, before: Deployment, live: str) -> Deployment:
    """The one row that changes what serves; a canary ends with it."""
    if live != BASE_RELEASE:
        await change_state(connection, live, ReleaseState.LIVE)
    after = Deployment(before.policy_id, live, before.generation + 1)
    where = deployments.c.policy_id == before.policy_id
    await connection.execute(
        update(deployments)
        .where(where)
        .values(
            live_release_id=live,
            canary_release_id=None,
            canary_share=0.0,
            generation=after.generation,
            updated_at=time.time(),
        )
    )
    return after


async def _audit(connection: AsyncConnection, actor: str, action: str, target: str, detail: str) -> None:
    row = {"audit_id": uuid4().hex, "created_at": time.time(), "actor": actor, "action": action}
    await connection.execute(audit.insert(), {**row, "target": target, "detail": detail})
