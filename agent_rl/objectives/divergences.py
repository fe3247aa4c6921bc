"""Divergences between teacher T and student S, per token, in nats, over whatever buckets the last dimension holds.

    N  tokens    V  vocabulary    K  support

All take finite log-probabilities [N, V] (or [N, K+1] from `on_student_support`) and give [N]. The teacher's side is
cut off from the gradient here, so no caller can forget it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(T‖S): the student must cover what the teacher does. Gradient on student logits: p_S − p_T."""
    return _kl(teacher_NV.detach(), student_NV)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(S‖T): the student gives up what the teacher would not do. Gradient: p_S · (log p_S/p_T − KL)."""
    return _kl(student_NV, teacher_NV.detach())


def jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """β·KL(T‖m) + (1−β)·KL(S‖m) with m = β·T + (1−β)·S; β = 0 means the forward KL, β = 1 the reverse KL.

    The formula itself goes to zero at both ends, and its slope there is those two: the ends are a convention.
    """
    if beta == 0.0:
        return forward_kl(student_NV, teacher_NV)
    if beta == 1.0:
        return reverse_kl(student_NV, teacher_NV)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta of the JSD is {beta}; expected a number between 0 and 1")
    teacher_NV = teacher_NV.detach()
    beta_ = student_NV.new_tensor(beta)
    mixture_NV = torch.logaddexp(teacher_NV + beta_.log(), student_NV + torch.log1p(-beta_))
    return beta * _kl(teacher_NV, mixture_NV) + (1 - beta) * _kl(student_NV, mixture_NV)


def on_student_support(student_NV: Tensor, teacher_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both as [N, K+1]: the student's K likeliest tokens, and one bucket that holds everything else.

    The bucket makes them distributions again: a partial sum over the support alone is not stationary at S = T.
    """
    if k >= student_NV.shape[-1]:
        return student_NV, teacher_NV
    support_NK = student_NV.detach().topk(k, dim=-1).indices
    return _with_tail(student_NV.gather(-1, support_NK)), _with_tail(teacher_NV.detach().gather(-1, support_NK))


def entropy(logprobs_NV: Tensor) -> Tensor:
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def _with_tail(logprobs_NK: Tensor) -> Tensor:
    inside_N1 = logprobs_NK.logsumexp(-1, keepdim=True).clamp(max=-1e-7)  # rounding may reach 1, where log(0) waits
    return torch.cat([logprobs_NK, torch.log(-torch.expm1(inside_N1))], dim=-1)
