"""The engine protocol, served: a stated subset of SGLang's HTTP interface over any `EngineServer`.

Field names, shapes and status codes are SGLang's, as with `--skip-tokenizer-init`: ids out, no text. A field that is
not here is a 400, so that nothing is silently ignored. Streams repeat in every event all that came before, as SGLang's
do. Administrative endpoints ask for the admin key, if there is one; SGLang's own are private in the same way.
"""

from __future__ import annotations

import asyncio
import hmac
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr

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


# -------------------------------------------------------------------------------------------------------- app

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(engine: EngineServer, admin_key: SecretStr | None, lifespan: Lifespan | None = None) -> FastAPI:
    """The HTTP server of an engine; `lifespan` starts and stops what stands behind it."""
    app = FastAPI(title="agent-rl engine", lifespan=lifespan, openapi_url=None)
    for error, respond in REFUSALS.items():
        app.add_exception_handler(error, respond)
    admin = [Depends(partial(_check_key, admin_key))]

    @app.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        check_request(body, engine.describe())
        start = _stream if body.stream else _whole
        return await _until_hung_up(request, start(body, engine.generate(body)))

    @app.post("/abort_request")
    async def abort_request(body: Abort) -> Response:
        await engine.abort(body.rid)
        return _json({})

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if engine.describe().paused else 200)

    @app.get("/model_info")
    async def model_info() -> Response:
        d = engine.describe()
        names = ("model_path", "vocab_size", "weight_version", "adapters")
        return _json({"is_generation": True, **{name: getattr(d, name) for name in names}})

    @app.get("/server_info")
    async def server_info() -> Response:
        d = engine.describe()
        state = {"num_running_reqs": d.running, "num_waiting_reqs": d.waiting}
        return _json({"model_path": d.model_path, "context_length": d.max_context, "internal_states": [state]})

    @app.post("/load_lora_adapter", dependencies=admin)
    async def load_lora_adapter(body: LoadAdapter) -> Response:
        await engine.load_adapter(body.lora_name, body.lora_path)
        return _json({"success": True, "error_message": None, "loaded_adapters": engine.describe().adapters})

    @app.post("/unload_lora_adapter", dependencies=admin)
    async def unload_lora_adapter(body: UnloadAdapter) -> Response:
        await engine.unload_adapter(body.lora_name)
        return _json({"success": True, "error_message": None, "loaded_adapters": engine.describe().adapters})

    @app.post("/update_weights_from_disk", dependencies=admin)
    async def update_weights_from_disk(body: UpdateWeights) -> Response:
        await engine.update_weights(body.model_path, body.weight_version, body.abort_all_requests)
        message = f"Succeeded to update model weights. Weight version updated to {body.weight_version}."
        return _json({"success": True, "message": message, "num_paused_requests": 0})

    @app.post("/pause_generation", dependencies=admin)
    async def pause_generation(body: Pause) -> Response:
        await engine.pause(body.mode)
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    @app.post("/continue_generation", dependencies=admin)
    async def continue_generation() -> Response:
        await engine.resume()
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    @app.post("/flush_cache", dependencies=admin)
    async def flush_cache() -> Response:
        await engine.flush_cache()
        return Response("Cache flushed.\n", media_type="text/plain")

    return app


def check_request(request: GenerateRequest, model: Description) -> None:
    """What every engine refuses. Raises Refused."""
    ids, wanted = request.input_ids, request.sampling_params.max_new_tokens
    outside = [i for i in ids if not 0 <= i < model.vocab_size]
    if outside:
        raise Refused(f"input_ids {outside[:4]} lie outside the vocabulary of {model.vocab_size}")
    if len(ids) + wanted > model.max_context:
        raise Refused(
            f"the prompt's {len(ids)} tokens and max_new_tokens {wanted} make {len(ids) + wanted}; "
            f"the longest context is {model.max_context}"
        )
    if request.logprob_start_len >= 0 and not request.scores:
        raise Refused("logprob_start_len scores a prompt and needs max_new_tokens 0")
    if request.logprob_start_len >= len(ids):
        raise Refused(f"logprob_start_len {request.logprob_start_len} lies behind the prompt's {len(ids)} tokens")
    if request.lora_path is not None and request.lora_path not in model.adapters:
        raise Refused(f"Got LoRA adapter that has never been loaded: {request.lora_path}")


async def _stream(request: GenerateRequest, pieces: AsyncGenerator[Piece, None]) -> Response:
    """The answer's beginning is awaited here, so that a refusal still has its own status."""
    answer = Answer(request)
    answer.add(await anext(pieces))

    async def events() -> AsyncIterator[bytes]:
        async with aclosing(pieces):
            yield _event(answer)
            async for piece in pieces:
                answer.add(piece)
                yield _event(answer)
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(answer: Answer) -> bytes:
    return b"data: " + orjson.dumps(answer.body()) + b"\n\n"


async def _whole(request: GenerateRequest, pieces: AsyncGenerator[Piece, None]) -> Response:
    answer = Answer(request)
    async with aclosing(pieces):
        async for piece in pieces:
            answer.add(piece)
    return _json(answer.body())


async def _until_hung_up(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """`work`, given up if the client goes away first."""
    answering = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=499)
    finally:
        waiting.cancel()
        if answering.cancel():
            await asyncio.wait({answering})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _check_key(key: SecretStr | None, request: Request) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise PermissionError("this endpoint needs the engine's admin key as a bearer token")


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _error(request: Request, status: int, message: str) -> Response:
    match request.url.path:
        case "/load_lora_adapter" | "/unload_lora_adapter":
            return _json({"success": False, "error_message": message}, status)
        case "/update_weights_from_disk":
            return _json({"success": False, "message": message}, status)
        case _:
            return _json({"error": {"message": message, "code": status}}, status)


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    words = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
    return _error(request, 400, "; ".join(words))


def _answers(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def respond(request: Request, error: Exception) -> Response:
        return _error(request, status, str(error))

    return respond


REFUSALS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    RequestValidationError: _malformed,
    Refused: _answers(400),
    Busy: _answers(503),
    PermissionError: _answers(401),
}
