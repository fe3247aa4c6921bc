"""Which state of a release may follow which."""

from __future__ import annotations

import pytest

from agent_rl.release import NEXT, coming_from, may
from agent_rl.types import ReleaseState as S


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        (S.STAGED, S.EXAMINING, True),
        (S.STAGED, S.CANARY, False),  # not without an exam
        (S.STAGED, S.LIVE, True),  # by hand
        (S.EXAMINING, S.EXAMINING, True),  # its publisher died
        (S.EXAMINING, S.CANARY, True),
        (S.CANARY, S.LIVE, True),
        (S.LIVE, S.REJECTED, False),  # it is rolled back
        (S.LIVE, S.ROLLED_BACK, True),
        (S.RETIRED, S.LIVE, True),
        (S.RETIRED, S.ROLLED_BACK, False),
        (S.REJECTED, S.CANARY, False),
        (S.SUPERSEDED, S.EXAMINING, False),
        (S.ROLLED_BACK, S.STAGED, True),  # its checkpoint was made again
    ],
)
def test_transitions(before: S, after: S, allowed: bool) -> None:
    assert may(before, after) is allowed


def test_every_state_has_its_row_and_a_way_to_live() -> None:
    assert set(NEXT) == set(S)
    assert set(coming_from(S.LIVE)) == set(S) - {S.LIVE}
    assert set(coming_from(S.CANARY)) == {S.EXAMINING}
