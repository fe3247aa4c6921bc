"""One token for each row of a batch, vectorised over the rows.

    N rows, V vocabulary, K candidates in falling order

A token is drawn by inverting the cumulative distribution at the row's own uniform number, so that what a row draws
depends on its seed alone and not on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CANDIDATES = 256  # the first try at a cut distribution; rows that keep more are tried with WIDER times as many
WIDER = 16
BELOW_ONE = 1 - 1e-12  # keeps a draw off the very end, behind the last token that has any mass


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's next token is drawn."""

    uniform: float  # in [0, 1); not used at temperature 0
    temperature: float
    top_p: float
    top_k: int  # ≤ 0: no cut
    min_p: float
    ratio_free: bool  # greedy or penalised: its token has no behaviour logprob
    penalties: Mapping[int, float]  # taken from the logits of these ids
    allowed: NDArray[np.bool_] | None = None  # [V] what the grammar allows; None: everything

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def forced(self) -> bool:
        return self.allowed is not None and int(self.allowed.sum()) == 1


@dataclass(frozen=True, slots=True)
class Drawn:
    token: int
    logprob: float | None  # log softmax(logits / T)[token], full vocabulary; None where greedy, penalised or forced
    kept_mass: float | None  # of what grammar and cuts leave; None where there are none, and where greedy


@torch.inference_mode()
def sample(logits_NV: Tensor, draws: Sequence[Draw]) -> list[Drawn | None]:
    """Draw a token per row from fp32 logits, which are changed in place. None: the row's logits are not finite, or its
    grammar allows nothing."""
    _temper(logits_NV, draws)
    full_N = logits_NV.logsumexp(-1)
    lse_N = _mask(logits_NV, full_N, draws)
    tokens_N = torch.zeros(len(draws), dtype=torch.long, device=logits_NV.device)
    kept_N = torch.ones(len(draws), dtype=torch.double, device=logits_NV.device)
    finite = torch.isfinite(lse_N).tolist()
    kinds: dict[str, list[int]] = {"greedy": [], "cut": [], "plain": []}
    for row, draw in enumerate(draws):
        if finite[row]:
            kinds["greedy" if draw.greedy else "cut" if draw.truncates else "plain"].append(row)
    if rows := kinds["greedy"]:
        tokens_N[rows] = _take(logits_NV, rows).argmax(-1)
    if rows := kinds["plain"]:
        probs_NV = (_take(logits_NV, rows) - _take(lse_N, rows)[:, None]).exp()
        tokens_N[rows] = _invert(probs_NV, [draws[row].uniform for row in rows])
    if rows := kinds["cut"]:
        _sample_cut(logits_NV, lse_N, rows, draws, CANDIDATES, tokens_N, kept_N)
    logprobs = (logits_NV.gather(1, tokens_N[:, None])[:, 0] - full_N).tolist()
    kept_N *= (lse_N - full_N).double().exp()
    return [
        _drawn(token, logprob, kept, draw) if ok else None
        for token, logprob, kept, draw, ok in zip(
            tokens_N.tolist(), logprobs, kept_N.tolist(), draws, finite, strict=True
        )
    ]


def _drawn(token: int, logprob: float, kept: float, draw: Draw) -> Drawn:
    cut = (draw.truncates or draw.allowed is not None) and not draw.greedy
    return Drawn(token, None if draw.ratio_free or draw.forced else logprob, kept if cut else None)


@torch.inference_mode()
def score(logits_NV: Tensor, targets: Sequence[int]) -> list[float]:
    """log softmax(logits)[target] of each row."""
    at = torch.tensor(targets, device=logits_NV.device)[:, None]
    scores: list[float] = (logits_NV.gather(1, at)[:, 0] - logits_NV.logsumexp(-1)).tolist()
    return scores


def _temper(logits_NV: Tensor, draws: Sequence[Draw]) -> None:
    for row, draw in enumerate(draws):
        if draw.penalties:
            ids = torch.tensor(list(draw.penalties), device=logits_NV.device)
            logits_NV[row, ids] -= torch.tensor(
                list(draw.penalties.values()), dtype=torch.float, device=logits_NV.device
            )
    if any(draw.temperature not in (0.0, 1.0) for draw in draws):
        temperatures = [draw.temperature or 1.0 for draw in draws]
        logits_NV /= torch.tensor(temperatures, dtype=torch.float, device=logits_NV.device)[:, None]


def _mask(logits_NV: Tensor, full_N: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Take away what grammars do not allow; logsumexp of what is left, [N]."""
    if all(draw.allowed is None for draw in draws):
        return full_N
    for row, draw in enumerate(draws):
        if draw.allowed is not None:
            allowed = torch.from_numpy(draw.allowed).to(logits_NV.device)
            logits_NV[row].masked_fill_(~allowed, -inf)
    lse_N = logits_NV.logsumexp(-1)
    return torch.where(full_N.isfinite(), lse_N, full_N)


def _sample_cut(
    logits_NV: Tensor,
    lse_N: Tensor,
    rows: list[int],
    draws: Sequence[Draw],
    candidates: int,
    tokens_N: Tensor,
    kept_N: Tensor,
) -> None:
    """Top-k, top-p and min-p together, as SGLang cuts: each against the full distribution that the grammar leaves."""
    k = min(candidates, logits_NV.shape[1])
    values_NK, ids_NK = _take(logits_NV, rows).topk(k)
    probs_NK = (values_NK - _take(lse_N, rows)[:, None]).exp().double()
    cuts = [
        (
            draws[row].top_k if draws[row].top_k > 0 else inf,
            draws[row].top_p if draws[row].top_p < 1 else inf,
            draws[row].min_p,
        )
        for row in rows
    ]
    top_k, top_p, min_p = torch.tensor(cuts, dtype=torch.double, device=logits_NV.device).T[:, :, None]
    before_NK = probs_NK.cumsum(-1) - probs_NK
    keep_NK = (torch.arange(k, device=logits_NV.device) < top_k) & (before_NK <= top_p)
    keep_NK &= probs_NK >= min_p * probs_NK[:, :1]
    kept_NK = probs_NK * keep_NK
    picks = _invert(kept_NK, [draws[row].uniform for row in rows])
    tokens_N[rows] = ids_NK.gather(1, picks[:, None])[:, 0]
    kept_N[rows] = kept_NK.sum(-1)
    open_ended = [row for row, more in zip(rows, keep_NK[:, -1].tolist(), strict=True) if more]
    if open_ended and k < logits_NV.shape[1]:
        _sample_cut(logits_NV, lse_N, open_ended, draws, candidates * WIDER, tokens_N, kept_N)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """These rows; all of them are a view."""
    return x if len(rows) == x.shape[0] else x[rows]


def _invert(mass_NK: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The index at which each row's cumulative mass first exceeds its share `uniform` of the whole, [N]."""
    cumulative_NK = mass_NK.cumsum(-1, dtype=torch.double)
    uniform_N = torch.tensor(uniforms, dtype=torch.double, device=mass_NK.device) * BELOW_ONE
    return torch.searchsorted(cumulative_NK, uniform_N[:, None] * cumulative_NK[:, -1:], right=True)[:, 0]
