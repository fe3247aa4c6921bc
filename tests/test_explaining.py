"""A turn explained: every state of it has its own reason, and nothing is shown that is not to be given back."""

from __future__ import annotations

from typing import Any

import pytest
from nouns import make_checkpoint, make_child, make_feedback, make_release, make_step, make_turn, make_verdict
from recorded import Recorded
from sqlalchemy import update

from agent_rl.experience import lessons, lineage
from agent_rl.experience.closing import close_idle
from agent_rl.experience.explaining import explain
from agent_rl.experience.store import Store
from agent_rl.experience.tables import tenants
from agent_rl.types import DropReason, Lease


@pytest.fixture
async def record(any_store: Store) -> Recorded:
    await any_store.ensure_tenant("acme", "Acme")
    return Recorded(any_store)


@pytest.fixture
async def lease(any_store: Store) -> Lease:
    await lineage.ensure_policy(any_store, "default", "p1", "b" * 64)
    lease = await lineage.acquire(any_store, "p1", "learner", 60.0)
    assert lease is not None
    return lease


async def known(store: Store, turn_id: str = "t1") -> dict[str, Any]:
    found = await explain(store, turn_id)
    assert found is not None
    return found


async def judged(store: Store, method: str | None = "user_hindsight", **verdict: Any) -> None:
    for evidence in await lessons.claim_evidence(store, 10, 60.0):
        await lessons.settle(store, evidence, make_verdict(evidence, **verdict), method=method, standing="be short")


async def test_the_life_of_a_turn_in_its_reasons(any_store: Store, record: Recorded, lease: Lease) -> None:
    turn = make_turn("t1")
    await record(turn)
    assert (await known(any_store))["why"] == "It is no lesson yet: nothing followed it."
    await close_idle(any_store, 60.0)
    found = await known(any_store)
    assert found["why"] == "It is no lesson: the session ended and nothing followed."
    assert found["session_closed_at"] is not None
    await record(make_child(turn, "t2", "shorter"))
    assert (await known(any_store))["why"] == "What followed it waits for the judge."
    await judged(any_store)
    assert (await known(any_store))["why"] == "Its lesson waits for the learner."
    (lesson,) = await lessons.claim_lessons(any_store, lease, 1)
    assert (await known(any_store))["why"] == "It is being learned."
    step, release = make_step(1, (lesson.lesson_id,)), make_release("r1", "c1")
    await lineage.commit(any_store, lease, make_checkpoint("c1"), [step], release)
    assert (await known(any_store))["why"] == "It was learned in step 1; release r1, which is staged, holds it."
    await lineage.commit(
        any_store,
        lease,
        make_checkpoint("c2", "c1", step=2),
        [make_step(2)],
        make_release("r2", "c2", created_at=301.0),
    )
    await lineage.promote(any_store, "r2", actor="test", reason="by hand", max_attempts=2)
    found = await known(any_store)
    assert found["why"] == "It was learned in step 1; release r2, which is live, holds it."
    assert [(row["release_id"], row["state"]) for row in found["releases"]] == [("r1", "staged"), ("r2", "live")]


async def test_everything_that_is_known_of_a_turn(any_store: Store, record: Recorded, lease: Lease) -> None:
    turn = make_turn("t1", session_rule="prefix")
    altered = make_child(turn, "t3", "x", created_at=102.0, shared_messages=0, fork_reason="altered")
    await record(turn, make_child(turn, "t2", "shorter"), altered, make_feedback("f1", turn_id="t1"))
    await judged(any_store)
    found = await known(any_store)
    assert (found["session_rule"], found["fork_reason"], found["content"]) == ("prefix", None, "given")
    assert found["prompt_ids"] == [1, 9, 2]
    assert found["turn"]["response_ids"] == [5, 2]
    assert found["turn"]["behavior_logprobs"] == [-0.5, -0.5]
    assert found["turn"]["spans"] == [{"release": "base", "start": 0, "end": 2, "kv_mixed": False}]
    assert [message["content"] for message in found["messages"]] == ["question of t1"]
    assert [(c["turn_id"], c["follows"], c["fork_reason"]) for c in found["followed_by"]] == [
        ("t2", True, None),
        ("t3", False, "altered"),
    ]
    assert [said["comment"] for said in found["feedback"]] == ["too long"]
    assert [row["text"] for row in found["standing"]] == ["be short"]
    assert [(v["revision"], v["score"], v["hint"]) for v in found["verdicts"]] == [(2, -1, "be short")]
    assert (found["evidence_revision"], found["judged_revision"]) == (2, 2)
    assert (await known(any_store, "t3"))["fork_reason"] == "altered"
    assert (await known(any_store, "t2"))["prompt_ids"] == [1, 9, 2, 5, 2, 7, 7]
    assert await explain(any_store, "nobody") is None


async def test_a_drop_and_a_verdict_without_a_lesson_say_why(any_store: Store, record: Recorded, lease: Lease) -> None:
    turn, other = make_turn("t1"), make_turn("t3", session_id="s3")
    await record(turn, make_child(turn, "t2", "shorter"))
    await judged(any_store)
    (lesson,) = await lessons.claim_lessons(any_store, lease, 1)
    await lessons.drop(any_store, lease, lesson.lesson_id, DropReason.TOO_LONG, "2000 tokens")
    assert (await known(any_store))["why"] == "Its lesson was dropped, too_long: 2000 tokens."
    await record(other, make_child(other, "t4", "thanks"))
    await judged(any_store, method=None, score=1, hint=None, reason="praise")
    assert (await known(any_store, "t3"))["why"] == "It is no lesson: praise."


@pytest.mark.parametrize(
    ("no_lesson", "why"),
    [
        ("x-train", "It can never be a lesson: its request said that it must not be."),
        ("aborted", "It can never be a lesson: its answer was broken off."),
        ("side", "It is no lesson: a request beside the conversation, which nothing followed."),
        ("redacted", "It can never be one: redacted."),
    ],
)
async def test_what_never_teaches_says_why(store: Store, no_lesson: str, why: str) -> None:
    await store.ensure_tenant("acme", "Acme")
    await Recorded(store)(make_turn("t1", no_lesson=no_lesson))
    assert (await known(store))["why"] == why


async def test_a_tenant_that_does_not_learn_is_the_reason(any_store: Store, record: Recorded) -> None:
    turn = make_turn("t1")
    await record(turn, make_child(turn, "t2", "shorter"))
    async with any_store.write() as connection:
        await connection.execute(update(tenants).values(learn=False))
    assert (await known(any_store))["why"] == "It is no lesson: its tenant does not learn."


async def test_what_is_not_retrievable_is_not_shown(any_store: Store, record: Recorded, lease: Lease) -> None:
    turn = make_turn("t1")
    await record(turn, make_child(turn, "t2", "shorter", retrievable=False))
    await judged(any_store)
    (lesson,) = await lessons.claim_lessons(any_store, lease, 1)
    await lessons.drop(any_store, lease, lesson.lesson_id, DropReason.TEACHER_CANNOT, "it does not do: shorter")
    asked, reply = await known(any_store), await known(any_store, "t2")
    assert asked["turn"]["answer"]["content"] == "answer of t1"
    assert "shorter" not in str(asked)
    assert "be short" not in str(asked)  # what the reply said of it
    assert reply["content"] == "left out: the request said `store: false`"
    assert (reply["messages"], reply["prompt_ids"], reply["turn"]["answer"]) == (None, None, None)
    assert "shorter" not in str(reply)
    assert reply["turn"]["session_rule"] == "new"
