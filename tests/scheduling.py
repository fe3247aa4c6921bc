"""A scheduler stepped by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from server.engines.contract import GenerateRequest, Piece, SamplingParams
from server.engines.runner import Runner
from server.engines.scheduler import MAX_CHUNK, Scheduler
from server.engines.stopping import Stopper
from server.engines.work import Work


class Bench:
    """A scheduler stepped by hand, and what it hands out."""

    def __init__(self, model: Path, *, rows: int = 4, max_queue: int = 100, cache_bytes: int = 2**24) -> None:
        self.runner = Runner(model, dtype="float32", device="cpu", rows=rows, max_context=900, max_chunk=MAX_CHUNK)
        self.scheduler = Scheduler(self.runner, max_queue=max_queue, prefix_cache_bytes=cache_bytes)
        self.pieces: dict[str, list[Piece]] = {}

    def ask(self, rid: str, ids: list[int], tokens: int = 8, **given: Any) -> None:
        params = SamplingParams(
            max_new_tokens=tokens, **({"temperature": 0.0, "ignore_eos": True} | given.pop("params", {}))
        )
        matcher = given.pop("matcher", None)
        request = GenerateRequest(input_ids=ids, sampling_params=params, rid=rid, **given)
        pieces = self.pieces[rid] = []
        self.scheduler.submit(Work(request, Stopper(params, (), str), pieces.append, matcher))

    def run(self) -> None:
        for _ in range(1000):
            if self.scheduler.idle:
                return
            self.scheduler.step()
        raise AssertionError("the scheduler does not come to rest")

    def out(self, rid: str) -> list[int]:
        return [token for piece in self.pieces[rid] for token in piece.ids]

    def last(self, rid: str) -> Piece:
        assert self.pieces[rid][-1].finish is not None, "not finished"
        return self.pieces[rid][-1]


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
