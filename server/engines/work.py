"""One request on its way through the scheduler."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.engines.contract import GenerateRequest, Piece
from server.engines.grammar import Matcher
from server.engines.sampling import Draw, Drawn
from server.engines.stopping import Stopper


@dataclass(slots=True, eq=False)
class Work:
    """One request on its way."""

    request: GenerateRequest
    stopper: Stopper
    emit: Callable[[Piece], None]
    matcher: Matcher | None = None
    order: int = 0  # of arrival
    ids: list[int] = field(default_factory=list)  # prompt and answer
    out: list[int] = field(default_factory=list)  # answer
    read: int = 0  # of `ids`, those whose KV is in the row
    row: int | None = None
    random: random.Random = field(default_factory=random.Random)
    prompt_logprobs: list[float] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)  # of the answer's ids, where they are penalised
    cached: int = 0
    retractions: int = 0
    kv_mixed: bool = False

    @property
    def adapter(self) -> str | None:
        return self.request.lora_path

    @property
    def internal(self) -> bool:
        return self.request.priority > 0

    @property
    def urgency(self) -> tuple[bool, int]:
        """Least first: users before internal requests, then by arrival."""
        return self.internal, self.order

    def draw(self) -> Draw:
        """How its next token is drawn; takes a number from its generator."""
        params = self.request.sampling_params
        penalties = {i: n * params.frequency_penalty + params.presence_penalty for i, n in self.counts.items()}
        uniform = self.random.random() if params.temperature else 0.0
        return Draw(
            uniform=uniform,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            ratio_free=params.ratio_free,
            penalties=penalties,
            allowed=self.matcher.allowed() if self.matcher else None,
        )

    def append(self, token: int) -> dict[str, Any] | None:
        """Take a token in; the finish_reason if it was the last."""
        self.ids.append(token)
        self.out.append(token)
        if self.request.sampling_params.penalised:
            self.counts[token] += 1
        if self.matcher:
            self.matcher.append(token)
        return self.stopper.reason(self.out)

    def wanted_logits(self, count: int) -> list[int]:
        """Of the next `count` positions to read, those whose logits are needed: all that predict a scored token, or the
        last of the prompt."""
        if not self.request.scores:
            return [count - 1] if self.read + count == len(self.ids) else []
        start = self.request.logprob_start_len
        if start < 0:
            return []
        return [i for i in range(count) if start <= self.read + i < len(self.ids) - 1]

    def piece(self, version: str, finish: dict[str, Any] | None, drawn: Drawn | None) -> Piece:
        """What it has to say after a step."""
        scored = finish is not None and finish["type"] == "length" and self.request.logprob_start_len >= 0
        return Piece(
            version=version,
            ids=(drawn.token,) if drawn else (),
            logprobs=(drawn.logprob,) if drawn else (),
            kept_mass=(drawn.kept_mass,) if drawn else (),
            kv_mixed=self.kv_mixed,
            finish=finish,
            prompt_logprobs=tuple(self.prompt_logprobs) if scored else None,
            cached_tokens=self.cached,
            retractions=self.retractions,
        )
