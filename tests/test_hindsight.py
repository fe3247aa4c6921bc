"""The teacher's view: what it says, in which order, and what it must never hold."""

from __future__ import annotations

import pytest
from nouns import answer, make_feedback, make_turn, user

from agent_rl.hindsight import TEMPLATES, spoken, teacher_view
from agent_rl.types import DropReason, Evidence, Feedback, Message, TeacherView, Transcript, Verdict

ANSWER = "Tea is a hot drink that people make from the leaves of a plant."


def evidence(*messages: Message, standing: tuple[str, ...] = (), feedback: tuple[Feedback, ...] = ()) -> Evidence:
    turn = make_turn("t1", answer=answer(ANSWER))
    transcript = Transcript(turn, turn.prompt_ids, messages or (user("What is tea?"),))
    return Evidence(transcript, 1, (user("Too long."),), feedback, standing)


def verdict(hint: str | None = "Be short.", source: str = "rules", related: bool = True) -> Verdict:
    return Verdict("t1", 1, source, -1, hint, related)


def view(seen: Evidence, said: Verdict, template: str = "hint") -> tuple[Message, ...]:
    made = teacher_view(seen, said, template)
    assert isinstance(made, TeacherView), made
    assert made.template == f"{template}/2"
    return made.messages


def test_hint_extends_the_last_user_message_and_leaves_the_rest() -> None:
    history = (Message("system", "Be kind."), user("Hello"), answer("Hi."), user("What is tea?"))
    made = view(evidence(*history), verdict())
    assert made[:3] == history[:3]
    assert made[3].role == "user"
    assert made[3].content == "What is tea?\n\nBe short."


def test_hint_goes_to_the_user_even_where_a_tool_spoke_last() -> None:
    history = (user("What is tea?"), answer(""), Message("tool", "a drink", tool_call_id="c1"))
    made = view(evidence(*history), verdict())
    assert "Be short." in made[0].content
    assert made[1:] == history[1:]


def test_plain_is_one_more_user_message() -> None:
    assert view(evidence(), verdict(), "plain") == (user("What is tea?"), user("Be short."))


def test_system_joins_a_system_message_or_makes_one() -> None:
    told = "What the user has asked of your answers: Be short."
    assert view(evidence(), verdict(), "system") == (Message("system", told), user("What is tea?"))
    with_system = evidence(Message("system", "Be kind."), user("What is tea?"))
    assert view(with_system, verdict(), "system")[0] == Message("system", f"Be kind.\n\n{told}")


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_scored_answer_is_never_shown(template: str) -> None:
    seen = evidence(standing=("No lists.",), feedback=(make_feedback(correction="A drink."),))
    assert all(ANSWER not in message.content for message in view(seen, verdict(), template))


@pytest.mark.parametrize("template", TEMPLATES)
def test_standing_feedback_comes_first_each_once_and_the_newest_last(template: str) -> None:
    seen = evidence(standing=("Be short.", "No lists.", "Be kind."))
    shown = "\n".join(message.content for message in view(seen, verdict("Be short. "), template))
    assert "No lists.\nBe kind.\nBe short." in shown
    assert shown.count("Be short.") == 1


def test_comments_count_like_follow_ups() -> None:
    seen = evidence(feedback=(make_feedback("f1", comment="Be short."), make_feedback("f2", comment="No lists.")))
    assert spoken(seen, verdict("Be short.\nNo lists.", "feedback")) == ["Be short.", "No lists."]
    assert spoken(seen, verdict("Start with Aye.")) == ["Start with Aye.", "Be short.", "No lists."]


def test_a_correction_is_shown_as_a_demonstration_the_newest_one() -> None:
    feedback = (
        make_feedback("f1", comment=None, correction="Leaves."),
        make_feedback("f2", comment=None, correction="A drink."),
    )
    quoted = verdict('A better answer would be: "A drink."', "feedback")
    last = view(evidence(feedback=feedback), quoted)[-1].content
    assert last == "What is tea?\n\nA better answer was: A drink."


def test_a_thumb_down_whose_reason_is_in_the_next_message() -> None:
    seen = evidence(feedback=(make_feedback(comment=None, value=-1.0),))
    assert spoken(seen, verdict("Be short.", "feedback")) == ["Be short."]


def test_nothing_to_go_by() -> None:
    assert teacher_view(evidence(), verdict(None)) is DropReason.NO_HINDSIGHT
    assert teacher_view(evidence(), verdict("What about coffee?", related=False)) is DropReason.NO_HINDSIGHT
    assert teacher_view(evidence(standing=("No lists.",)), verdict(None)) is DropReason.NO_HINDSIGHT
    assert teacher_view(evidence(Message("system", "Be kind.")), verdict()) is DropReason.NO_HINDSIGHT


def test_what_was_retracted_is_gone() -> None:
    assert teacher_view(evidence(), verdict("Be short.", "feedback")) is DropReason.RETRACTED
    seen = evidence(feedback=(make_feedback(comment="Be short.", retracted=True),))
    assert spoken(seen, verdict(None)) == []
