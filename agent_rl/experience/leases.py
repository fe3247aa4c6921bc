"""The right to move a policy's head: one learner holds it, and an older epoch changes nothing."""

from __future__ import annotations

import time
from dataclasses import replace

from sqlalchemy import ColumnElement, RowMapping, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.store import Store
from agent_rl.experience.tables import policies
from agent_rl.types import Lease


class LeaseLost(RuntimeError):
    """Somebody else holds the policy now; nothing was written."""


async def acquire(store: Store, policy_id: str, owner: str, ttl_s: float) -> Lease | None:
    """Take the lease if it is free, expired or ours, with a new epoch; None if another holds it.

    Raises LookupError if there is no such policy.
    """
    now = time.time()
    taking = (
        update(policies)
        .where(policies.c.policy_id == policy_id, free_for(owner, now))
        .values(lease_owner=owner, lease_epoch=policies.c.lease_epoch + 1, lease_expires_at=now + ttl_s)
        .returning(policies.c.lease_epoch)
    )
    async with store.write() as connection:
        epoch = (await connection.execute(taking)).scalar_one_or_none()
        if epoch is None:
            await locked_policy(connection, policy_id)
            return None
    return Lease(policy_id, owner, epoch, now + ttl_s)


def free_for(owner: str, now: float) -> ColumnElement[bool]:
    """Policies that nobody else holds."""
    return or_(policies.c.lease_owner.is_(None), policies.c.lease_owner == owner, policies.c.lease_expires_at < now)


async def renew(store: Store, lease: Lease, ttl_s: float) -> Lease:
    """The same lease with a later end. Raises LeaseLost."""
    expires_at = time.time() + ttl_s
    async with store.write() as connection:
        await hold(connection, lease)
        where = policies.c.policy_id == lease.policy_id
        await connection.execute(update(policies).where(where).values(lease_expires_at=expires_at))
    return replace(lease, expires_at=expires_at)


async def release_lease(store: Store, lease: Lease) -> None:
    """Give the lease back; no error if it is lost already."""
    ours = (policies.c.policy_id == lease.policy_id) & (policies.c.lease_epoch == lease.epoch)
    async with store.write() as connection:
        await connection.execute(update(policies).where(ours).values(lease_owner=None, lease_expires_at=None))


async def hold(connection: AsyncConnection, lease: Lease) -> RowMapping:
    """The policy's row, locked to the end of the transaction. Raises LeaseLost unless the lease is the current one.

    A lease that has run out still holds while nobody took it: the epoch fences, not the clock.
    """
    row = await locked_policy(connection, lease.policy_id)
    if (row["lease_owner"], row["lease_epoch"]) != (lease.owner, lease.epoch):
        raise LeaseLost(
            f"the lease of {lease.owner} on policy {lease.policy_id} has epoch {lease.epoch}; "
            f"{row['lease_owner'] or 'nobody'} holds epoch {row['lease_epoch']}: acquire it again"
        )
    return row


async def locked_policy(connection: AsyncConnection, policy_id: str) -> RowMapping:
    """The policy's row, locked. Raises LookupError if there is none."""
    query = select(policies).where(policies.c.policy_id == policy_id).with_for_update()
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise LookupError(f"there is no policy {policy_id!r}; `ensure_policy` makes one")
    return row
