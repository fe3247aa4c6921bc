"""One normalisation, by a count over the whole batch, however it is cut."""

from __future__ import annotations

import torch

from agent_rl.objectives.aggregation import normalise, weighted_sum


def gradient(batches: list[list[float]]) -> float:
    """Of Σ w·x over micro-batches, w = 1: the mean of the x, if the normaliser is right."""
    w = torch.ones((), requires_grad=True)
    for xs in batches:
        weighted_sum(w * torch.tensor(xs), torch.ones(len(xs))).backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    normalise([w.grad], sum(map(len, batches)))
    return w.grad.item()


def test_losses_of_1_2_3_and_4_make_10_quarters() -> None:
    assert gradient([[1, 2, 3, 4]]) == 2.5
    assert gradient([[1, 2, 3], [4]]) == 2.5  # a mean of means would be (2 + 4) / 2 = 3
    assert gradient([[1], [2], [3], [4]]) == 2.5


def test_weights_count_in_the_sum_alone() -> None:
    assert weighted_sum(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.0])).item() == 4.5  # 1·½ + 2·2


def test_an_empty_batch_is_zero_not_nan() -> None:
    grad = torch.zeros(2)
    normalise([grad], 0)
    assert grad.tolist() == [0, 0]
    assert weighted_sum(torch.zeros(0), torch.zeros(0)).item() == 0
