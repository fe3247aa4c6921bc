"""What is counted about answers, with literal values."""

from __future__ import annotations

import math

import pytest

from agent_rl.monitors import (
    Interval,
    bootstrap,
    compression,
    is_empty,
    non_finite,
    repetition,
    sentences,
    summary,
    wilson,
)
from agent_rl.types import Finish


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three four", 0.0),
        ("one more one more one more", 0.5),  # 4 trigrams, 2 kinds
        ("a a a a a a a a a a a a", 0.9),  # 10 trigrams, 1 kind
        ("A b c a B C", 0.25),  # abc bca cab abc: case does not matter
    ],
)
def test_repetition_is_the_share_of_trigrams_said_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_compression_sees_loops_without_spaces_and_does_not_judge_short_texts() -> None:
    prose = "The train to the coast leaves at seven, crosses a wide river, and arrives a little before noon."
    loop = compression("ha" * 100)
    normal = compression(prose)
    assert loop is not None
    assert normal is not None
    assert loop < 0.1 < 0.6 < normal
    assert compression("ha" * 31) is None


@pytest.mark.parametrize(
    ("text", "empty"), [("", True), (" \n", True), ("...", True), ("🙂", True), ("5", False), ("日", False)]
)
def test_empty_is_no_letter_and_no_digit(text: str, empty: bool) -> None:
    assert is_empty(text) is empty


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("", 0),
        ("...", 0),
        ("Lisbon", 1),
        ("Lisbon.", 1),
        ("It floats. Why? Because!", 3),
        ("Wait... what", 2),
        ("It is 3.5 metres long.", 1),
        ("Dr. Who met Mr. Ray. They ran.", 2),
        ("Use fruit, e.g. apples. Enjoy.", 2),
        ("1. Boil water.\n2. Add tea.", 2),
        ('He said "Go." Then he left.', 2),
        ("We met at 5 p.m.", 1),
        ("J. R. Smith wrote it.", 1),
    ],
)
def test_sentences(text: str, n: int) -> None:
    assert sentences(text) == n


def test_summary_counts_every_answer_once() -> None:
    answers = ["Tea is a drink. It is hot.", "", "one more one more one more"]
    assert summary(answers, [8, 0, 64], [Finish.STOP, Finish.STOP, Finish.LENGTH]) == pytest.approx(
        {
            "length_mean": 24.0,
            "length_median": 8,
            "empty_rate": 1 / 3,
            "repetition": 0.5 / 3,
            "truncation_rate": 1 / 3,
            "sentences": 1.0,
        }
    )


def test_summary_of_nothing_is_an_error_not_zero() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summary([], [], [])
    with pytest.raises(ValueError, match=r"\(1, 2, 1\)"):
        summary(["a"], [1, 2], [Finish.STOP])


def test_bootstrap_holds_its_mean_and_is_repeatable() -> None:
    values = [0.0, 10.0] * 50  # standard error 0.5: about 5 ± 1
    interval = bootstrap(values)
    assert (interval.mean, interval.n) == (5.0, 100)
    assert 3.6 < interval.low < 4.4
    assert 5.6 < interval.high < 6.4
    assert bootstrap(values) == interval
    assert bootstrap([7.0]) == Interval(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one, all finite"):
        bootstrap(values)


def test_wilson() -> None:
    none, half = wilson(0, 10), wilson(5, 10)
    assert none.mean == none.low == 0.0
    assert none.high == pytest.approx(3.8416 / 13.8416)  # z² / (n + z²)
    assert (half.low + half.high) / 2 == pytest.approx(0.5)
    assert half.high == pytest.approx(0.7634, abs=1e-4)
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)


def test_non_finite_names_the_values() -> None:
    assert non_finite({"b": math.nan, "a": -math.inf, "c": 1.0}) == ["a", "b"]
