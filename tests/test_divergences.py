"""Divergences against float64 numbers that follow from the definitions.

F3: z_S = (1, 0, −1), z_T = (0, 1, 0):  p_S = (.665241, .244728, .090031), p_T = (.211942, .576117, .211942)
    log p_S = z_S − 1.407606 = (−.407606, −1.407606, −2.407606)
    log p_T = z_T − 1.551445 = (−1.551445, −.551445, −1.551445)
    KL(T‖S) = .211942·(−1.143839) + .576117·.856161 + .211942·.856161 = −.242428 + .493249 + .181457 = .432278
    KL(S‖T) = .665241·1.143839 − .244728·.856161 − .090031·.856161 = .760929 − .209527 − .077081 = .474321
F5: five tokens, below; student's top 2 hold .811158 of S and .757148 of T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from agent_rl.objectives.divergences import entropy, forward_kl, jsd, on_student_support, reverse_kl

F3 = torch.tensor([1.0, 0, -1], dtype=torch.float64), torch.tensor([0, 1.0, 0], dtype=torch.float64)
F5 = (
    torch.tensor([2, 1, 0.3, -0.4, -1.1], dtype=torch.float64),
    torch.tensor([0.5, 2.2, -0.3, 0.9, -1.5], dtype=torch.float64),
)
Divergence = Callable[[Tensor, Tensor], Tensor]
ALL: dict[str, Divergence] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd.1": partial(jsd, beta=0.1),
    "jsd.5": partial(jsd, beta=0.5),
    "jsd.9": partial(jsd, beta=0.9),
}


def at(divergence: Divergence, logits: tuple[Tensor, Tensor]) -> float:
    student, teacher = logits
    return divergence(student.log_softmax(-1)[None], teacher.log_softmax(-1)[None]).item()


def gradient(divergence: Divergence, logits: tuple[Tensor, Tensor], k: int | None = None) -> list[float]:
    student = logits[0].clone().requires_grad_()
    pair = student.log_softmax(-1)[None], logits[1].log_softmax(-1)[None]
    divergence(*(pair if k is None else on_student_support(*pair, k))).sum().backward()
    assert student.grad is not None
    return student.grad.tolist()


@pytest.mark.parametrize(
    ("name", "f3", "f5"),
    [
        ("forward", 0.432278, 0.658331),
        ("reverse", 0.474321, 0.756899),
        ("jsd.1", 0.038708, 0.058596),
        ("jsd.5", 0.108578, 0.163856),
        ("jsd.9", 0.041568, 0.064927),
    ],
)
def test_values(name: str, f3: float, f5: float) -> None:
    assert at(ALL[name], F3) == pytest.approx(f3, abs=1e-6)
    assert at(ALL[name], F5) == pytest.approx(f5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward", [0.476051, -0.422041, 0.055782, -0.120677, 0.010886]),  # p_S − p_T
        ("reverse", [0.513855, -0.399979, -0.003626, -0.104013, -0.006237]),  # p_S · (log p_S/p_T − .756899)
        ("jsd.5", [0.106324, -0.090666, 0.007752, -0.024389, 0.000979]),
    ],
)
def test_gradients_on_the_student(name: str, expected: list[float]) -> None:
    assert gradient(ALL[name], F5) == pytest.approx(expected, abs=1e-6)


def test_the_ends_of_beta_are_the_two_kls() -> None:
    assert at(partial(jsd, beta=0.0), F5) == at(forward_kl, F5)
    assert at(partial(jsd, beta=1.0), F5) == at(reverse_kl, F5)
    assert at(partial(jsd, beta=1e-4), F5) / 1e-4 == pytest.approx(0.658256, abs=1e-5)  # slope: the forward KL
    assert at(partial(jsd, beta=1 - 1e-4), F5) / 1e-4 == pytest.approx(0.756780, abs=1e-5)
    with pytest.raises(ValueError, match=r"beta of the JSD is 1\.5"):
        jsd(F5[0][None], F5[1][None], 1.5)


@pytest.mark.parametrize(("name", "value"), [("reverse", 0.680339), ("forward", 0.560438), ("jsd.5", 0.143118)])
def test_students_top_two_and_a_tail(name: str, value: float) -> None:
    pair = on_student_support(F5[0].log_softmax(-1)[None], F5[1].log_softmax(-1)[None], 2)
    assert pair[0].exp().tolist()[0] == pytest.approx([0.593004, 0.218154, 0.188842], abs=1e-6)  # 1 − .811158
    assert pair[1].exp().tolist()[0] == pytest.approx([0.116953, 0.640195, 0.242852], abs=1e-6)  # 1 − .757148
    assert ALL[name](*pair).item() == pytest.approx(value, abs=1e-6)


def test_gradient_of_the_tail_reaches_every_logit() -> None:
    expected = [0.559255, -0.383277, -0.100952, -0.050131, -0.024894]
    assert gradient(reverse_kl, F5, k=2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_support_of_the_whole_vocabulary_is_the_whole_vocabulary(name: str) -> None:
    pair = F5[0].log_softmax(-1)[None], F5[1].log_softmax(-1)[None]
    for k in (5, 6):
        assert ALL[name](*on_student_support(*pair, k)).item() == ALL[name](*pair).item()


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("name", ALL)
def test_agreement_costs_nothing_and_pulls_nowhere(name: str, k: int | None) -> None:
    same = F5[0], F5[0].clone()
    assert at(ALL[name], same) == pytest.approx(0, abs=1e-12)
    assert gradient(ALL[name], same, k) == pytest.approx([0] * 5, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_vocabulary_does_not_matter(name: str) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = F5[0][order], F5[1][order]
    assert at(ALL[name], moved) == pytest.approx(at(ALL[name], F5), abs=1e-12)
    assert gradient(ALL[name], moved, 2) == pytest.approx(
        [gradient(ALL[name], F5, 2)[i] for i in order.tolist()], abs=1e-12
    )


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("name", ALL)
def test_no_gradient_enters_the_teacher(name: str, k: int | None) -> None:
    student, teacher = (z.clone().requires_grad_() for z in F5)
    pair = student.log_softmax(-1)[None], teacher.log_softmax(-1)[None]
    ALL[name](*(pair if k is None else on_student_support(*pair, k))).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name: str, k: int | None) -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64).log_softmax(-1)

    def loss(z: Tensor) -> Tensor:
        pair = z.log_softmax(-1), teacher
        return ALL[name](*(pair if k is None else on_student_support(*pair, k)))

    assert torch.autograd.gradcheck(loss, student)


def test_a_full_support_in_float32_stays_finite() -> None:
    sure = torch.tensor([[60.0, 0, 0, 0]], requires_grad=True)  # the top 2 hold all the mass that fp32 can tell
    loss = reverse_kl(*on_student_support(sure.log_softmax(-1), torch.zeros(1, 4).log_softmax(-1), 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_entropy() -> None:
    assert entropy(torch.full((1, 8), 1 / 8).log()).item() == pytest.approx(2.0794415)  # log 8
    assert entropy(F5[0].log_softmax(-1)[None]).item() == pytest.approx(1.136798, abs=1e-6)
