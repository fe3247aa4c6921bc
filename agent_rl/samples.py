"""From a turn and its rendered teacher view to a Sample, or the reason why there is none. Pure, ids only.

The response ids are those that were sampled, the end marker among them where the model set it: stopping is learned
like any other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agent_rl.types import DropReason, Lesson, Sample


def make_sample(
    lesson: Lesson,
    teacher_prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    needs_behavior: bool = False,
    replay: bool = False,
) -> Sample | DropReason:
    """`teacher_prompt_ids` is the view as the model's template renders it; `max_tokens` bounds either prompt with the
    response. EMPTY_RESPONSE, TOO_LONG; NO_LOGPROBS where `needs_behavior` and not one token has a logprob."""
    transcript = lesson.evidence.transcript
    turn = transcript.turn
    response = len(turn.response_ids)
    assert len(turn.behavior_logprobs) == response, f"{turn.turn_id}: a logprob or None per token"
    if not response:
        return DropReason.EMPTY_RESPONSE
    if max(len(transcript.prompt_ids), len(teacher_prompt_ids)) + response > max_tokens:
        return DropReason.TOO_LONG
    if needs_behavior and all(logprob is None for logprob in turn.behavior_logprobs):
        return DropReason.NO_LOGPROBS
    mixed = [span for span in turn.spans if span.kv_mixed]
    behavior = [
        None if any(span.start <= i < span.end for span in mixed) else logprob
        for i, logprob in enumerate(turn.behavior_logprobs)
    ]
    return Sample(
        lesson_id=lesson.lesson_id,
        turn_id=lesson.turn_id,
        prompt_ids=transcript.prompt_ids,
        response_ids=turn.response_ids,
        teacher_prompt_ids=tuple(teacher_prompt_ids),
        response_mask=(True,) * response,
        behavior_logprobs=tuple(behavior),
        temperature=turn.sampling.temperature,
        score=lesson.verdict.score,
        replay=replay,
    )


def reanswer_sample(own: Sample, response_ids: Sequence[int], weight: float) -> Sample | None:
    """The teacher's own answer under the view of `own`, to be learned under the student's prompt; None if it is empty.

    It was sampled by nobody's policy but the teacher's, so it has no behaviour logprobs.
    """
    if not response_ids:
        return None
    n = len(response_ids)
    return replace(
        own,
        response_ids=tuple(response_ids),
        response_mask=(True,) * n,
        behavior_logprobs=(None,) * n,
        temperature=1.0,
        weight=weight,
        by_teacher=True,
    )
