"""The sampled-token objective: exact by enumeration over a vocabulary of five.

F5: log T − log S per token = (−1.623428, 1.076572, −.723428, 1.176572, −.523428), e.g. −2.145982 + .522555.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agent_rl.objectives.policy_gradient import log_ratio_advantage, policy_gradient, truncated_importance

STUDENT = torch.tensor([2, 1, 0.3, -0.4, -1.1], dtype=torch.float64)
TEACHER = torch.tensor([0.5, 2.2, -0.3, 0.9, -1.5], dtype=torch.float64).log_softmax(-1)
ADVANTAGE = [-1.623428, 1.076572, -0.723428, 1.176572, -0.523428]
REVERSE_KL_GRADIENT = [0.513855, -0.399979, -0.003626, -0.104013, -0.006237]


def expected_gradient(loss: str) -> list[float]:
    """Σ_y p_S(y) · ∇ loss(y): the expectation over the student's own draws, without sampling."""
    logits = STUDENT.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    ratio = logp - TEACHER
    losses: dict[str, Tensor] = {
        "policy gradient": policy_gradient(logp, log_ratio_advantage(logp, TEACHER, 5.0), torch.ones(5)),
        "k1": ratio,
        "k2": ratio.square() / 2,
    }
    (logp.exp().detach() * losses[loss]).sum().backward()
    assert logits.grad is not None
    return logits.grad.tolist()


def test_advantage_is_the_teachers_log_ratio_held_to_the_clip() -> None:
    logp = STUDENT.log_softmax(-1)
    assert log_ratio_advantage(logp, TEACHER, 5.0).tolist() == pytest.approx(ADVANTAGE, abs=1e-6)
    clipped = log_ratio_advantage(logp, TEACHER, 1.0).tolist()
    assert clipped == pytest.approx([-1, 1, -0.723428, 1, -0.523428], abs=1e-6)


def test_in_expectation_it_is_the_gradient_of_the_reverse_kl() -> None:
    assert expected_gradient("policy gradient") == pytest.approx(REVERSE_KL_GRADIENT, abs=1e-6)
    assert expected_gradient("k2") == pytest.approx(REVERSE_KL_GRADIENT, abs=1e-6)


def test_the_log_ratio_as_a_loss_would_teach_nothing() -> None:
    assert expected_gradient("k1") == pytest.approx([0] * 5, abs=1e-12)


def test_gradient_of_single_draws() -> None:
    for y, expected in [
        (0, [0.660729, -0.354157, -0.175869, -0.087334, -0.043369]),  # 1.623428 · (1 − .593004), −1.623428 · .218154, …
        (1, [0.638411, -0.841714, 0.116627, 0.057915, 0.028760]),
    ]:
        logits = STUDENT.clone().requires_grad_()
        logp = logits.log_softmax(-1)[y : y + 1]
        policy_gradient(logp, log_ratio_advantage(logp, TEACHER[y : y + 1], 5.0), torch.ones(1)).sum().backward()
        assert logits.grad is not None
        assert logits.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_agreement_has_no_loss_and_no_gradient() -> None:
    logits = STUDENT.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    loss = policy_gradient(logp, log_ratio_advantage(logp, logp.detach(), 5.0), torch.ones(5))
    loss.sum().backward()
    assert loss.tolist() == [0] * 5
    assert logits.grad is not None
    assert logits.grad.tolist() == [0] * 5


def test_importance_is_capped_and_a_token_without_behaviour_is_ratio_free() -> None:
    policy = torch.tensor([0.1, 0.9, 0.5, 0.3]).log()
    behavior = torch.tensor([0.2, 0.3, 0.5, math.nan]).log()
    # .1/.2 = .5 · .9/.3 = 3 → 2 · .5/.5 = 1 · nothing to divide by → 1
    assert truncated_importance(policy, behavior, 2.0).tolist() == pytest.approx([0.5, 2.0, 1.0, 1.0])


def test_an_impossible_token_weighs_the_cap_not_infinity() -> None:
    assert truncated_importance(torch.tensor([-1.0]), torch.tensor([-500.0]), 2.0).tolist() == [2.0]


def test_only_the_policy_gets_a_gradient() -> None:
    policy, teacher, behavior = (torch.tensor([x], requires_grad=True) for x in (-1.0, -0.5, -1.2))
    advantage = log_ratio_advantage(policy, teacher, 5.0)
    policy_gradient(policy, advantage, truncated_importance(policy, behavior, 2.0)).sum().backward()
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(-0.5 * math.exp(0.2))  # −A · ratio, nothing through either
    assert teacher.grad is None
    assert behavior.grad is None
