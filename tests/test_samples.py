"""From a turn and a rendered view to a sample."""

from __future__ import annotations

from typing import Any

import pytest
from nouns import make_turn

from agent_rl.samples import make_sample, reanswer_sample
from agent_rl.types import DropReason, Evidence, Lesson, Sample, Sampling, Span, Transcript, Verdict

VIEW = (1, 8, 9, 2)


def lesson(**turn: Any) -> Lesson:
    made = make_turn("t1", **turn)
    evidence = Evidence(Transcript(made, (6, *made.prompt_ids), ()), 1, (), (), ())
    return Lesson("l1", "p1", "t1", 1, "user_hindsight", Verdict("t1", 1, "rules", -1), evidence)


def test_the_same_response_under_two_prompts() -> None:
    turn = {"prompt_ids": (1, 2), "response_ids": (4, 5), "behavior_logprobs": (-0.5, None)}
    sample = make_sample(lesson(**turn, sampling=Sampling(8, temperature=0.7)), VIEW, max_tokens=6)
    assert sample == Sample(
        lesson_id="l1",
        turn_id="t1",
        prompt_ids=(6, 1, 2),  # the whole past, not what the turn adds
        response_ids=(4, 5),
        teacher_prompt_ids=VIEW,
        response_mask=(True, True),  # the end marker is scored like any other token
        behavior_logprobs=(-0.5, None),
        temperature=0.7,
        score=-1,
    )


def test_tokens_after_an_in_place_swap_are_ratio_free() -> None:
    spans = (Span("r1", 0, 1), Span("r2", 1, 3, kv_mixed=True))
    turn = {"response_ids": (4, 5, 2), "behavior_logprobs": (-0.5, -0.25, -0.1), "spans": spans}
    sample = make_sample(lesson(**turn), VIEW, max_tokens=99)
    assert isinstance(sample, Sample)
    assert sample.behavior_logprobs == (-0.5, None, None)


@pytest.mark.parametrize(("max_tokens", "fits"), [(6, True), (5, False)])  # view of 4 + response of 2
def test_either_prompt_with_the_response_must_fit(max_tokens: int, fits: bool) -> None:
    made = make_sample(lesson(prompt_ids=(1, 2), response_ids=(4, 5)), VIEW, max_tokens=max_tokens)
    assert isinstance(made, Sample) if fits else made is DropReason.TOO_LONG


def test_nothing_was_said() -> None:
    assert make_sample(lesson(response_ids=()), VIEW, max_tokens=99) is DropReason.EMPTY_RESPONSE


def test_a_method_that_needs_behaviour_logprobs() -> None:
    greedy = lesson(response_ids=(4, 5), behavior_logprobs=(None, None))
    assert make_sample(greedy, VIEW, max_tokens=99, needs_behavior=True) is DropReason.NO_LOGPROBS
    assert isinstance(make_sample(greedy, VIEW, max_tokens=99), Sample)


def test_the_teachers_answer_stands_under_the_same_two_prompts() -> None:
    own = make_sample(
        lesson(prompt_ids=(1, 2), response_ids=(4, 5), behavior_logprobs=(-0.5, -0.5)), VIEW, max_tokens=99
    )
    assert isinstance(own, Sample)
    made = reanswer_sample(own, (7, 8, 2), 0.5)
    assert made is not None
    assert (made.prompt_ids, made.teacher_prompt_ids) == (own.prompt_ids, own.teacher_prompt_ids)
    assert (made.response_ids, made.response_mask) == ((7, 8, 2), (True, True, True))
    assert made.behavior_logprobs == (None, None, None)  # the policy never sampled it
    assert (made.weight, made.by_teacher, own.by_teacher) == (0.5, True, False)
    assert reanswer_sample(own, (), 0.5) is None
