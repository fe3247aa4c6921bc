"""Hindsight self-distillation from what users say next (arXiv 2603.12273, with a frozen teacher by default).

trajectories    the user's own conversations, as they were sampled, once somebody said how to do better; beside each,
                the teacher's own answer to the same request (GKD's mixture of student and teacher sequences,
                arXiv 2306.13649): it shows tokens that the student would never sample, such as the "1." of a list
teacher signal  the same weights under the request and that hindsight, scoring the same response tokens
objective       on the student's answers a divergence of choice, or the sampled-token advantage; on the teacher's
                forward KL
guards          the teacher must be able to do what was asked; a turn on which both already agree is none
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agent_rl.hindsight import teacher_view
from agent_rl.objectives.divergences import forward_kl, jsd, on_student_support, reverse_kl
from agent_rl.objectives.policy_gradient import log_ratio_advantage, policy_gradient, truncated_importance
from agent_rl.objectives.rows import Rows
from agent_rl.types import DropReason, Lesson, TeacherView


@dataclass(frozen=True, slots=True)
class UserHindsight:
    divergence: str = "reverse_kl"  # reverse_kl | forward_kl | jsd | sampled
    beta: float = 0.5
    top_k: int = 0
    advantage_clip: float = 5.0
    ratio_cap: float = 2.0
    hindsight: str = "hint"
    min_gap: float = 0.02
    check_teacher: bool = True
    reanswers: float = 1.0

    name = "user_hindsight"
    needs_behavior = False  # without one a token is ratio-free

    def view(self, lesson: Lesson) -> TeacherView | DropReason:
        return teacher_view(lesson.evidence, lesson.verdict, self.hindsight)

    def loss(self, rows: Rows) -> Tensor:
        """Per token, [N]: the divergence chosen on the student's own answers, forward KL on the teacher's."""
        own_N = self._own(rows)
        if not rows.by_teacher_N.any():
            return own_N
        return torch.where(rows.by_teacher_N, forward_kl(rows.student_NV, rows.teacher_NV), own_N)

    def _own(self, rows: Rows) -> Tensor:
        if self.divergence == "sampled":
            student_N = rows.student_N
            advantage_N = log_ratio_advantage(student_N, rows.teacher_N, self.advantage_clip)
            return policy_gradient(
                student_N, advantage_N, truncated_importance(student_N, rows.behavior_N, self.ratio_cap)
            )
        student, teacher = rows.student_NV, rows.teacher_NV
        if self.top_k:
            student, teacher = on_student_support(student, teacher, self.top_k)
        return self._divergences()[self.divergence](student, teacher)

    def _divergences(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return {
            "reverse_kl": reverse_kl,
            "forward_kl": forward_kl,
            "jsd": lambda student, teacher: jsd(student, teacher, self.beta),
        }
