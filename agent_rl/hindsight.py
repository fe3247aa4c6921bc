"""From evidence to the teacher's view: the request as it was, and what the user said about the answer. Pure.

The view never holds the answer that is scored: a teacher that sees it scores it by copying it, and the sign of the
lesson turns. It does hold the subject's standing feedback, so that a teacher that never learns keeps asking for what
was asked before. Templates carry a version, for a changed wording is another teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from agent_rl.types import DropReason, Evidence, Message, TeacherView, Verdict

Template = Callable[[tuple[Message, ...], str, str | None], tuple[Message, ...] | None]


def teacher_view(evidence: Evidence, verdict: Verdict, template: str = "hint") -> TeacherView | DropReason:
    """What the teacher sees. NO_HINDSIGHT where nothing tells how to do better; RETRACTED where all that did is gone.

    `template` is a name in TEMPLATES.
    """
    said, shown = spoken(evidence, verdict), corrections(evidence)
    if not said and not shown:
        gone = verdict.source == "feedback" and verdict.hint
        return DropReason.RETRACTED if gone else DropReason.NO_HINDSIGHT
    all_said = "\n".join(unique([*evidence.standing, *said]))
    messages = TEMPLATES[template](evidence.transcript.messages, all_said, shown[-1] if shown else None)
    return DropReason.NO_HINDSIGHT if messages is None else TeacherView(messages, f"{template}/2")


def spoken(evidence: Evidence, verdict: Verdict) -> list[str]:
    """What was said about this answer: the hint that the judge found, then comments not retracted, oldest first.

    A verdict from feedback quotes the comments and corrections, so where there are any its hint says nothing more,
    and where all feedback is gone its hint goes with it.
    """
    comments = [f.comment for f in evidence.feedback if f.comment and not f.retracted]
    hint = [verdict.hint] if verdict.hint and verdict.related else []
    if verdict.source == "feedback" and (comments or corrections(evidence) or not evidence.feedback):
        hint = []
    return unique([*hint, *comments])


def corrections(evidence: Evidence) -> list[str]:
    """Answers that the user wrote instead, oldest first."""
    return [f.correction for f in evidence.feedback if f.correction and not f.retracted]


def unique(texts: Iterable[str]) -> list[str]:
    """Each text once, where it was said last."""
    stripped = [text.strip() for text in texts if text.strip()]
    return list(dict.fromkeys(reversed(stripped)))[::-1]


def _hint(messages: tuple[Message, ...], said: str, correction: str | None) -> tuple[Message, ...] | None:
    """What was said, under the question, with no label: a small teacher that reads "the user said" or "note about an
    earlier answer" obeys less (numbered list, 24 questions, SmolLM2-135M: 4 % with such a label, 83 % without) and
    talks about the question ("The answer to this question is: …") instead of answering it."""
    notes = [said] if said else []
    if correction:
        notes.append(f"A better answer was: {correction}")
    return _last_user(messages, lambda content: "\n\n".join([content, *notes]))


def _plain(messages: tuple[Message, ...], said: str, correction: str | None) -> tuple[Message, ...] | None:
    shown = [said] if said else []
    if correction:
        shown.append(f"For example: {correction}")
    return (*messages, Message("user", "\n".join(shown)))


def _system(messages: tuple[Message, ...], said: str, correction: str | None) -> tuple[Message, ...] | None:
    shown = [f"What the user has asked of your answers: {said}"] if said else []
    if correction:
        shown.append(f"An answer that the user was content with: {correction}")
    text = "\n".join(shown)
    if messages and messages[0].role == "system":
        return (replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)


def _last_user(messages: tuple[Message, ...], change: Callable[[str], str]) -> tuple[Message, ...] | None:
    """The messages with the last one of the user changed; None if the user has said nothing."""
    for i in range(len(messages) - 1, -1, -1):
        if messages[i].role == "user":
            changed = replace(messages[i], content=change(messages[i].content))
            return (*messages[:i], changed, *messages[i + 1 :])
    return None


TEMPLATES: dict[str, Template] = {"hint": _hint, "plain": _plain, "system": _system}
