"""What the learner asks of whatever runs the updates, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from agent_rl.objectives.rows import Rows
from agent_rl.types import Sample

Loss = Callable[[Rows], Tensor]  # per-token loss [N] of a chunk of rows; sums and normalisation are the backend's


class NotFinite(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the gradients were thrown away and no weight has changed."""


@dataclass(frozen=True, slots=True)
class Score:
    """One sample under student and teacher; means over its response tokens, in nats.

    `mismatch` compares the behaviour logprobs with the student as it is now: that is the serving–training mismatch
    only where this very student sampled the response; else it holds what was learned since as well. None: no token
    has a behaviour logprob.
    """

    tokens: int
    reverse_kl: float
    advantage: float  # log teacher − log student at the sampled tokens
    student_entropy: float
    teacher_entropy: float
    mismatch: Mismatch | None
    loss: float | None = None  # sum over tokens; None: not learned from (scored only, or below `min_gap`)


@dataclass(frozen=True, slots=True)
class Mismatch:
    tokens: int
    k1: float  # mean of log behaviour − log student
    k3: float  # mean of r − 1 − log r, r = student / behaviour
    max_dp: float  # largest |difference of probabilities|


def means(scores: Sequence[Score]) -> dict[str, float]:
    """Over the tokens of all samples; no mismatch where no token has a behaviour logprob."""
    tokens = sum(score.tokens for score in scores)
    names = ("reverse_kl", "advantage", "student_entropy", "teacher_entropy")
    values = {name: sum(getattr(score, name) * score.tokens for score in scores) / tokens for name in names}
    if known := [score.mismatch for score in scores if score.mismatch]:
        count = sum(mismatch.tokens for mismatch in known)
        values["mismatch_k1"] = sum(mismatch.k1 * mismatch.tokens for mismatch in known) / count
        values["mismatch_k3"] = sum(mismatch.k3 * mismatch.tokens for mismatch in known) / count
        values["mismatch_max_dp"] = max(mismatch.max_dp for mismatch in known)
    return values


class Backend(Protocol):
    steps: int  # optimizer steps since the policy's birth

    def load(self, checkpoint: Path | None) -> None:
        """Become a checkpoint, optimizer and all; None: the untouched base with a fresh adapter and optimizer."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Nothing changes."""

    def forward_backward(self, samples: Sequence[Sample], loss: Loss, min_gap: float = 0.0) -> list[Score]:
        """Add the gradient of the summed loss of the samples whose reverse KL is at least `min_gap`."""

    def step(self, lr: float) -> float:
        """One update by the gradients gathered, over the count of their tokens; returns the norm before clipping.
        Raises NotFinite, having changed nothing but the gradients."""

    def save(self, root: Path, parent: str | None, policy: str) -> str:
        """Write a checkpoint of this policy into `root` under its content's hash, which is returned."""

    def export(self, folder: Path) -> str:
        """Write the serving artefact; returns the checksum of the tensors in it."""
