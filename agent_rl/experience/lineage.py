"""Policies, checkpoints, releases and deployments in SQL: every move of a head is one compare-and-swap.

Forwards it moves by `commit`, under a lease; backwards by `reject` and `rollback`, which cut (see `promotion.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import and_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.leases import LeaseLost, acquire, hold, locked_policy, release_lease, renew
from agent_rl.experience.promotion import promote, reject, rollback
from agent_rl.experience.records import insert
from agent_rl.experience.releases import (
    add_exam,
    deployed,
    find_release,
    in_state,
    insert_release,
    last_exam,
    releases,
    set_state,
    staged,
    stands,
    wanted,
)
from agent_rl.experience.rows import checkpoint_of, jsonable, policy_of
from agent_rl.experience.store import Store
from agent_rl.experience.tables import checkpoints, deployments, lesson_uses, lessons, policies
from agent_rl.experience.tables import steps as steps_table
from agent_rl.types import BASE_RELEASE, Checkpoint, Lease, Policy, Release, StepMetrics

__all__ = [
    "HeadMoved",
    "LeaseLost",
    "acquire",
    "add_exam",
    "commit",
    "deployed",
    "ensure_policy",
    "find_release",
    "head",
    "in_state",
    "last_exam",
    "promote",
    "reject",
    "release_lease",
    "releases",
    "renew",
    "rollback",
    "set_state",
    "staged",
    "wanted",
]

LONGEST_ID = 64 - 17  # the column's, less what a subject's policy adds


class HeadMoved(RuntimeError):
    """The policy's head is not the checkpoint that this one was made from; nothing was written."""


async def ensure_policy(store: Store, tenant_id: str, name: str, base_hash: str) -> Policy:
    """The policy, made with a deployment of its base if it is not there. Raises ValueError on another base's hash.

    Its id is its name in the tenant `default`, and `tenant~name` elsewhere; a subject's has `:` and 16 letters more.
    """
    policy_id, now = name if tenant_id == "default" else f"{tenant_id}~{name}", time.time()
    if not name.isprintable() or not name or set("~:@/") & set(tenant_id + name):
        complaint = "a tenant or policy cannot have '~', ':', '@' or '/' in its name"
        raise ValueError(f"{complaint} (got {tenant_id!r}, {name!r})")
    if len(policy_id) > LONGEST_ID:
        raise ValueError(f"a policy's id has at most {LONGEST_ID} letters; {policy_id!r} has {len(policy_id)}")
    row = {"policy_id": policy_id, "tenant_id": tenant_id, "name": name, "base_hash": base_hash, "created_at": now}
    async with store.write() as connection:
        await connection.execute(insert(connection, policies).on_conflict_do_nothing(), row)
        await _serve_something(connection, policy_id, now)
        found = await locked_policy(connection, policy_id)
    if found["base_hash"] != base_hash:
        raise ValueError(
            f"policy {policy_id} was made on the base {found['base_hash'][:12]}, this one is {base_hash[:12]}: "
            "serve the model that it was made on, or use another home folder"
        )
    return policy_of(found)


async def _serve_something(connection: AsyncConnection, policy_id: str, now: float) -> None:
    """A policy that has no deployment yet serves its base."""
    serving = {"policy_id": policy_id, "live_release_id": BASE_RELEASE, "generation": 1, "updated_at": now}
    await connection.execute(insert(connection, deployments).on_conflict_do_nothing(), serving)


async def head(store: Store, policy_id: str) -> Checkpoint | None:
    """None: the base."""
    query = select(checkpoints).join(policies, policies.c.head_checkpoint_id == checkpoints.c.checkpoint_id)
    async with store.read() as connection:
        found = (await connection.execute(query.where(policies.c.policy_id == policy_id))).mappings().one_or_none()
        return checkpoint_of(found) if found else None


# ------------------------------------------------------------------------------------------------ forwards


async def commit(
    store: Store,
    lease: Lease,
    checkpoint: Checkpoint,
    steps: Sequence[StepMetrics],
    release: Release | None,
) -> None:
    """In one transaction, if the lease's epoch is current and the head is `checkpoint.parent_id`: the checkpoint, its
    steps, a fresh use for every step's lessons and a replay for every replay, the lessons used, the release staged,
    the head moved. Raises LeaseLost or HeadMoved, having written nothing; committing the same again is no error.

    Raises ValueError for a lesson that the lease does not hold. A checkpoint that was rejected may be made again, bit
    by bit, from lessons that came back: it is then a candidate again.
    """
    async with store.write() as connection:
        if await stands(connection, checkpoint.checkpoint_id):
            return
        policy = await hold(connection, lease)
        if policy["head_checkpoint_id"] != checkpoint.parent_id:
            raise HeadMoved(
                f"checkpoint {checkpoint.checkpoint_id} was made from {checkpoint.parent_id or 'the base'}, the head "
                f"of policy {lease.policy_id} is {policy['head_checkpoint_id'] or 'the base'}: load it and start again"
            )
        await _use_lessons(connection, lease, [lesson_id for step in steps for lesson_id in step.lesson_ids])
        await _insert_checkpoint(connection, lease, checkpoint)
        await _insert_steps(connection, checkpoint, steps)
        if release is not None:
            await _serve_something(connection, lease.policy_id, release.created_at)
            await insert_release(connection, release)
        moved = update(policies).where(policies.c.policy_id == lease.policy_id)
        await connection.execute(moved.values(head_checkpoint_id=checkpoint.checkpoint_id))


async def _use_lessons(connection: AsyncConnection, lease: Lease, lesson_ids: Sequence[str]) -> None:
    if twice := [lesson_id for lesson_id, n in Counter(lesson_ids).items() if n > 1]:
        raise ValueError(f"lessons {twice} would be used afresh twice; a second use is a replay")
    held = and_(
        lessons.c.lesson_id.in_(list(lesson_ids)),
        lessons.c.policy_id == lease.policy_id,
        lessons.c.state == "claimed",
        lessons.c.claim_epoch == lease.epoch,
    )
    used = update(lessons).where(held).values(state="used", claim_epoch=None).returning(lessons.c.lesson_id)
    missing = set(lesson_ids) - set((await connection.execute(used)).scalars())
    if missing:
        raise ValueError(f"lessons {sorted(missing)} are not claimed by epoch {lease.epoch}: claim them before use")


async def _insert_checkpoint(connection: AsyncConnection, lease: Lease, checkpoint: Checkpoint) -> None:
    row = {**jsonable(checkpoint), "lease_epoch": lease.epoch, "rejected": False}
    again = {name: row[name] for name in ("parent_id", "step", "path", "lease_epoch", "rejected", "created_at")}
    statement = insert(connection, checkpoints).on_conflict_do_update(index_elements=["checkpoint_id"], set_=again)
    await connection.execute(statement, row)


async def _insert_steps(connection: AsyncConnection, checkpoint: Checkpoint, made: Sequence[StepMetrics]) -> None:
    policy_id, checkpoint_id, now = checkpoint.policy_id, checkpoint.checkpoint_id, time.time()
    of = {"policy_id": policy_id, "checkpoint_id": checkpoint_id, "created_at": now}
    rows = [{**of, "step": step.step, "metrics": jsonable(step)} for step in made]
    uses = [
        {**of, "use_id": uuid4().hex, "lesson_id": lesson_id, "step": step.step, "kind": kind}
        for step in made
        for kind, lesson_ids in (("fresh", step.lesson_ids), ("replay", step.replay_ids))
        for lesson_id in lesson_ids
    ]
    if rows:
        await connection.execute(insert(connection, steps_table).on_conflict_do_nothing(), rows)
    if uses:
        await connection.execute(lesson_uses.insert(), uses)
