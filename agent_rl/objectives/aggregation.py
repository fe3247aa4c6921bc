"""The one place where per-token losses become one number: Σ loss·weight / count, by a count over the global batch.

The sum is differentiated chunk by chunk and micro-batch by micro-batch, the division is applied once to the gathered
gradients. However the batch is cut, the result is the same; a mean per micro-batch would not be.

    T  tokens
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def weighted_sum(loss_T: Tensor, weight_T: Tensor) -> Tensor:
    return (loss_T * weight_T).sum()


def normalise(gradients: Iterable[Tensor], count: int) -> None:
    """Divide summed gradients by the global count of tokens with a loss; an empty batch has gradients of zero."""
    for gradient in gradients:
        gradient.div_(max(count, 1))
