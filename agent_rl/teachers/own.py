"""Teachers made of the student's own weights: the base it began from, a slow average of it, or itself.

A teacher says under which weights the teacher view is scored, and what it does after an update. `live` collapses
at a useful learning rate, whatever the objective; `frozen` never learns, so views carry the standing feedback.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import nn


class Weights(Protocol):
    """What a teacher needs of the weights under training."""

    def using(self, name: str) -> AbstractContextManager[nn.Module]: ...

    def track(self, rate: float) -> None: ...


@dataclass(frozen=True, slots=True)
class OwnTeacher:
    set: str  # student | base | ema
    rate: float = 0.0  # how far an EMA follows each update; 0: there is no EMA

    def begin(self, weights: Weights) -> None:
        """The student was loaded, its EMA too if it had one."""
        if self.rate:
            weights.track(0.0)

    def scoring(self, weights: Weights) -> AbstractContextManager[nn.Module]:
        """The model that scores the teacher view, as long as the context lasts."""
        return weights.using(self.set)

    def after_step(self, weights: Weights) -> None:
        if self.rate:
            weights.track(self.rate)


TEACHERS: dict[str, Callable[[float], OwnTeacher]] = {
    "frozen": lambda _: OwnTeacher("base"),
    "ema": lambda rate: OwnTeacher("ema", rate),
    "live": lambda _: OwnTeacher("student"),
}
