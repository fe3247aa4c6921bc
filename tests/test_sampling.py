"""How our engine draws a token, and where an answer ends."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import pytest
import torch

from server.engines.contract import SamplingParams
from server.engines.sampling import Draw, Drawn, sample, score
from server.engines.stopping import Stopper

PROBS = [0.5, 0.25, 0.15, 0.1]


def draw(uniform: float = 0.0, **given: Any) -> Draw:
    fixed = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "ratio_free": False, "penalties": {}}
    return Draw(uniform, **(fixed | given))


def drawn(draws: list[Draw], probs: list[float] = PROBS) -> list[Drawn | None]:
    return sample(torch.tensor([[log(p) for p in probs]] * len(draws)), draws)


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.499, 0), (0.501, 1), (0.749, 1), (0.751, 2), (0.899, 2), (0.901, 3), (0.9999, 3)],
)
def test_a_uniform_number_chooses_by_the_cumulative_distribution(uniform: float, token: int) -> None:
    [got] = drawn([draw(uniform)])
    assert got is not None
    assert (got.token, got.kept_mass) == (token, None)
    assert got.logprob == pytest.approx(log(PROBS[token]), abs=1e-6)


@pytest.mark.parametrize(
    ("cut", "kept", "last"),
    [
        ({"top_p": 0.6}, 0.75, 1),
        ({"top_p": 0.01}, 0.5, 0),
        ({"top_k": 3}, 0.9, 2),
        ({"min_p": 0.29}, 0.9, 2),  # keeps what has at least 0.145
        ({"top_k": 3, "top_p": 0.6}, 0.75, 1),
        ({"top_k": 1000}, 1.0, 3),
    ],
)
def test_cuts_keep_a_mass_and_leave_the_logprob_alone(cut: dict[str, Any], kept: float, last: int) -> None:
    [got] = drawn([draw(0.9999, **cut)])
    assert got is not None
    assert got.token == last
    assert got.kept_mass == pytest.approx(kept, abs=1e-6)
    assert got.logprob == pytest.approx(log(PROBS[last]), abs=1e-6)


def test_a_wide_cut_looks_beyond_the_first_candidates() -> None:
    probs = [1 / 5000] * 5000
    [got] = drawn([draw(0.9999, top_p=0.9)], probs)
    assert got is not None
    assert got.kept_mass == pytest.approx(0.9, abs=3e-4)


def test_temperature_penalties_and_kinds_side_by_side() -> None:
    greedy, hot, plain, penalised = drawn(
        [
            draw(temperature=0.0, ratio_free=True),
            draw(0.9999, temperature=2.0),
            draw(0.6),
            draw(0.1, ratio_free=True, penalties={0: 100.0}),
        ]
    )
    assert greedy == Drawn(0, None, None)
    root = [p**0.5 for p in PROBS]
    assert hot is not None
    assert (hot.token, hot.logprob) == (3, pytest.approx(log(root[3] / sum(root)), abs=1e-6))
    assert plain is not None
    assert plain.token == 1
    assert penalised == Drawn(1, None, None)


def allowed(*tokens: int) -> Any:
    return np.isin(np.arange(4), tokens)


def test_a_grammar_masks_and_leaves_the_logprob_alone() -> None:
    plain, cut, greedy, forced, nothing, free = drawn(
        [
            draw(0.9999, allowed=allowed(1, 2)),
            draw(0.9999, top_p=0.6, allowed=allowed(1, 2)),  # 0.25 of 0.4 is more than 0.6 of it
            draw(temperature=0.0, ratio_free=True, allowed=allowed(2, 3)),
            draw(allowed=allowed(3)),
            draw(allowed=allowed()),
            draw(0.9999),
        ]
    )
    assert plain == Drawn(2, pytest.approx(log(0.15), abs=1e-6), pytest.approx(0.4, abs=1e-6))
    assert cut == Drawn(1, pytest.approx(log(0.25), abs=1e-6), pytest.approx(0.25, abs=1e-6))
    assert greedy == Drawn(2, None, None)
    assert forced == Drawn(3, None, pytest.approx(0.1, abs=1e-6))
    assert nothing is None
    assert free == Drawn(3, pytest.approx(log(0.1), abs=1e-6), None)


def test_logits_that_are_not_finite_draw_nothing() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[1, 2] = float("nan"), float("inf")
    bad, worse, good = sample(logits, [draw(), draw(top_k=2), draw()])
    assert (bad, worse) == (None, None)
    assert good is not None


def test_scores_are_log_softmax() -> None:
    assert score(torch.tensor([[0.0, log(3.0)], [0.0, 0.0]]), [1, 0]) == pytest.approx([log(0.75), log(0.5)])


# ------------------------------------------------------------------------------------------- ends of answers


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_stop_string_is_found_where_it_is_complete() -> None:
    stopper = Stopper(SamplingParams(stop=["END"], max_new_tokens=9), eos_ids=[0], decode=text)
    ids = [ord(c) for c in "ENEND"]
    assert [stopper.reason(ids[:n]) for n in range(1, 5)] == [None] * 4
    assert stopper.reason(ids) == {"type": "stop", "matched": "END"}


def test_end_tokens_count_unless_they_are_ignored() -> None:
    params = SamplingParams(stop_token_ids=[7], max_new_tokens=3)
    assert Stopper(params, [0], text).reason([7]) == {"type": "stop", "matched": 7}
    assert Stopper(params, [0], text).reason([5, 0]) == {"type": "stop", "matched": 0}
    ignoring = Stopper(params.model_copy(update={"ignore_eos": True}), [0], text)
    assert ignoring.reason([7, 0]) is None
    assert ignoring.reason([7, 0, 0]) == {"type": "length", "length": 3}
