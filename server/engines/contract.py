"""What an engine is asked and what it gives back, in SGLang's names, and the seam that every engine server fills.

A field that is not here is a 400, so that nothing is silently ignored.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent_rl.types import Grammar

PauseMode = Literal["abort", "retract", "in_place"]


class Refused(ValueError):
    """This request cannot be served, now or later: HTTP 400."""


class Busy(RuntimeError):
    """This request cannot be served now: HTTP 503."""


# --------------------------------------------------------------------------------------------------- requests


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SamplingParams(Body):
    max_new_tokens: int = Field(128, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)  # -1 and 0: no cut
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    sampling_seed: int | None = None
    json_schema: str | None = None  # of these three at most one: what the answer must look like
    regex: str | None = None
    structural_tag: str | None = None

    @model_validator(mode="after")
    def _one_grammar(self) -> SamplingParams:
        if len(given := self._grammars()) > 1:
            raise ValueError(f"an answer follows one grammar, not {' and '.join(g.kind for g in given)}")
        return self

    def _grammars(self) -> list[Grammar]:
        kinds = ("json_schema", "regex", "structural_tag")
        return [Grammar(kind, text) for kind in kinds if (text := getattr(self, kind)) is not None]

    @property
    def grammar(self) -> Grammar | None:
        return next(iter(self._grammars()), None)

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def ratio_free(self) -> bool:
        """True where a sampled token has no behaviour logprob: greedy or penalised."""
        return self.temperature == 0.0 or self.penalised

    @property
    def penalised(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class GenerateRequest(Body):
    input_ids: list[int] = Field(min_length=1)
    sampling_params: SamplingParams = SamplingParams()
    rid: str = Field(default_factory=lambda: uuid.uuid4().hex)
    lora_path: str | None = None  # an adapter by the name it was loaded under
    extra_key: str | None = None  # cached prefixes are shared with requests of the same key alone
    priority: int = 0  # 0: a user's; larger is less urgent
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1)  # from here on, prompt tokens are scored
    stream: bool = False

    @property
    def scores(self) -> bool:
        """True for a request that samples nothing: prompt scoring."""
        return self.sampling_params.max_new_tokens == 0


class LoadAdapter(Body):
    lora_name: str = Field(min_length=1)
    lora_path: Path
    pinned: bool = True  # SGLang's; ours stay until they are unloaded


class UnloadAdapter(Body):
    lora_name: str


class UpdateWeights(Body):
    model_path: Path
    weight_version: str = Field(min_length=1)
    abort_all_requests: bool = False


class Abort(Body):
    rid: str


class Pause(Body):
    mode: PauseMode = "abort"


# ---------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of an engine adds to an answer."""

    version: str  # weight version of the base that sampled it
    ids: tuple[int, ...] = ()  # [C]
    logprobs: tuple[float | None, ...] = ()  # [C]
    kept_mass: tuple[float | None, ...] = ()  # [C]
    kv_mixed: bool = False  # an in-place swap left older KV behind these tokens
    finish: dict[str, Any] | None = None  # SGLang's finish_reason, on the last piece
    prompt_logprobs: tuple[float, ...] | None = None  # of a scored prompt: ids from logprob_start_len + 1 on
    cached_tokens: int = 0
    retractions: int = 0


@dataclass(frozen=True, slots=True)
class Description:
    """What `/model_info` and `/server_info` say."""

    model_path: str
    vocab_size: int
    max_context: int
    weight_version: str
    adapters: dict[str, str]  # name → checksum
    paused: bool = False
    running: int = 0
    waiting: int = 0


class EngineServer(Protocol):
    """What stands behind the endpoints. A refusal is Refused or Busy."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece, None]:
        """Take a request in, or refuse it, before the first piece. Closing the generator gives the request up."""
        ...

    async def abort(self, rid: str) -> None:
        """End a request with what it has; unknown ones have ended already."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def update_weights(self, folder: Path, version: str, abort: bool) -> None: ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    def describe(self) -> Description: ...


ABORTED: dict[str, Any] = {"type": "abort", "message": "Aborted"}


def length_reached(count: int) -> dict[str, Any]:
    return {"type": "length", "length": count}


def failed(message: str) -> dict[str, Any]:
    """The finish reason of an answer that the engine could not go on with."""
    return {"type": "abort", "message": message, "status_code": 500, "err_type": "InternalServerError"}


@dataclass(slots=True)
class Answer:
    """The pieces of one answer put together, in SGLang's shape."""

    request: GenerateRequest
    ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float | None, int, None]] = field(default_factory=list)
    kept_mass: list[float | None] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        start, end = len(self.ids), len(self.ids) + len(piece.ids)
        self.ids += piece.ids
        self.logprobs += [(p, i, None) for p, i in zip(piece.logprobs, piece.ids, strict=True)]
        self.kept_mass += piece.kept_mass
        if piece.ids:
            span = {"version": piece.version, "start": start, "end": end, "kv_mixed": piece.kv_mixed}
            before = self.versions[-1] if self.versions else None
            if before and (before["version"], before["kv_mixed"]) == (piece.version, piece.kv_mixed):
                before["end"] = end
            else:
                self.versions.append(span)
        self.last = piece

    def body(self) -> dict[str, Any]:
        assert self.last is not None
        meta: dict[str, Any] = {
            "id": self.request.rid,
            "finish_reason": self.last.finish,
            "prompt_tokens": len(self.request.input_ids),
            "completion_tokens": len(self.ids),
            "cached_tokens": self.last.cached_tokens,
            "weight_version": self.last.version,
            "weight_versions": self.versions,
            "num_retractions": self.last.retractions,
        }
        if self.request.return_logprob:
            meta["output_token_logprobs"] = self.logprobs
            meta["output_token_kept_mass"] = self.kept_mass
            meta["input_token_logprobs"] = self._prompt_logprobs()
        return {"output_ids": self.ids, "meta_info": meta}

    def _prompt_logprobs(self) -> list[tuple[float | None, int, None]]:
        """[[null, id, null], [logprob, id, null] …] from logprob_start_len on; the first has none."""
        assert self.last is not None
        if self.last.prompt_logprobs is None:
            return []
        ids = self.request.input_ids[self.request.logprob_start_len :]
        return [(p, i, None) for p, i in zip((None, *self.last.prompt_logprobs), ids, strict=True)]
