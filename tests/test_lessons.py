"""What the judge claims and settles and the learner claims, drops and gives back, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from nouns import answer, make_checkpoint, make_child, make_feedback, make_step, make_turn, make_verdict, user
from recorded import Recorded
from sqlalchemy import select, update

from agent_rl.experience import lessons, lineage
from agent_rl.experience.store import Store
from agent_rl.experience.tables import drops, preferences, tenants, turns, verdicts
from agent_rl.experience.tables import lessons as lessons_table
from agent_rl.types import DropReason, Evidence, Lease, Lesson, Turn

METHOD = "user_hindsight"


@pytest.fixture
async def record(any_store: Store) -> Recorded:
    await any_store.ensure_tenant("acme", "Acme")
    return Recorded(any_store)


async def judged(
    store: Store, standing: str | None = None, method: str | None = METHOD, hint: str = "be short"
) -> list[str]:
    """Claim everything and settle it; the lessons' ids. A `{revision}` in the hint makes each say something else."""
    found = await lessons.claim_evidence(store, 10, 60.0)
    verdicts = [make_verdict(e, hint=hint.format(revision=e.revision)) for e in found]
    made = [
        await lessons.settle(store, e, verdict, method=method, standing=standing)
        for e, verdict in zip(found, verdicts, strict=True)
    ]
    return [lesson_id for lesson_id in made if lesson_id is not None]


async def leased(store: Store, owner: str = "learner") -> Lease:
    """A lease on the policy p1 of the turns here."""
    await lineage.ensure_policy(store, "default", "p1", "b" * 64)
    lease = await lineage.acquire(store, "p1", owner, 60.0)
    assert lease is not None
    return lease


async def states(store: Store) -> dict[str, str]:
    async with store.read() as connection:
        query = select(lessons_table.c.lesson_id, lessons_table.c.state)
        return {row.lesson_id: row.state for row in await connection.execute(query)}


async def reasons(store: Store) -> list[tuple[str, str]]:
    async with store.read() as connection:
        query = select(drops.c.lesson_id, drops.c.reason).order_by(drops.c.created_at)
        return [(row.lesson_id, row.reason) for row in await connection.execute(query)]


async def turn_with_reply(record: Recorded, turn_id: str = "t1", **changes: object) -> Turn:
    turn = make_turn(turn_id, **{"session_id": f"s-{turn_id}", "subject": "anna", **changes})
    await record(turn, make_child(turn, f"{turn_id}-reply", "shorter, please", subject="anna"))
    return turn


# ---------------------------------------------------------------------------------------------- the evidence


async def test_evidence_is_the_turn_and_what_followed(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1", subject="anna", messages=(user("tea?"),), answer=answer("a hot drink"))
    title = make_child(turn, "t0", "name this chat", created_at=100.5, no_lesson="side")
    later = make_child(turn, "t3", "and longer", created_at=110.0)
    first = make_child(turn, "t2", "shorter, please", created_at=105.0)
    await record(turn, title, later, first, make_feedback("f1", turn_id="t1", comment="hm"))
    await record(make_feedback("f2", turn_id="t1", retracted=True))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert found.transcript.turn == turn
    assert found.revision == 4  # two children that count, two feedbacks
    assert found.followed_by == (user("shorter, please"),)
    assert [said.feedback_id for said in found.feedback] == ["f1"]
    assert found.standing == ()


async def test_a_fork_that_altered_the_answer_says_nothing_of_it(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1", messages=(user("tea?"),))
    again = make_child(turn, "t2", "tea!", created_at=101.0, shared_messages=0, shared_len=0)
    altered = (user("tea?"), answer("an answer of theirs"), user("longer"))
    compacted = make_child(turn, "t3", "", created_at=102.0, shared_messages=0, messages=altered, fork_reason="altered")
    await record(turn, again)
    await record(compacted)
    assert await lessons.claim_evidence(any_store, 10, 60.0) == []
    rendered = make_child(turn, "t4", "shorter", created_at=103.0, shared_len=2, fork_reason="no_bridge")
    await record(rendered)
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert (found.revision, found.followed_by) == (1, (user("shorter"),))


async def test_a_child_counts_whichever_of_the_two_is_recorded_first(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1")
    altered = make_child(turn, "t2", "x", shared_messages=1)
    await record(altered, make_child(turn, "t3", "shorter"))
    await record(turn)
    await record(make_child(turn, "t4", "much shorter"), make_child(turn, "t5", "y", shared_messages=1))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert found.revision == 2


async def test_what_followed_ends_where_another_answer_begins(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1")
    lost = (user("shorter"), answer("an answer that is not recorded"), user("thanks!"))
    await record(turn, make_child(turn, "t2", "", messages=lost, fork_reason="altered"))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert found.followed_by == (user("shorter"),)


async def test_a_side_request_teaches_only_where_something_follows_it(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1")
    title = make_child(turn, "t2", "name this chat", no_lesson="side")
    await record(turn, title, make_child(title, "t3", "and in French", shared_messages=4, no_lesson="side"))
    assert await lessons.claim_evidence(any_store, 10, 60.0) == []
    await record(make_feedback("f1", turn_id="t2", comment="too long a title"))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert (found.transcript.turn.turn_id, found.revision, found.followed_by) == ("t2", 1, ())
    await lessons.settle(any_store, found, make_verdict(found), method=None)
    await record(make_child(title, "t4", "shorter", shared_messages=4, created_at=110.0))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert (found.transcript.turn.turn_id, found.revision, found.followed_by) == ("t2", 2, (user("shorter"),))


async def test_evidence_is_claimed_once_until_its_lease_ends(any_store: Store, record: Recorded) -> None:
    for n in (3, 1, 2):
        await turn_with_reply(record, f"t{n}", created_at=100.0 + n)
    first, second = await lessons.claim_evidence(any_store, 2, 60.0)
    assert [first.transcript.turn.turn_id, second.transcript.turn.turn_id] == ["t1", "t2"]
    (third,) = await lessons.claim_evidence(any_store, 2, 0.01)
    assert third.transcript.turn.turn_id == "t3"
    await asyncio.sleep(0.05)
    assert [e.transcript.turn.turn_id for e in await lessons.claim_evidence(any_store, 5, 60.0)] == ["t3"]
    assert await lessons.claim_evidence(any_store, 5, 60.0) == []


async def test_two_judges_never_claim_the_same_turn(any_store: Store, record: Recorded) -> None:
    for n in range(8):
        await turn_with_reply(record, f"t{n}")
    claims = await asyncio.gather(*(lessons.claim_evidence(any_store, 3, 60.0) for _ in range(4)))
    ids = [evidence.transcript.turn.turn_id for claim in claims for evidence in claim]
    assert len(ids) == len(set(ids))


async def test_what_cannot_teach_is_marked_judged_in_passing(any_store: Store, record: Recorded) -> None:
    await any_store.ensure_tenant("silent", "Silent")
    async with any_store.write() as connection:
        await connection.execute(update(tenants).where(tenants.c.tenant_id == "silent").values(learn=False))
    await turn_with_reply(record, "t1", no_lesson="aborted")
    await turn_with_reply(record, "t2", tenant_id="silent")
    assert await lessons.claim_evidence(any_store, 10, 60.0) == []
    async with any_store.read() as connection:
        query = select(turns.c.judged_revision).where(turns.c.turn_id.in_(["t1", "t2"]))
        assert (await connection.execute(query)).scalars().all() == [1, 1]


async def test_a_turn_waits_for_its_past(any_store: Store, record: Recorded) -> None:
    root = make_turn("t0")
    turn = make_child(root, "t1", "and?")
    await record(turn, make_child(turn, "t2", "shorter", shared_messages=4, shared_len=9))
    assert await lessons.claim_evidence(any_store, 10, 0.01) == []
    await record(root)
    await asyncio.sleep(0.05)
    assert [e.transcript.turn.turn_id for e in await lessons.claim_evidence(any_store, 10, 60.0)] == ["t0", "t1"]


# ---------------------------------------------------------------------------------------------- the verdicts


async def test_settling_twice_is_harmless(any_store: Store, record: Recorded) -> None:
    await turn_with_reply(record)
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    once = await lessons.settle(any_store, found, make_verdict(found), method=METHOD)
    twice = await lessons.settle(any_store, found, make_verdict(found, score=1, hint="other"), method=METHOD)
    assert once == twice == "904e999c1ec251eee25ab3c5910b3845"  # printf 't1\0001\000user_hindsight' | sha256sum
    async with any_store.read() as connection:
        assert (await connection.execute(select(verdicts.c.score, verdicts.c.hint))).all() == [(-1, "be short")]
    assert await states(any_store) == {once: "ready"}
    assert await lessons.claim_evidence(any_store, 10, 60.0) == []


async def test_a_verdict_on_something_else_is_refused(any_store: Store, record: Recorded) -> None:
    await turn_with_reply(record)
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    with pytest.raises(ValueError, match="the verdict is on turn t1 revision 7, the evidence on turn t1 revision 1"):
        await lessons.settle(any_store, found, replace(make_verdict(found), revision=7), method=METHOD)


async def test_newer_evidence_supersedes_a_lesson_that_nobody_used(any_store: Store, record: Recorded) -> None:
    await turn_with_reply(record)
    (old,) = await judged(any_store, hint="be short, {revision}")
    await record(make_feedback(turn_id="t1"))
    (new,) = await judged(any_store, hint="be short, {revision}")
    assert await states(any_store) == {old: "dropped", new: "ready"}
    assert await reasons(any_store) == [(old, "superseded")]


async def test_a_judge_that_comes_too_late_makes_nothing_ready(any_store: Store, record: Recorded) -> None:
    await turn_with_reply(record)
    (late,) = await lessons.claim_evidence(any_store, 10, 0.0)
    await record(make_feedback(turn_id="t1"))
    (new,) = await judged(any_store, standing="new wish", hint="be short, {revision}")
    old = await lessons.settle(any_store, late, make_verdict(late), method=METHOD, standing="old wish")
    assert await states(any_store) == {old: "dropped", new: "ready"}
    assert await standing(any_store) == ["new wish"]


async def standing(store: Store) -> list[str]:
    async with store.read() as connection:
        query = select(preferences.c.text).where(preferences.c.retracted_at.is_(None))
        return list((await connection.execute(query.order_by(preferences.c.created_at))).scalars())


async def evidence_after(store: Store, record: Recorded, turn_id: str, **changes: object) -> Evidence:
    await turn_with_reply(record, turn_id, **changes)
    (found,) = await lessons.claim_evidence(store, 10, 60.0)
    return found


async def test_standing_feedback_is_the_subjects_own_and_said_once(any_store: Store, record: Recorded) -> None:
    for turn_id, wish in (("t1", "be short"), ("t2", "no jargon"), ("t3", "be short")):
        found = await evidence_after(any_store, record, turn_id)
        await lessons.settle(any_store, found, make_verdict(found), method=None, standing=wish)
    found = await evidence_after(any_store, record, "t4")
    assert found.standing == ("be short", "no jargon")
    await lessons.settle(any_store, found, make_verdict(found), method=None)
    found = await evidence_after(any_store, record, "t5", subject="ben")
    assert found.standing == ()
    await lessons.settle(any_store, found, make_verdict(found), method=None, standing="in rhyme")
    keyed = await evidence_after(any_store, record, "t6", subject=None, api_key_id="k1")
    await lessons.settle(any_store, keyed, make_verdict(keyed), method=None, standing="of the key")
    keyed = await evidence_after(any_store, record, "t7", subject=None, api_key_id="k1")
    assert keyed.standing == ("of the key",)


async def test_one_name_in_two_tenants_of_a_shared_policy_is_two_subjects(any_store: Store, record: Recorded) -> None:
    await any_store.ensure_tenant("other", "Other")
    for turn_id, tenant_id, before in (("t1", "acme", ()), ("t2", "other", ()), ("t3", "acme", ("be short",))):
        found = await evidence_after(any_store, record, turn_id, tenant_id=tenant_id)
        assert found.standing == before
        await lessons.settle(any_store, found, make_verdict(found), method=None, standing="be short")
    assert (await evidence_after(any_store, record, "t4", tenant_id="other")).standing == ("be short",)


async def test_what_is_taken_back_stands_no_more(any_store: Store, record: Recorded) -> None:
    await record(make_turn("t1"), make_feedback("f1", turn_id="t1", comment="be short"))
    await judged(any_store, standing="be short")
    assert await standing(any_store) == ["be short"]
    await record(make_feedback("f1", turn_id="t1", comment="be short", retracted=True))
    (found,) = await lessons.claim_evidence(any_store, 10, 60.0)
    assert (found.feedback, found.standing) == ((), ("be short",))
    await lessons.settle(any_store, found, make_verdict(found, score=None, hint=None), method=None)
    assert await standing(any_store) == []


# ----------------------------------------------------------------------------------------------- the learner


async def test_lessons_are_claimed_oldest_first_and_once(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    ids = []
    for n in (1, 2, 3):
        await turn_with_reply(record, f"t{n}")
        ids += await judged(any_store, standing=f"wish {n}")
    first, second = await lessons.claim_lessons(any_store, lease, 2)
    assert [first.lesson_id, second.lesson_id] == ids[:2]
    assert (first.turn_id, first.revision, first.method, first.attempts) == ("t1", 1, METHOD, 0)
    assert (first.verdict.score, first.verdict.hint) == (-1, "be short")
    assert first.evidence.followed_by == (user("shorter, please"),)
    assert first.evidence.standing == ("wish 1", "wish 2", "wish 3")  # as it is now
    assert [lesson.lesson_id for lesson in await lessons.claim_lessons(any_store, lease, 2)] == ids[2:]
    assert await lessons.claim_lessons(any_store, lease, 2) == []


async def test_too_few_lessons_wait_for_company_for_a_while(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    await turn_with_reply(record)
    await judged(any_store)
    assert await lessons.claim_lessons(any_store, lease, 2, min_age_s=60.0) == []
    assert len(await lessons.claim_lessons(any_store, lease, 1, min_age_s=60.0)) == 1


async def claimed(store: Store, record: Recorded, lease: Lease) -> Lesson:
    await turn_with_reply(record)
    await judged(store)
    (lesson,) = await lessons.claim_lessons(store, lease, 1)
    return lesson


async def test_a_new_epoch_takes_over_what_a_dead_learner_had_claimed(any_store: Store, record: Recorded) -> None:
    old = await leased(any_store)
    lesson = await claimed(any_store, record, old)
    new = await leased(any_store)
    assert new.epoch == old.epoch + 1
    with pytest.raises(lineage.LeaseLost):
        await lessons.drop(any_store, old, lesson.lesson_id, DropReason.TOO_LONG)
    assert [taken.lesson_id for taken in await lessons.claim_lessons(any_store, new, 1)] == [lesson.lesson_id]
    await lessons.release_lessons(any_store, old, [lesson.lesson_id])  # no longer its to give
    assert await states(any_store) == {lesson.lesson_id: "claimed"}


async def test_a_follow_up_that_is_sent_twice_teaches_once(any_store: Store, record: Recorded) -> None:
    await record(make_turn("t1"), make_feedback("f1", turn_id="t1", comment="be short"))
    (lesson_id,) = await judged(any_store, hint="be short")
    await record(make_feedback("f2", turn_id="t1", comment="be short"))
    assert await judged(any_store, hint="be short") == []
    assert await states(any_store) == {lesson_id: "ready"}  # no newer verdict says otherwise
    lease = await leased(any_store)
    await lessons.claim_lessons(any_store, lease, 1)
    await record(make_feedback("f3", turn_id="t1", comment="be short"))
    assert await judged(any_store, hint="be short") == []
    await lessons.release_lessons(any_store, lease, [lesson_id])
    assert await states(any_store) == {lesson_id: "ready"}


async def test_lessons_are_given_back_unless_superseded_meanwhile(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    lesson = await claimed(any_store, record, lease)
    await lessons.release_lessons(any_store, lease, [lesson.lesson_id])
    assert await states(any_store) == {lesson.lesson_id: "ready"}
    await lessons.claim_lessons(any_store, lease, 1)
    await record(make_feedback(turn_id="t1"))
    (newer,) = await judged(any_store, hint="be short, {revision}")
    assert await states(any_store) == {lesson.lesson_id: "claimed", newer: "ready"}
    await lessons.release_lessons(any_store, lease, [lesson.lesson_id])
    assert await states(any_store) == {lesson.lesson_id: "dropped", newer: "ready"}
    assert await reasons(any_store) == [(lesson.lesson_id, "superseded")]


async def test_a_drop_is_said_once(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    lesson = await claimed(any_store, record, lease)
    await lessons.drop(any_store, lease, lesson.lesson_id, DropReason.TOO_LONG, "2000 tokens")
    await lessons.drop(any_store, lease, lesson.lesson_id, DropReason.STALE)
    assert await reasons(any_store) == [(lesson.lesson_id, "too_long")]
    assert await lessons.claim_lessons(any_store, lease, 1) == []
    with pytest.raises(LookupError, match="is not there: it cannot be dropped"):
        await lessons.drop(any_store, lease, "x", DropReason.STALE)


async def test_a_lesson_whose_turn_was_deleted_is_dropped(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    await turn_with_reply(record)
    (lesson_id,) = await judged(any_store)
    async with any_store.write() as connection:
        await connection.execute(turns.delete())
    assert await lessons.claim_lessons(any_store, lease, 1) == []
    assert await reasons(any_store) == [(lesson_id, "retracted")]


async def test_replays_are_drawn_from_used_lessons_by_seed(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    for n in range(6):
        await turn_with_reply(record, f"t{n}")
    await judged(any_store)
    used = tuple(lesson.lesson_id for lesson in await lessons.claim_lessons(any_store, lease, 5))
    assert await lessons.claim_replays(any_store, lease, 3, seed=1) == []
    await lineage.commit(any_store, lease, make_checkpoint("c1"), [make_step(1, used)], None)
    drawn = [lesson.lesson_id for lesson in await lessons.claim_replays(any_store, lease, 3, seed=1)]
    assert drawn == [lesson.lesson_id for lesson in await lessons.claim_replays(any_store, lease, 3, seed=1)]
    assert len(set(drawn)) == 3
    assert set(drawn) <= set(used)
    assert {lesson.lesson_id for lesson in await lessons.claim_replays(any_store, lease, 9, seed=2)} == set(used)


async def test_the_policy_with_the_oldest_lesson_is_first_and_leased_ones_wait_for_nobody(
    any_store: Store, record: Recorded
) -> None:
    for policy_id in ("p1", "p2", "p3"):
        await lineage.ensure_policy(any_store, "default", policy_id, ("c" if policy_id == "p3" else "b") * 64)
    for n, policy_id in enumerate(("p2", "p1", "p1", "p3"), 1):
        await turn_with_reply(record, f"t{n}", policy_id=policy_id)
        await judged(any_store)

    async def waiting(owner: str = "me", n: int = 1, min_age_s: float = 60.0) -> list[str]:
        return await lessons.waiting(any_store, "b" * 64, owner, n, min_age_s=min_age_s)

    assert await waiting() == ["p2", "p1"]
    assert await waiting(n=2) == ["p1"]  # p2 has one lesson, and that is young
    assert await waiting(n=2, min_age_s=0.0) == ["p2", "p1"]
    lease = await lineage.acquire(any_store, "p2", "other", 60.0)
    assert lease is not None
    assert await waiting() == ["p1"]
    await lessons.claim_lessons(any_store, lease, 1)
    assert await waiting(owner="other") == ["p2", "p1"]  # started again: what it had claimed is ready
    await lineage.release_lease(any_store, lease)
    assert await waiting() == ["p2", "p1"]


async def test_lessons_of_a_tenant_that_learns_no_more_are_dropped(any_store: Store, record: Recorded) -> None:
    lease = await leased(any_store)
    await turn_with_reply(record)
    (lesson_id,) = await judged(any_store)
    async with any_store.write() as connection:
        await connection.execute(update(tenants).values(learn=False))
    assert await lessons.claim_lessons(any_store, lease, 1) == []
    assert await reasons(any_store) == [(lesson_id, "retracted")]
