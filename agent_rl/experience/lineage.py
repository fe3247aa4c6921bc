"""Policies, leases, checkpoints, releases and deployments in SQL: every move of a head is one compare-and-swap."""

from __future__ import annotations

from collections.abc import Sequence

from agent_rl.experience.store import Store
from agent_rl.types import Checkpoint, Deployment, ExamReport, Lease, Policy, Release, ReleaseState, StepMetrics


class LeaseLost(RuntimeError):
    """Somebody else holds the policy now; nothing was written."""


class HeadMoved(RuntimeError):
    """The policy's head is not the checkpoint that this one was made from; nothing was written."""


async def ensure_policy(store: Store, tenant_id: str, name: str, base_hash: str) -> Policy:
    """The policy, made with a deployment of its base if it is not there. Raises ValueError on another base's hash."""
    raise NotImplementedError


async def acquire(store: Store, policy_id: str, owner: str, ttl_s: float) -> Lease | None:
    """Take the lease if it is free, expired or ours, with a new epoch; None if another holds it."""
    raise NotImplementedError


async def renew(store: Store, lease: Lease, ttl_s: float) -> Lease:
    """Raises LeaseLost."""
    raise NotImplementedError


async def release_lease(store: Store, lease: Lease) -> None:
    raise NotImplementedError


async def head(store: Store, policy_id: str) -> Checkpoint | None:
    """None: the base."""
    raise NotImplementedError


async def commit(
    store: Store,
    lease: Lease,
    checkpoint: Checkpoint,
    steps: Sequence[StepMetrics],
    release: Release | None,
) -> None:
    """In one transaction, if the lease's epoch is current and the head is `checkpoint.parent_id`: the checkpoint, its
    steps, a fresh use for every step's lessons and a replay for every replay, the lessons used, the release staged,
    the head moved. Raises LeaseLost or HeadMoved, having written nothing; committing the same again is no error."""
    raise NotImplementedError


async def staged(store: Store, policy_id: str) -> list[Release]:
    """Releases waiting for an exam (staged, or examining since a publisher died), newest first."""
    raise NotImplementedError


async def set_state(
    store: Store, release_id: str, state: ReleaseState, *, expect: Sequence[ReleaseState], reasons: Sequence[str] = ()
) -> bool:
    """Compare-and-swap of a release's state; False if it was in none of the expected ones."""
    raise NotImplementedError


async def add_exam(store: Store, report: ExamReport) -> None:
    raise NotImplementedError


async def promote(store: Store, release_id: str, *, actor: str, reason: str) -> Deployment:
    """One row changes: this release is live, the one before is retired, the generation is raised; audited."""
    raise NotImplementedError


async def reject(store: Store, release_id: str, reasons: Sequence[str], *, max_attempts: int) -> None:
    """Reject a candidate and move the head back: see `cut`."""
    raise NotImplementedError


async def rollback(
    store: Store, policy_id: str, to: str | None, *, actor: str, reason: str, max_attempts: int
) -> Deployment:
    """Make an earlier release live again (None: the one before; BASE_RELEASE: the base) and move the head there: the
    live release is rolled back and the branch behind the target is cut, as in `reject`."""
    raise NotImplementedError


# `reject` and `rollback` cut: the policy's head goes to the checkpoint of the live (or target) release, the lineage
# counter is raised, later checkpoints are marked rejected, their other releases rejected; lessons used afresh only on
# the cut branch are ready again if `attempts + 1 < max_attempts`, else dropped. The learner sees the moved head as
# HeadMoved at its next commit (or by `head`) and reloads.


async def releases(store: Store, policy_id: str | None = None, limit: int = 50) -> list[Release]:
    """Newest first."""
    raise NotImplementedError


async def find_release(store: Store, release_id: str) -> Release | None:
    """By id, or by an unambiguous beginning of one. Raises ValueError where several begin so."""
    raise NotImplementedError


async def last_exam(store: Store, release_id: str) -> ExamReport | None:
    raise NotImplementedError
