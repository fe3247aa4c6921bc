"""The life of a release: which state may follow which. Pure; the publisher and the command line ask here.

    staged ─▶ examining ─▶ canary ─▶ live ─▶ retired          what passes
       │          │           │        └───▶ rolled back       what passed and did not prove itself
       └──────────┴───────────┴────────────▶ rejected, superseded

By hand anything may go live. A cut branch rejects what was made on it. The same checkpoint made again is staged again.
"""

from __future__ import annotations

from agent_rl.types import ReleaseState as S

NEXT: dict[S, frozenset[S]] = {
    S.STAGED: frozenset({S.EXAMINING, S.SUPERSEDED, S.REJECTED, S.LIVE}),
    S.EXAMINING: frozenset({S.EXAMINING, S.CANARY, S.SUPERSEDED, S.REJECTED, S.LIVE}),  # again: its publisher died
    S.CANARY: frozenset({S.LIVE, S.SUPERSEDED, S.REJECTED}),
    S.LIVE: frozenset({S.RETIRED, S.ROLLED_BACK}),
    S.RETIRED: frozenset({S.LIVE, S.REJECTED}),
    S.REJECTED: frozenset({S.LIVE, S.STAGED}),
    S.SUPERSEDED: frozenset({S.LIVE, S.REJECTED, S.STAGED}),
    S.ROLLED_BACK: frozenset({S.LIVE, S.STAGED}),
}


def may(before: S, after: S) -> bool:
    """Whether a release in one state may take the other.

    >>> may(S.STAGED, S.CANARY)  # not without an exam
    False
    """
    return after in NEXT[before]


def coming_from(after: S) -> tuple[S, ...]:
    """The states from which a release may take this one: what a compare-and-swap expects."""
    return tuple(before for before in S if may(before, after))
