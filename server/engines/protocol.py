"""The engine protocol, served: a stated subset of SGLang's HTTP interface over any `EngineServer`.

Names, shapes and status codes are SGLang's, as with `--skip-tokenizer-init`: ids out, no text. Streams repeat in every
event all that came before, as SGLang's do. Administrative endpoints ask for the admin key, if there is one; SGLang's
own are private in the same way.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from typing import Any

import orjson
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import SecretStr

from server.engines.contract import (
    Abort,
    Answer,
    Busy,
    Description,
    EngineServer,
    GenerateRequest,
    LoadAdapter,
    Pause,
    Piece,
    Refused,
    UnloadAdapter,
    UpdateWeights,
)

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
