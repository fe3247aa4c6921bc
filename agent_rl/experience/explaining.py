"""One turn explained: what was recorded, what followed it, what came of it, and why. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Table, case, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_rl.experience.records import follows
from agent_rl.experience.rows import jsonable
from agent_rl.experience.store import Store, transcript_of
from agent_rl.experience.tables import (
    checkpoints,
    drops,
    feedback,
    lesson_uses,
    lessons,
    preferences,
    releases,
    sessions,
    tenants,
    turns,
    verdicts,
)
from agent_rl.types import ReleaseState, Transcript

Row = dict[str, Any]
CONTENT = ("prompt_ids", "response_ids", "behavior_logprobs", "kept_mass", "messages", "answer", "tools", "sampling")
LEFT_OUT = "left out: the request said `store: false`"
NEVER = {
    "aborted": "its answer was broken off",
    "error": "the engine failed in the middle of its answer",
    "x-train": "its request said that it must not be",
    "store": "its request said `store: false`, and the tenant learns nothing from such",
}


async def explain(store: Store, turn_id: str) -> Row | None:
    """All that is known of a turn, as JSON; None if it or a part of its past is not there.

    `turn` is the record as it lies in SQL, `messages` and `prompt_ids` are the whole request. `followed_by` are all
    children, `follows` among them says which ones count. `releases` hold what its lessons taught: those of the
    checkpoints that used them, and of what was made from these. `why` says in one sentence what became of it. Of a turn
    that is not retrievable, and of what was said of it in one, the content is None and `content` says so.
    """
    async with store.read() as connection:
        transcript = await transcript_of(connection, turn_id)
        if transcript is None:
            return None
        known = _discreet(transcript, await _known(connection, turn_id))
        learns = select(tenants.c.learn).where(tenants.c.tenant_id == transcript.turn.tenant_id)
        revisions = select(turns.c.evidence_revision, turns.c.judged_revision).where(turns.c.turn_id == turn_id)
        silent = (await connection.execute(learns)).scalar_one_or_none() is False
        evidence, judged = (await connection.execute(revisions)).one()
        closed = select(sessions.c.closed_at).where(sessions.c.session_id == transcript.turn.session_id)
        closed_at = (await connection.execute(closed)).scalar_one_or_none()
    return {
        **_recorded(transcript),
        **known,
        "session_closed_at": closed_at,
        "evidence_revision": evidence,
        "judged_revision": judged,
        "why": why(transcript.turn.no_lesson, known, silent=silent, evidence=evidence, judged=judged),
    }


def why(no_lesson: str | None, known: Mapping[str, Sequence[Row]], *, silent: bool, evidence: int, judged: int) -> str:
    """What became of a turn, or why nothing can. Pure."""
    if no_lesson in NEVER:
        return f"It can never be a lesson: {NEVER[no_lesson]}."
    if use := next((use for use in known["uses"] if use["kind"] == "fresh" and use["returned_at"] is None), None):
        return f"It was learned in step {use['step']}; {_serving(known['releases'])}."
    if silent:
        return "It is no lesson: its tenant does not learn."
    if evidence > judged:
        return "What followed it waits for the judge."
    states = {lesson["state"] for lesson in known["lessons"]}
    if "claimed" in states:
        return "It is being learned."
    if "ready" in states:
        return "Its lesson waits for the learner."
    if known["drops"]:
        drop = known["drops"][-1]
        return f"Its lesson was dropped, {drop['reason']}: {drop['detail'] or 'no more is known'}."
    if known["verdicts"]:
        return f"It is no lesson: {known['verdicts'][-1]['reason'] or 'what followed does not tell how to do better'}."
    if no_lesson == "side":
        return "It is no lesson: a request beside the conversation, which nothing followed."
    return "It is no lesson yet: nothing followed it." if no_lesson is None else f"It can never be one: {no_lesson}."


def _serving(holding: Sequence[Row]) -> str:
    if not holding:
        return "no release holds it"
    live = next((release for release in holding if release["state"] == ReleaseState.LIVE), None)
    if live:
        return f"release {live['release_id']}, which is live, holds it"
    return f"release {holding[-1]['release_id']}, which is {holding[-1]['state']}, holds it"


def _recorded(transcript: Transcript) -> Row:
    turn = jsonable(transcript.turn)
    whole = {"messages": jsonable(transcript.messages), "prompt_ids": list(transcript.prompt_ids)}
    if not transcript.turn.retrievable:
        turn |= dict.fromkeys(CONTENT)
        whole = dict.fromkeys(whole)
    return {
        "turn": turn,
        **whole,
        "content": "given" if transcript.turn.retrievable else LEFT_OUT,
        "session_rule": transcript.turn.session_rule,
        "fork_reason": transcript.turn.fork_reason,
    }


def _discreet(transcript: Transcript, known: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Without the words that verdicts and standing feedback took from turns that are not retrievable."""
    if transcript.turn.retrievable and all(child["retrievable"] for child in known["followed_by"]):
        return known
    spoken = {"verdicts": "hint", "standing": "text"}
    hidden = {table: [{**row, column: None} for row in known[table]] for table, column in spoken.items()}
    dropped = [{**row, "detail": ""} for row in known["drops"]]
    return {**known, **hidden, "drops": dropped}


async def _known(connection: AsyncConnection, turn_id: str) -> dict[str, list[Row]]:
    async def rows(table: Table, where: ColumnElement[bool]) -> list[Row]:
        query = select(table).where(where).order_by(table.c.created_at)
        return [
            {str(name): value for name, value in row.items()} for row in (await connection.execute(query)).mappings()
        ]

    its_lessons = await rows(lessons, lessons.c.target_id == turn_id)
    ids = [row["lesson_id"] for row in its_lessons]
    uses = await rows(lesson_uses, lesson_uses.c.lesson_id.in_(ids))
    trained = [use["checkpoint_id"] for use in uses if use["returned_at"] is None]
    return {
        "followed_by": await _children(connection, turn_id),
        "feedback": await rows(feedback, feedback.c.turn_id == turn_id),
        "standing": await rows(preferences, preferences.c.turn_id == turn_id),
        "verdicts": await rows(verdicts, verdicts.c.turn_id == turn_id),
        "lessons": its_lessons,
        "uses": uses,
        "drops": await rows(drops, drops.c.lesson_id.in_(ids)),
        "releases": await rows(releases, releases.c.checkpoint_id.in_(_made_from(trained))),
    }


async def _children(connection: AsyncConnection, turn_id: str) -> list[Row]:
    """Every turn that goes back to this one, and whether it counts as what followed."""
    child = turns.alias("child")
    columns = [child.c[name] for name in ("turn_id", "created_at", "no_lesson", "fork_reason", "retrievable")]
    counts = case((follows(child, turns), True), else_=False).label("follows")
    query = select(*columns, counts).join(turns, child.c.parent_id == turns.c.turn_id)
    query = query.where(turns.c.turn_id == turn_id).order_by(child.c.created_at, child.c.turn_id)
    return [{str(name): value for name, value in row.items()} for row in (await connection.execute(query)).mappings()]


def _made_from(checkpoint_ids: Sequence[str]) -> Any:
    """These checkpoints and all that descend from them, as a subquery."""
    line = select(checkpoints.c.checkpoint_id).where(checkpoints.c.checkpoint_id.in_(checkpoint_ids))
    made = line.cte("made", recursive=True)
    made = made.union(select(checkpoints.c.checkpoint_id).where(checkpoints.c.parent_id == made.c.checkpoint_id))
    return select(made.c.checkpoint_id)
