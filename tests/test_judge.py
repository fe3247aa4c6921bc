"""From evidence to verdicts, and the judge's loop on a real database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from nouns import make_child, make_feedback, make_turn, user

from agent_rl.experience import lineage
from agent_rl.experience.explaining import explain
from agent_rl.experience.lessons import claim_lessons
from agent_rl.experience.store import Store
from agent_rl.judge import judge, judge_batch, run, takes_back, tool_error
from agent_rl.settings import Settings, StoreSettings
from agent_rl.types import Arrival, Evidence, Feedback, Message, Transcript, Turn


def evidence(*followed_by: Message, feedback: tuple[Feedback, ...] = ()) -> Evidence:
    turn = make_turn(messages=(user("What is tea?"),))
    return Evidence(Transcript(turn, turn.prompt_ids, turn.messages), 1, followed_by, feedback, ())


def verdict(*followed_by: Message, **feedback: Any) -> tuple[str, int | None, str | None]:
    """(source, score, hint) of what followed and of one feedback with these fields."""
    given = (make_feedback(**{"comment": None, **feedback}),) if feedback else ()
    found, _ = judge(evidence(*followed_by, feedback=given))
    return found.source, found.score, found.hint


# ----------------------------------------------------------------------------------------------- conversation


def test_a_complaint_with_an_instruction() -> None:
    found, standing = judge(evidence(user("Too long. Please answer in one short sentence.")))
    assert (found.turn_id, found.revision, found.source, found.score, found.related) == ("t1", 1, "rules", -1, True)
    assert found.hint == "Too long. Please answer in one short sentence."
    assert standing == "Please answer in one short sentence."


def test_nothing_followed_says_nothing() -> None:
    found, standing = judge(evidence())
    assert (found.score, found.hint, found.related, standing) == (None, None, False, None)


@pytest.mark.parametrize(
    ("content", "failed"),
    [
        ("Traceback (most recent call last):\n  File …\nKeyError: 'a'", True),
        ("ValueError: bad", True),
        ("error: unknown option --foo", True),
        ("bash: foo: command not found", True),
        ("cat: x: No such file or directory", True),
        ("Process exited with exit code 1", True),
        ("exit status: 127", True),
        ("== 2 failed, 3 passed in 0.1s ==", True),
        ("FAILED tests/test_a.py::test_b", True),
        ('{"error": "not found"}', True),
        ('{"isError": true}', True),
        ("5 passed, 0 failed", False),
        ("exit code 0", False),
        ('{"error": null, "rows": 3}', False),
        ("no errors found", False),
        ("The Error Handling chapter begins here", False),
        ("found 10 files", False),
    ],
)
def test_tool_errors(content: str, failed: bool) -> None:
    assert tool_error(content) is failed
    assert verdict(Message("tool", content)) == (("rules", -1, content) if failed else ("rules", None, None))


def test_the_end_of_a_long_tool_error_is_the_hint() -> None:
    _, score, hint = verdict(Message("tool", "x" * 3000 + "\nKeyError: 'a'"))
    assert score == -1
    assert hint is not None
    assert len(hint) == 2000
    assert hint.endswith("KeyError: 'a'")


# --------------------------------------------------------------------------------------------------- feedback


@pytest.mark.parametrize(
    ("feedback", "expected"),
    [
        ({"value": 1.0}, (1, None)),
        ({"value": -0.5}, (-1, None)),
        ({"value": 0.0}, (0, None)),
        ({"label": "thumbs_up"}, (1, None)),
        ({"label": "Thumbs down"}, (-1, None)),
        ({"label": "-1"}, (-1, None)),
        ({"label": "purple"}, (None, None)),
        ({"value": -1.0, "comment": "Use metric units."}, (-1, "Use metric units.")),
        ({"value": 1.0, "comment": "Short and clear."}, (1, None)),
        ({"comment": "Too long."}, (-1, "Too long.")),
        ({"comment": "The user lives in Berlin."}, (None, "The user lives in Berlin.")),
        ({"correction": "Tea is a drink."}, (-1, 'A better answer would be: "Tea is a drink."')),
    ],
)
def test_explicit_feedback_is_a_verdict_already(
    feedback: dict[str, object], expected: tuple[int | None, str | None]
) -> None:
    assert verdict(**feedback) == ("feedback", *expected)


def test_feedback_goes_before_the_follow_up_which_may_say_why() -> None:
    too_long = user("Too long.")
    assert verdict(too_long, value=1.0) == ("feedback", 1, None)
    assert verdict(too_long, value=-1.0) == ("feedback", -1, "Too long.")
    assert verdict(user("Thanks!"), value=-1.0) == ("feedback", -1, None)


def test_newer_feedback_counts_and_retracted_feedback_does_not() -> None:
    old = make_feedback("f1", value=-1.0, comment=None, created_at=1.0)
    new = make_feedback("f2", value=1.0, comment=None, created_at=2.0)
    gone = make_feedback("f3", value=-1.0, comment=None, created_at=3.0, retracted=True)
    assert judge(evidence(feedback=(new, old)))[0].score == 1
    assert judge(evidence(feedback=(new, gone)))[0].score == 1
    assert judge(evidence(feedback=(gone,)))[0].source == "rules"


def test_an_instruction_in_a_comment_stands() -> None:
    assert (
        judge(evidence(feedback=(make_feedback(comment="Please use metric units"),)))[1] == "Please use metric units."
    )


def test_taking_back_in_words_or_in_a_comment() -> None:
    assert takes_back(evidence(user("Never mind the short answers.")))
    assert takes_back(evidence(feedback=(make_feedback(comment="Forget that."),)))
    assert not takes_back(evidence(user("What is coffee?")))


# ------------------------------------------------------------------------------------------------------- loop


async def say(store: Store, settings: Settings, parent: Turn | None, turn_id: str, text: str) -> Turn:
    """One more turn of a conversation, recorded, and everything judged that can be."""
    changes: dict[str, Any] = {"api_key_id": "k", "subject": "anna", "messages": (user(text),)}
    if parent and (past := await store.transcript(parent.turn_id)):
        changes |= {"parent_id": parent.turn_id, "created_at": parent.created_at + 1}
        changes |= {"shared_len": len(past.prompt_ids) + 2, "shared_messages": len(past.messages) + 1}
    turn = make_turn(turn_id, **changes)
    seq = await store.watermark("j") + 1
    await store.record([Arrival("j", seq, turn)])
    while await judge_batch(store, settings):
        pass
    return turn


@pytest.fixture
async def settings(store: Store) -> Settings:
    await store.ensure_tenant("acme", "Acme")
    return Settings()


async def lessons_of(store: Store) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """(turn, hint, what stands now) of every lesson."""
    lease = await lineage.acquire(store, "p1", "test", 60)
    assert lease is not None
    return [(x.turn_id, x.verdict.hint, x.evidence.standing) for x in await claim_lessons(store, lease, 10)]


@pytest.fixture
async def policy(store: Store, settings: Settings) -> str:
    return (await lineage.ensure_policy(store, "default", "p1", "b" * 64)).policy_id


async def test_a_complaint_becomes_a_lesson_and_praise_does_not(store: Store, settings: Settings, policy: str) -> None:
    first = await say(store, settings, None, "t1", "What is tea?")
    second = await say(store, settings, first, "t2", "Too long. Please answer in one short sentence.")
    await say(store, settings, second, "t3", "Thanks!")
    hint, standing = "Too long. Please answer in one short sentence.", "Please answer in one short sentence."
    assert await lessons_of(store) == [("t1", hint, (standing,))]


async def test_taking_back_ends_the_latest_instruction_once(store: Store, settings: Settings, policy: str) -> None:
    turn = await say(store, settings, None, "t1", "What is tea?")
    for i, text in enumerate(
        ["Use metric units.", "No emojis.", "Never mind the emojis, forget that.", "No lists."], 2
    ):
        turn = await say(store, settings, turn, f"t{i}", text)
    seq = await store.watermark("j") + 1
    late = make_feedback(
        turn_id="t3", comment=None, label="purple", created_at=300.0
    )  # a new revision of what took back
    await store.record([Arrival("j", seq, late)])
    while await judge_batch(store, settings):
        pass
    assert await lessons_of(store) == [
        ("t1", "Use metric units.", ("Use metric units.", "No lists.")),
        ("t2", "No emojis.", ("Use metric units.", "No lists.")),
        ("t4", "No lists.", ("Use metric units.", "No lists.")),
    ]


async def test_the_role_judges_what_comes_and_stops_when_told(
    store: Store, settings: Settings, policy: str, tmp_path: Path
) -> None:
    stop = asyncio.Event()
    url = f"sqlite+aiosqlite:///{tmp_path / 'agent-rl.db'}"
    role = asyncio.create_task(run(Settings(store=StoreSettings(database=url)), stop))
    turn = make_turn("t1")
    child = make_child(turn, "t2", "Be brief.")
    await store.record([Arrival("j", 1, turn), Arrival("j", 2, child)])
    for _ in range(200):
        if found := await lessons_of(store):
            break
        await asyncio.sleep(0.02)
    stop.set()
    await asyncio.wait_for(role, 5)
    assert found == [("t1", "Be brief.", ("Be brief.",))]


async def test_the_role_closes_what_is_idle(store: Store, settings: Settings, tmp_path: Path) -> None:
    await store.record([Arrival("j", 1, make_turn("t1"))])
    url = f"sqlite+aiosqlite:///{tmp_path / 'agent-rl.db'}"
    stop = asyncio.Event()
    role = asyncio.create_task(run(Settings(store=StoreSettings(database=url, session_idle_s=1.0)), stop))
    for _ in range(200):
        known = await explain(store, "t1") or {}
        if known["session_closed_at"]:
            break
        await asyncio.sleep(0.02)
    stop.set()
    await asyncio.wait_for(role, 5)
    assert known["why"] == "It is no lesson: the session ended and nothing followed."
