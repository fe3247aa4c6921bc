"""The sampled-token objective: the teacher's log-ratio as an advantage, per token.

In expectation over the student's own tokens its gradient is that of the reverse KL. Differentiating the mean log-ratio
itself would not do: the expected gradient of log S(y) − log T(y) at sampled y is zero, whatever the teacher says.

    N  tokens
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_ratio_advantage(student_N: Tensor, teacher_N: Tensor, clip: float) -> Tensor:
    """log T(y) − log S(y), held to ±clip; a constant for the gradient."""
    return (teacher_N - student_N).detach().clamp(-clip, clip)


def truncated_importance(policy_N: Tensor, behavior_N: Tensor, cap: float) -> Tensor:
    """min(π(y) / behaviour(y), cap); a constant for the gradient.

    A token without a behaviour logprob (NaN: greedy, penalised, forced) is ratio-free: its weight is 1.
    """
    ratio_N = (policy_N.detach() - behavior_N).clamp(max=20.0).exp().clamp(max=cap)
    return torch.where(behavior_N.isnan(), torch.ones_like(ratio_N), ratio_N)


def policy_gradient(policy_N: Tensor, advantage_N: Tensor, ratio_N: Tensor) -> Tensor:
    """−ratio · A · log π(y): the loss whose gradient raises what has a positive advantage."""
    return -ratio_N.detach() * advantage_N.detach() * policy_N
