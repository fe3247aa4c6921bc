"""From evidence to verdicts: what was said of an answer afterwards, and whether it teaches. By rules alone.

Explicit feedback is a verdict already and goes before anything that the conversation says; then come tool results,
then the user's next message. `judge` is pure; `run` is the role around it. A positive verdict makes no lesson: the
method `user_hindsight` learns from what tells how to do better, and praise tells nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from agent_rl.experience import lessons
from agent_rl.experience.closing import close_idle
from agent_rl.experience.store import Store
from agent_rl.followups import Means, Reading, meaning, normalise, read, split
from agent_rl.instructions import obeys, satisfies
from agent_rl.settings import Settings
from agent_rl.types import Evidence, Feedback, Message, Verdict

__all__ = ["judge", "obeys", "run", "satisfies", "takes_back", "tool_error"]

log = logging.getLogger("agent_rl.judge")
T = TypeVar("T")

GOOD = frozenset("good up thumbs_up like positive correct helpful accepted yes +1".split())
BAD = frozenset("bad down thumbs_down dislike negative incorrect wrong unhelpful rejected no -1".split())
TAKES_BACK = "takes back what was asked before"  # one reason for all revisions: `settle` takes back once per turn
SWEEP_S = 5.0  # between two looks for idle sessions
MAX_TOOL_HINT = 2000  # characters of a tool's error; the end is kept, where errors say what they are
TOOL_ERRORS = [
    re.compile(pattern, re.M)
    for pattern in [
        r"^Traceback \(most recent call last\):",
        r"^\s*(?:[A-Z]\w*(?:Error|Exception)|(?i:fatal(?: error)?|error|panic))\s*(?:\[\w+\])?:",
        r"(?i)\b(?:exit|return|status) ?(?:code|status)?[ :=]+(?:-\d+|[1-9]\d*)\b",
        r"(?i)\bcommand not found$|\bno such file or directory$|\bpermission denied$",
        r"\b[1-9]\d* (?:failed|errors?)\b|^FAIL(?:ED)?\b",
        r"\"(?:error|isError|is_error)\"\s*:\s*(?:true|\"[^\"]|\{)",
        r"<tool_use_error>",
    ]
]


# ----------------------------------------------------------------------------------------------------------- pure


def judge(evidence: Evidence) -> tuple[Verdict, str | None]:
    """The verdict on a turn, and the instruction in what followed that holds for other questions too."""
    said, standing = _feedback(evidence)
    then = _followed(evidence)
    if said is None:
        return _verdict(evidence, then, "rules"), then.standing
    if said.hint is None and said.score != 1:  # a thumb down, and the next message says why
        said = replace(said, hint=then.hint)
        standing = standing or then.standing
    return _verdict(evidence, said, "feedback"), standing


def takes_back(evidence: Evidence) -> bool:
    """True where what followed takes back what was asked before: "Never mind the short answers."."""
    comment = _newest(evidence.feedback, lambda f: f.comment)
    return _followed(evidence).takes_back or (comment is not None and read(comment, "").takes_back)


def tool_error(content: str) -> bool:
    """True where a tool's result says that the call failed. An answer of "0 failed" or `"error": null` does not."""
    return any(pattern.search(content) for pattern in TOOL_ERRORS)


def _verdict(evidence: Evidence, reading: Reading, source: str) -> Verdict:
    return Verdict(
        evidence.transcript.turn.turn_id,
        evidence.revision,
        source,
        reading.score,
        reading.hint,
        reading.related,
        TAKES_BACK if takes_back(evidence) else reading.reason,
    )


def _feedback(evidence: Evidence) -> tuple[Reading | None, str | None]:
    """What explicit feedback says, the newest word on each matter, and what of it stands; (None, None) if nothing."""
    value = _newest(evidence.feedback, lambda f: f.value)
    label = _newest(evidence.feedback, lambda f: f.label)
    comment = _newest(evidence.feedback, lambda f: f.comment)
    correction = _newest(evidence.feedback, lambda f: f.correction)
    if value is None and not (label or comment or correction):
        return None, None
    spoken = read(comment, _question(evidence)) if comment else Reading(None)
    score = _score(value, label)
    if score is None:
        score = -1 if correction else spoken.score
    hints = [comment] if comment and score != 1 and not spoken.takes_back else []
    if correction and score != 1:
        hints.append(f'A better answer would be: "{correction}"')
    told = comment is not None and any(meaning(part) is Means.MANNER for part in split(comment))
    standing = spoken.standing if comment and told else None
    return Reading(
        score, "\n".join(hints) or None, normalise(standing) if standing else None, reason="feedback"
    ), standing


def _score(value: float | None, label: str | None) -> int | None:
    """The sign of a number; without one, what a known label means; None where neither says."""
    if value is not None:
        return (value > 0) - (value < 0)
    name = (label or "").strip().lower().replace(" ", "_").replace("-", "_") if label != "-1" else "-1"
    return 1 if name in GOOD else -1 if name in BAD else None


def _followed(evidence: Evidence) -> Reading:
    """What the conversation itself says: tool results first, then the user's next message."""
    failed = [m.content for m in evidence.followed_by if m.role == "tool" and tool_error(m.content)]
    if failed:
        return Reading(-1, failed[0].strip()[-MAX_TOOL_HINT:], reason="a tool failed")
    users = [m.content for m in evidence.followed_by if m.role == "user"]
    if users:
        return read("\n".join(users), _question(evidence))
    if any(m.role == "tool" for m in evidence.followed_by):
        return Reading(None, reason="tools answered without an error")
    return Reading(None, related=False, reason="nothing followed that speaks of it")


def _question(evidence: Evidence) -> str:
    asked: Sequence[Message] = evidence.transcript.messages
    return next((m.content for m in reversed(asked) if m.role == "user"), "")


def _newest(feedback: Sequence[Feedback], field: Callable[[Feedback], T | None]) -> T | None:
    for entry in sorted(feedback, key=lambda f: f.created_at, reverse=True):
        if not entry.retracted and (value := field(entry)) is not None:
            return value
    return None


# ----------------------------------------------------------------------------------------------------------- role


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Judge what is ahead of its verdict, and close what is idle, until told to stop. May run many times beside itself:
    claims are leased, and a session is closed once."""
    store = await Store.open(settings.database_url)
    swept_at = -math.inf
    try:
        while not stop.is_set():
            if time.monotonic() - swept_at >= SWEEP_S:
                while ended := await close_idle(store, settings.store.session_idle_s):
                    log.info("%d idle sessions closed", len(ended))
                swept_at = time.monotonic()
            if not await judge_batch(store, settings):
                await _pause(stop, settings.judge.poll_s)
    finally:
        await store.close()


async def judge_batch(store: Store, settings: Settings) -> int:
    """Claim, judge and settle one batch; returns how many turns it held."""
    claimed = await lessons.claim_evidence(store, settings.judge.batch, settings.judge.lease_s)
    for evidence in claimed:
        verdict, standing = judge(evidence)
        method = settings.learner.method.type if verdict.hint else None
        back = evidence.standing[-1] if evidence.standing and takes_back(evidence) else None
        lesson = await lessons.settle(store, evidence, verdict, method=method, standing=standing, takes_back=back)
        log.info(
            "turn %s: score %s, %s%s", verdict.turn_id, verdict.score, verdict.reason, " → lesson" if lesson else ""
        )
    return len(claimed)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, but not past the end."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
