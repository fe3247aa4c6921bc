"""What an objective reads: a chunk of response tokens under student and teacher.

N  response tokens    V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Log-probabilities in fp32, both sides at the temperature that the response was sampled at."""

    student_NV: Tensor  # with gradient
    teacher_NV: Tensor  # without
    token_N: Tensor  # the sampled ids
    behavior_N: Tensor  # log-probability when sampled; NaN: there is none
    by_teacher_N: Tensor  # true where the teacher answered, not the student

    @property
    def student_N(self) -> Tensor:
        """The student's log-probability of each sampled token."""
        return at_token(self.student_NV, self.token_N)

    @property
    def teacher_N(self) -> Tensor:
        return at_token(self.teacher_NV, self.token_N)


def at_token(logprobs_NV: Tensor, token_N: Tensor) -> Tensor:
    return logprobs_NV.gather(-1, token_N.unsqueeze(-1)).squeeze(-1)
