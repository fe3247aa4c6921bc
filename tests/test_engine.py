"""How the client reads an engine's events, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent_rl.engine_answers import (
    AnswerReader,
    EngineError,
    needed,
)
from agent_rl.types import Finish, Grammar, Sampling


def sent(ids: list[int], total: int, finish: dict[str, Any] | None = None, **meta: Any) -> bytes:
    entries = [(-float(i), i, None) for i in ids]
    said = {
        "completion_tokens": total,
        "finish_reason": finish,
        "weight_version": "base",
        "output_token_logprobs": entries,
    }
    return json.dumps({"output_ids": ids, "meta_info": said | meta}).encode()


@pytest.mark.parametrize(
    "together",
    [
        [sent([1], 1), sent([1, 2], 2), sent([1, 2, 3], 3, {"type": "length"}, cached_tokens=9)],
        [sent([1], 1), sent([2], 2), sent([3], 3, {"type": "length"}, cached_tokens=9)],
    ],
    ids=["each repeats what came before", "each only adds"],
)
def test_events_that_come_together_lose_nothing(together: list[bytes]) -> None:
    reader = AnswerReader(None, Sampling(3))
    chunks = [reader.read(event) for event in needed(together)]
    assert [i for chunk in chunks for i in chunk.ids] == [1, 2, 3]
    assert [p for chunk in chunks for p in chunk.logprobs] == [-1.0, -2.0, -3.0]
    assert (chunks[-1].finish, chunks[-1].cached_tokens) == (Finish.LENGTH, 9)


def test_an_error_comes_behind_the_tokens_that_were_sampled() -> None:
    events = needed([sent([1], 1), b'{"error": {"message": "out of memory"}}'])
    assert next(events)["output_ids"] == [1]
    with pytest.raises(EngineError, match="out of memory"):
        next(events)


def test_logprobs_under_a_grammar_are_taken_only_from_a_server_that_says_the_kept_mass() -> None:
    """SGLang's are of the masked distribution."""
    sampling = Sampling(1, grammar=Grammar("regex", "a"))
    assert AnswerReader(None, sampling).read(json.loads(sent([1], 1))).logprobs == (None,)
    ours = json.loads(sent([1], 1, output_token_kept_mass=[0.5]))
    assert AnswerReader(None, sampling).read(ours).logprobs == (-1.0,)
