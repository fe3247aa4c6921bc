"""Samples as padded tensors: one micro-batch is the same responses under two prompts of different length.

B  samples    L  longest sequence of its side    N  response tokens with a loss, samples one after another
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent_rl.types import Sample


@dataclass(frozen=True, slots=True)
class Side:
    ids_BL: Tensor
    mask_BL: Tensor  # 1: a token, 0: padding, on the right
    sample_N: Tensor  # which row of ids_BL
    # the position that predicts the token: one before it, the first is predicted by the prompt's last
    position_N: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    samples: tuple[int, ...]  # [B] places in the list that the batch was cut from
    student: Side
    teacher: Side
    token_N: Tensor
    behavior_N: Tensor  # NaN: none
    temperature_N: Tensor  # 1 where the response was greedy
    weight_N: Tensor
    by_teacher_N: Tensor


def micro_batches(samples: Sequence[Sample], max_tokens: int, device: str = "cpu") -> Iterator[Batch]:
    """All samples, of similar length together, at most `max_tokens` padded tokens a side where one sample fits."""
    order = sorted(range(len(samples)), key=lambda i: _length(samples[i]))
    chosen: list[int] = []
    for i in order:  # ascending, so the newest is the longest
        if chosen and (len(chosen) + 1) * _length(samples[i]) > max_tokens:
            yield make_batch(samples, chosen, device)
            chosen = []
        chosen.append(i)
    if chosen:
        yield make_batch(samples, chosen, device)


def make_batch(samples: Sequence[Sample], chosen: Sequence[int], device: str = "cpu") -> Batch:
    picked = [samples[i] for i in chosen]
    token, behavior, temperature, weight, by_teacher = [], [], [], [], []
    for s in picked:
        kept = [r for r, with_loss in enumerate(s.response_mask) if with_loss]
        token += [s.response_ids[r] for r in kept]
        behavior += [float("nan") if s.behavior_logprobs[r] is None else s.behavior_logprobs[r] for r in kept]
        temperature += [s.temperature or 1.0] * len(kept)
        weight += [s.weight] * len(kept)
        by_teacher += [s.by_teacher] * len(kept)
    return Batch(
        samples=tuple(chosen),
        student=_side([s.prompt_ids for s in picked], picked, device),
        teacher=_side([s.teacher_prompt_ids for s in picked], picked, device),
        token_N=torch.tensor(token, device=device),
        behavior_N=torch.tensor(behavior, device=device),
        temperature_N=torch.tensor(temperature, device=device),
        weight_N=torch.tensor(weight, device=device),
        by_teacher_N=torch.tensor(by_teacher, device=device),
    )


def _side(prompts: Sequence[tuple[int, ...]], samples: Sequence[Sample], device: str) -> Side:
    rows = [prompt + s.response_ids for prompt, s in zip(prompts, samples, strict=True)]
    ids_BL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    sample, position = [], []
    for b, (prompt, row, s) in enumerate(zip(prompts, rows, samples, strict=True)):
        assert prompt, f"{s.turn_id}: the first response token needs a prompt to be predicted from"
        ids_BL[b, : len(row)] = torch.tensor(row)
        mask_BL[b, : len(row)] = 1
        places = [len(prompt) - 1 + r for r, with_loss in enumerate(s.response_mask) if with_loss]
        sample += [b] * len(places)
        position += places
    sample_N, position_N = torch.tensor(sample, dtype=torch.long), torch.tensor(position, dtype=torch.long)
    return Side(ids_BL.to(device), mask_BL.to(device), sample_N.to(device), position_N.to(device))


def _length(sample: Sample) -> int:
    return max(len(sample.prompt_ids), len(sample.teacher_prompt_ids)) + len(sample.response_ids)
