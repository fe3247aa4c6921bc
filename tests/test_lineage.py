"""Heads, leases, releases and deployments: every move is a compare-and-swap, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from nouns import make_checkpoint, make_release, make_step
from sqlalchemy import func, select, text

from agent_rl.experience import lineage
from agent_rl.experience.store import Store
from agent_rl.experience.tables import audit, checkpoints, lesson_uses, policies, releases, steps
from agent_rl.experience.tables import lessons as lessons_table
from agent_rl.types import BASE_RELEASE, Deployment, ExamReport, Lease, ReleaseState

BASE = "b" * 64
S = ReleaseState


@pytest.fixture
async def lease(any_store: Store) -> Lease:
    """The lease on policy p1, whose ten lessons l0 … l9 are ready."""
    await lineage.ensure_policy(any_store, "default", "p1", BASE)
    async with any_store.write() as connection:
        row = {"policy_id": "p1", "revision": 1, "method": "m", "state": "ready"}
        rows = [{**row, "lesson_id": f"l{n}", "target_id": f"t{n}", "created_at": n} for n in range(10)]
        await connection.execute(lessons_table.insert(), rows)
    return await leased(any_store)


async def leased(store: Store, owner: str = "learner", ttl_s: float = 60.0) -> Lease:
    lease = await lineage.acquire(store, "p1", owner, ttl_s)
    assert lease is not None
    return lease


async def hold(store: Store, lease: Lease, *lesson_ids: str) -> tuple[str, ...]:
    """Claim these lessons for the lease."""
    async with store.write() as connection:
        claim = lessons_table.update().where(lessons_table.c.lesson_id.in_(lesson_ids))
        await connection.execute(claim.values(state="claimed", claim_epoch=lease.epoch))
    return lesson_ids


async def learn(store: Store, lease: Lease, n: int, *lesson_ids: str, parent: str | None = None) -> None:
    """Commit checkpoint c<n> with release r<n>, made from `parent` by these lessons."""
    await hold(store, lease, *lesson_ids)
    checkpoint = make_checkpoint(f"c{n}", parent, step=n, created_at=300.0 + n)
    release = make_release(f"r{n}", f"c{n}", step=n, created_at=300.0 + n)
    await lineage.commit(store, lease, checkpoint, [make_step(n, lesson_ids)], release)


async def promote(store: Store, release_id: str) -> Deployment:
    return await lineage.promote(store, release_id, actor="test", reason="passed", max_attempts=2)


async def rollback(store: Store, to: str | None, max_attempts: int = 2) -> Deployment:
    return await lineage.rollback(store, "p1", to, actor="test", reason="worse", max_attempts=max_attempts)


async def head(store: Store) -> str | None:
    found = await lineage.head(store, "p1")
    return found and found.checkpoint_id


async def release_states(store: Store) -> dict[str, str]:
    return {release.release_id: release.state.value for release in await lineage.releases(store)}


async def lesson_states(store: Store, *ids: str) -> list[tuple[str, int]]:
    columns = lessons_table.c.state, lessons_table.c.attempts
    query = select(*columns).where(lessons_table.c.lesson_id.in_(ids)).order_by(lessons_table.c.lesson_id)
    async with store.read() as connection:
        return [(row.state, row.attempts) for row in await connection.execute(query)]


async def counts(store: Store) -> tuple[int, ...]:
    async with store.read() as connection:
        return tuple(
            [
                (await connection.execute(select(func.count()).select_from(table))).scalar_one()
                for table in (checkpoints, steps, lesson_uses, releases)
            ]
        )


# ------------------------------------------------------------------------------------------ policies and leases


async def test_a_policy_is_made_once_with_its_base_serving(any_store: Store) -> None:
    made = await lineage.ensure_policy(any_store, "default", "p1", BASE)
    assert (made.policy_id, made.tenant_id, made.name, made.head) == ("p1", "default", "p1", None)
    assert await lineage.ensure_policy(any_store, "default", "p1", BASE) == made
    assert await any_store.deployment("p1") == Deployment("p1", BASE_RELEASE, 1)
    other = await lineage.ensure_policy(any_store, "acme", "p1", BASE)
    assert (other.policy_id, other.name) == ("acme~p1", "p1")
    assert await any_store.policies("acme") == [other]
    assert await any_store.policies() == [made, other]
    with pytest.raises(ValueError, match="was made on the base bbbbbbbbbbbb, this one is cccccccccccc"):
        await lineage.ensure_policy(any_store, "default", "p1", "c" * 64)
    with pytest.raises(ValueError, match="cannot have '~'"):
        await lineage.ensure_policy(any_store, "default", "acme~p1", BASE)


async def test_one_holds_the_lease_until_it_ends(any_store: Store) -> None:
    await lineage.ensure_policy(any_store, "default", "p1", BASE)
    first = await leased(any_store, "a", 0.05)
    assert first.epoch == 1
    assert await lineage.acquire(any_store, "p1", "b", 60.0) is None
    await asyncio.sleep(0.1)
    renewed = await lineage.renew(any_store, first, 0.05)  # late, but nobody took it
    assert (renewed.epoch, renewed.expires_at > first.expires_at) == (1, True)
    await asyncio.sleep(0.1)
    second = await leased(any_store, "b")
    assert second.epoch == 2
    with pytest.raises(lineage.LeaseLost, match="the lease of a on policy p1 has epoch 1; b holds epoch 2"):
        await lineage.renew(any_store, first, 60.0)
    await lineage.release_lease(any_store, first)  # not its own any more: nothing changes
    assert await lineage.acquire(any_store, "p1", "a", 60.0) is None
    await lineage.release_lease(any_store, second)
    assert (await leased(any_store, "a")).epoch == 3
    with pytest.raises(LookupError, match="there is no policy 'p9'"):
        await lineage.acquire(any_store, "p9", "a", 60.0)


async def test_of_many_that_want_the_lease_one_gets_it(any_store: Store) -> None:
    await lineage.ensure_policy(any_store, "default", "p1", BASE)
    taken = await asyncio.gather(*(lineage.acquire(any_store, "p1", f"o{n}", 60.0) for n in range(5)))
    assert len([one for one in taken if one is not None]) == 1


# ---------------------------------------------------------------------------------------------------- forwards


async def test_a_commit_moves_everything_together(any_store: Store, lease: Lease) -> None:
    used = await hold(any_store, lease, "l0", "l1")
    made = [make_step(1, ("l0",)), make_step(2, ("l1",), replay_ids=("l0",))]
    checkpoint = make_checkpoint("c1", step=2)
    await lineage.commit(any_store, lease, checkpoint, made, make_release("r1", "c1"))
    assert await lineage.head(any_store, "p1") == checkpoint
    assert await lesson_states(any_store, *used) == [("used", 0), ("used", 0)]
    assert [release.release_id for release in await lineage.staged(any_store, "p1")] == ["r1"]
    async with any_store.read() as connection:
        columns = lesson_uses.c.lesson_id, lesson_uses.c.step, lesson_uses.c.kind
        uses = (await connection.execute(select(*columns).order_by(lesson_uses.c.step, lesson_uses.c.lesson_id))).all()
        metrics = (await connection.execute(select(steps.c.metrics).where(steps.c.step == 1))).scalar_one()
    assert uses == [("l0", 1, "fresh"), ("l0", 2, "replay"), ("l1", 2, "fresh")]
    assert (metrics["loss"], metrics["values"]) == (0.5, {"kl": 0.25})
    before = await counts(any_store)
    await lineage.commit(any_store, lease, checkpoint, made, make_release("r1", "c1"))  # the answer was lost
    assert await counts(any_store) == before == (1, 2, 3, 1)


async def test_a_learner_that_wakes_too_late_changes_nothing(any_store: Store, lease: Lease) -> None:
    used = await hold(any_store, lease, "l0")
    await leased(any_store)
    with pytest.raises(lineage.LeaseLost):
        await lineage.commit(any_store, lease, make_checkpoint("c1"), [make_step(1, used)], make_release("r1", "c1"))
    assert await counts(any_store) == (0, 0, 0, 0)
    assert await head(any_store) is None
    assert await lesson_states(any_store, "l0") == [("claimed", 0)]


async def test_a_commit_from_another_head_changes_nothing(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l0")
    await hold(any_store, lease, "l1")
    for parent in (None, "c9"):
        with pytest.raises(lineage.HeadMoved, match="the head of policy p1 is c1: load it and start again"):
            await lineage.commit(any_store, lease, make_checkpoint("c2", parent), [make_step(2, ("l1",))], None)
    assert await counts(any_store) == (1, 1, 1, 1)
    assert await lesson_states(any_store, "l1") == [("claimed", 0)]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([make_step(1, ("l0", "l5"))], r"lessons \['l5'\] are not claimed by epoch 1"),
        ([make_step(1, ("l0",)), make_step(2, ("l0",))], r"lessons \['l0'\] would be used afresh twice"),
    ],
)
async def test_a_lesson_is_used_afresh_once_and_by_its_holder(
    any_store: Store, lease: Lease, made: list[object], message: str
) -> None:
    await hold(any_store, lease, "l0")
    with pytest.raises(ValueError, match=message):
        await lineage.commit(any_store, lease, make_checkpoint("c1"), made, None)  # type: ignore[arg-type]
    assert await counts(any_store) == (0, 0, 0, 0)


async def test_metrics_that_are_no_numbers_are_kept_as_none(any_store: Store, lease: Lease) -> None:
    await lineage.commit(any_store, lease, make_checkpoint("c1"), [replace(make_step(1), loss=float("nan"))], None)
    async with any_store.read() as connection:
        assert (await connection.execute(select(steps.c.metrics))).scalar_one()["loss"] is None


# ---------------------------------------------------------------------------------------------------- releases


async def test_a_release_changes_state_only_from_where_it_is_expected(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l0")
    assert not await lineage.set_state(any_store, "r1", S.CANARY, expect=[S.EXAMINING])
    assert await lineage.set_state(any_store, "r1", S.EXAMINING, expect=[S.STAGED, S.EXAMINING], reasons=["its turn"])
    assert [(r.state, r.reasons) for r in await lineage.staged(any_store, "p1")] == [(S.EXAMINING, ("its turn",))]
    assert not await lineage.set_state(any_store, "r9", S.EXAMINING, expect=[S.STAGED])


async def test_releases_are_found_by_an_unambiguous_beginning(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l0")
    await learn(any_store, lease, 10, "l1", parent="c1")
    assert [release.release_id for release in await lineage.releases(any_store, "p1")] == ["r10", "r1"]
    assert [release.release_id for release in await lineage.releases(any_store, limit=1)] == ["r10"]
    found = await lineage.find_release(any_store, "r1")
    assert found == make_release("r1", "c1", created_at=301.0)
    assert (await lineage.find_release(any_store, "r10")) is not None
    with pytest.raises(ValueError, match="'r' begins 2 releases"):
        await lineage.find_release(any_store, "r")
    assert await lineage.find_release(any_store, "%") is None


async def test_the_last_exam_comes_back_as_it_was(any_store: Store) -> None:
    first = ExamReport("r1", False, ("too short",), {"length": 0.05}, (("tea?", "Thanks."),), 1.5)
    assert await lineage.last_exam(any_store, "r1") is None
    await lineage.add_exam(any_store, first)
    await lineage.add_exam(any_store, replace(first, passed=True, reasons=()))
    assert await lineage.last_exam(any_store, "r1") == replace(first, passed=True, reasons=())


async def test_promotion_is_one_row_and_audited(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l0")
    await learn(any_store, lease, 2, "l1", parent="c1")
    assert await promote(any_store, "r1") == Deployment("p1", "r1", 2)
    assert await promote(any_store, "r2") == Deployment("p1", "r2", 3)
    assert await promote(any_store, "r2") == Deployment("p1", "r2", 3) == await any_store.deployment("p1")
    assert await release_states(any_store) == {"r2": "live", "r1": "retired"}
    async with any_store.read() as connection:
        columns = audit.c.actor, audit.c.action, audit.c.target, audit.c.detail
        rows = (await connection.execute(select(*columns).order_by(audit.c.created_at))).all()
    assert rows == [("test", "promote", "r1", "passed"), ("test", "promote", "r2", "passed")]
    with pytest.raises(LookupError, match="no release 'r9'"):
        await promote(any_store, "r9")


# --------------------------------------------------------------------------------------------------- backwards


async def test_a_rejected_candidate_takes_its_branch_along(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l0")
    await promote(any_store, "r1")
    await learn(any_store, lease, 2, "l1", parent="c1")
    await learn(any_store, lease, 3, "l2", parent="c2")
    await lineage.reject(any_store, "r2", ["off topic"], max_attempts=2)
    assert await head(any_store) == "c1"
    assert await release_states(any_store) == {"r3": "rejected", "r2": "rejected", "r1": "live"}
    by_id = {release.release_id: release.reasons for release in await lineage.releases(any_store)}
    assert by_id == {"r1": (), "r2": ("off topic",), "r3": ("its branch was cut: r2 was rejected",)}
    assert await lesson_states(any_store, "l0", "l1", "l2") == [("used", 0), ("ready", 1), ("ready", 1)]
    assert await any_store.deployment("p1") == Deployment("p1", "r1", 2)
    with pytest.raises(lineage.HeadMoved):
        await learn(any_store, lease, 4, "l3", parent="c3")
    await lineage.reject(any_store, "r2", ["again"], max_attempts=2)
    async with any_store.read() as connection:
        assert (await connection.execute(select(policies.c.lineage))).scalar_one() == 1
    with pytest.raises(ValueError, match="r1 is live: roll it back"):
        await lineage.reject(any_store, "r1", ["x"], max_attempts=2)


async def test_a_lesson_comes_back_only_so_often(any_store: Store, lease: Lease) -> None:
    for n in (1, 2):
        await learn(any_store, lease, n, "l0")
        await lineage.reject(any_store, f"r{n}", ["worse"], max_attempts=2)
        assert await head(any_store) is None
        assert await lesson_states(any_store, "l0") == [("ready", 1) if n == 1 else ("dropped", 2)]
    async with any_store.read() as connection:
        found = (await connection.execute(text("SELECT lesson_id, reason FROM drops"))).all()
        uses = select(func.count()).select_from(lesson_uses).where(lesson_uses.c.returned_at.is_not(None))
        assert (await connection.execute(uses)).scalar_one() == 2
    assert found == [("l0", "cut_off")]


async def test_a_rejected_checkpoint_that_is_made_again_is_a_candidate_again(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l0")
    await lineage.reject(any_store, "r1", ["worse"], max_attempts=3)
    await learn(any_store, lease, 1, "l0")  # the same lessons from the same head, bit by bit
    assert await head(any_store) == "c1"
    (release,) = await lineage.staged(any_store, "p1")
    assert (release.release_id, release.reasons) == ("r1", ())
    assert await lesson_states(any_store, "l0") == [("used", 1)]


async def test_rollback_goes_to_the_release_before(any_store: Store, lease: Lease) -> None:
    for n, parent in ((1, None), (2, "c1"), (3, "c2")):
        await learn(any_store, lease, n, f"l{n}", parent=parent)
        await promote(any_store, f"r{n}")
    await learn(any_store, lease, 4, "l4", parent="c3")
    assert await rollback(any_store, None) == Deployment("p1", "r2", 5)
    assert await head(any_store) == "c2"
    assert await release_states(any_store) == {"r4": "rejected", "r3": "rolled_back", "r2": "live", "r1": "retired"}
    assert await lesson_states(any_store, "l1", "l2", "l3", "l4") == [("used", 0)] * 2 + [("ready", 1)] * 2
    assert await rollback(any_store, None) == Deployment("p1", "r1", 6)
    assert await rollback(any_store, None) == Deployment("p1", BASE_RELEASE, 7)
    assert await head(any_store) is None
    with pytest.raises(ValueError, match="base serves policy p1 already: nothing to roll back"):
        await rollback(any_store, None)


async def test_rollback_to_a_named_release_or_the_base(any_store: Store, lease: Lease) -> None:
    for n, parent in ((1, None), (2, "c1"), (3, "c2")):
        await learn(any_store, lease, n, f"l{n}", parent=parent)
        await promote(any_store, f"r{n}")
    with pytest.raises(ValueError, match="'r9' names 0 earlier releases of policy p1; it can go back to"):
        await rollback(any_store, "r9")
    with pytest.raises(ValueError, match="r3 serves policy p1 already"):
        await rollback(any_store, "r3")
    assert await rollback(any_store, "r1") == Deployment("p1", "r1", 5)
    assert await release_states(any_store) == {"r3": "rolled_back", "r2": "rejected", "r1": "live"}
    assert (await rollback(any_store, BASE_RELEASE)).live == BASE_RELEASE
    assert await lesson_states(any_store, "l1", "l2", "l3") == [("ready", 1)] * 3


async def test_a_rejected_release_may_be_promoted_by_hand(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l1")
    await lineage.reject(any_store, "r1", ["strict exam"], max_attempts=2)
    await learn(any_store, lease, 2, "l2")
    assert await promote(any_store, "r1") == Deployment("p1", "r1", 2)
    assert await head(any_store) == "c1"
    assert await release_states(any_store) == {"r2": "rejected", "r1": "live"}
    assert await lesson_states(any_store, "l2") == [("ready", 1)]
    await learn(any_store, lease, 3, "l3", parent="c1")


async def test_a_commit_and_a_rejection_at_once_leave_one_truth(any_store: Store, lease: Lease) -> None:
    await learn(any_store, lease, 1, "l1")
    await hold(any_store, lease, "l2")
    outcome, _ = await asyncio.gather(
        lineage.commit(any_store, lease, make_checkpoint("c2", "c1", step=2), [make_step(2, ("l2",))], None),
        lineage.reject(any_store, "r1", ["worse"], max_attempts=2),
        return_exceptions=True,
    )
    assert await head(any_store) is None
    assert outcome is None or isinstance(outcome, lineage.HeadMoved)
    expected = ("claimed", 0) if outcome else ("ready", 1)
    assert await lesson_states(any_store, "l2") == [expected]
