"""The one client of the engine protocol, a stated subset of SGLang's HTTP interface. Gateway, learner, exam and
publisher all speak through it, whether the server is ours or SGLang.

    POST /generate            ids in; ids, logprobs and version spans out; streaming; prompt scoring
    POST /load_lora_adapter, /unload_lora_adapter, /update_weights_from_disk
    POST /abort_request, /pause_generation, /continue_generation, /flush_cache
    GET  /health, /model_info, /server_info

Ours adds to SGLang's answers, all under `meta_info`: `output_token_kept_mass` (a list of float or null per output
token), truthful nulls in `output_token_logprobs` where sampling was greedy, penalised or grammar-forced, and `kv_mixed`
in `weight_versions`; to its requests: `priority` (0 is a user's request, larger is less urgent); to `/model_info`:
`vocab_size` and `adapters` {name: checksum}. Where SGLang does not say these, the client reads the model's
configuration or draws the careful conclusion.

A release is served by its name: BASE_RELEASE without an adapter, any other as `lora_path` (adapters) or as the
server's weight version (full weights).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson

from agent_rl.engine_answers import (
    AnswerReader,
    Chunk,
    Completion,
    EngineError,
    EngineRejected,
    EngineUnavailable,
    ReleaseNotLoaded,
    message_of,
    needed,
    release_name,
)
from agent_rl.types import BASE_RELEASE, Finish, Sampling

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "EngineError",
    "EngineInfo",
    "EngineRejected",
    "EngineUnavailable",
    "ReleaseNotLoaded",
    "sampling_body",
]

CONNECT_S = 10.0
KEEPALIVE_S = 2.0  # uvicorn closes idle connections after 5: a connection must not be reused as it dies


@dataclass(frozen=True, slots=True)
class EngineInfo:
    model_path: str
    vocab_size: int
    max_context: int
    weight_version: str  # BASE_RELEASE, or the full-weight release that serves
    adapters: dict[str, str]  # name → checksum of what is loaded


class Engine:
    """A client. One per process; `close` it. Every method raises EngineUnavailable when nobody answers."""

    def __init__(self, url: str, *, admin_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        self._session: aiohttp.ClientSession | None = None  # made inside the running loop
        self._vocab_size: int | None = None
        self._weight_version: str | None = None  # as last heard
        self._adapters: set[str] = set()  # releases that are served as adapters, as far as known

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    # ------------------------------------------------------------------------------------------------ sampling

    async def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        rid: str,
        release: str = BASE_RELEASE,
        stop_ids: Sequence[int] = (),
        priority: int = 0,
        extra_key: str | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Sample an answer token by token. Closing the iterator early aborts the request on the server.

        Requests share cached prefixes only with those of the same `extra_key`. Raises EngineRejected, ReleaseNotLoaded,
        EngineUnavailable.
        """
        body = await self._request(prompt_ids, release, sampling_body(sampling, stop_ids), rid, priority, extra_key)
        reader = AnswerReader(body.get("lora_path"), sampling)
        async with self._call("POST", "/generate", body | {"stream": True}) as response:
            async for lines in _events(response):
                for event in needed(lines):
                    chunk = reader.read(event)
                    self._heard(event["meta_info"])
                    if chunk.ids or chunk.finish:
                        yield chunk
                    if chunk.finish:
                        return
        raise EngineUnavailable(f"{self.url} closed the stream of {rid} before its end")

    async def complete(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        rid: str | None = None,
        release: str = BASE_RELEASE,
        stop_ids: Sequence[int] = (),
        priority: int = 1,
        extra_key: str | None = None,
    ) -> Completion:
        """Sample a whole answer. Raises as `stream`; an engine that fails in the middle is an EngineError."""
        body = await self._request(prompt_ids, release, sampling_body(sampling, stop_ids), rid, priority, extra_key)
        answer = await self._json("POST", "/generate", body)
        self._heard(answer["meta_info"])
        chunk = AnswerReader(body.get("lora_path"), sampling).read(answer)
        if chunk.finish is None or chunk.finish is Finish.ERROR:
            raise EngineError(f"{self.url} gave up: {answer['meta_info']['finish_reason']}")
        return Completion(chunk.ids, chunk.logprobs, chunk.kept_mass, chunk.finish, chunk.spans, chunk.matched_stop)

    async def score(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        *,
        release: str = BASE_RELEASE,
        priority: int = 1,
        extra_key: str | None = None,
    ) -> tuple[float, ...]:
        """log p(response_ids[i] | prompt_ids, response_ids[:i]) at T = 1, full vocabulary, [R]; the first token too.
        NaN where the engine's own value was no finite number."""
        if not prompt_ids or not response_ids:
            raise ValueError(f"nothing to score: {len(prompt_ids)} prompt ids, {len(response_ids)} response ids")
        start = len(prompt_ids) - 1  # one position early: an engine gives no logprob for the first one asked for
        ids = [*prompt_ids, *response_ids]
        body = await self._request(ids, release, {"max_new_tokens": 0, "temperature": 1.0}, None, priority, extra_key)
        answer = await self._json("POST", "/generate", body | {"logprob_start_len": start})
        self._heard(answer["meta_info"])
        if (reason := answer["meta_info"]["finish_reason"])["type"] == "abort":
            raise EngineError(f"{self.url} gave up scoring: {reason.get('message')}")
        scored = answer["meta_info"]["input_token_logprobs"][1:]
        if [entry[1] for entry in scored] != list(response_ids):
            raise EngineError(
                f"asked for logprobs of {len(response_ids)} ids, got {len(scored)} or others: {scored[:3]}"
            )
        return tuple(float("nan") if entry[0] is None else float(entry[0]) for entry in scored)

    async def abort(self, rid: str) -> None:
        await self._json("POST", "/abort_request", {"rid": rid})

    # -------------------------------------------------------------------------------------------------- weights

    async def info(self) -> EngineInfo:
        model = await self._json("GET", "/model_info")
        server = await self._json("GET", "/server_info")
        config = {} if "vocab_size" in model else _model_config(model["model_path"])
        info = EngineInfo(
            model_path=model["model_path"],
            vocab_size=int(model.get("vocab_size") or config["vocab_size"]),
            max_context=int(server.get("context_length") or config["max_position_embeddings"]),
            weight_version=release_name(model["weight_version"]),
            adapters=dict(model.get("adapters") or {}),
        )
        self._vocab_size, self._weight_version = info.vocab_size, info.weight_version
        return info

    async def healthy(self) -> bool:
        try:
            async with self._call("GET", "/health"):
                return True
        except EngineError:
            return False

    async def load_adapter(self, release: str, folder: Path) -> None:
        """Load an adapter under the release's name; loading what is loaded is no error. Raises EngineRejected."""
        if release == BASE_RELEASE:
            raise ValueError(f"{BASE_RELEASE!r} names the model without an adapter; no adapter can have that name")
        body = {"lora_name": release, "lora_path": str(folder.resolve())}
        await self._json("POST", "/load_lora_adapter", body)

    async def unload_adapter(self, release: str) -> None:
        """Take new requests away from an adapter; answers that began with it finish on it. Raises ReleaseNotLoaded."""
        await self._json("POST", "/unload_lora_adapter", {"lora_name": release})

    async def update_weights(self, folder: Path, release: str, *, abort: bool = False) -> None:
        """Replace the full weights; running answers drain first, or are aborted. Raises EngineRejected."""
        body = {"model_path": str(folder.resolve()), "weight_version": release, "abort_all_requests": abort}
        await self._json("POST", "/update_weights_from_disk", body)
        self._weight_version = release

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Stop sampling. Running answers end (abort), go on later with their KV made anew (retract) or as it is."""
        await self._json("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._json("POST", "/continue_generation", {})

    async def flush_cache(self) -> None:
        async with self._call("POST", "/flush_cache"):
            pass

    # ---------------------------------------------------------------------------------------------------- HTTP

    async def _request(
        self,
        ids: Sequence[int],
        release: str,
        sampling: dict[str, Any],
        rid: str | None,
        priority: int,
        extra_key: str | None,
    ) -> dict[str, Any]:
        """The body of /generate. Raises EngineRejected on ids that no engine can embed: SGLang would die of them."""
        if self._vocab_size is None:
            await self.info()
        assert self._vocab_size is not None
        if not ids or min(ids) < 0 or max(ids) >= self._vocab_size:
            outside = [i for i in ids if not 0 <= i < self._vocab_size]
            raise EngineRejected(f"{len(ids)} ids, {outside[:4]} of them outside the vocabulary of {self._vocab_size}")
        adapter = await self._adapter(release)
        return {
            "rid": rid or uuid.uuid4().hex,
            "input_ids": list(ids),
            "sampling_params": sampling,
            "return_logprob": True,
            "priority": priority,
            **({"lora_path": adapter} if adapter else {}),
            **({"extra_key": extra_key} if extra_key else {}),
        }

    async def _adapter(self, release: str) -> str | None:
        """The adapter that serves a release; None where the server's own weights are that release."""
        if release in self._adapters:
            return release
        if release != self._weight_version:
            await self.info()
        if release == self._weight_version:
            return None
        if release == BASE_RELEASE:
            raise ReleaseNotLoaded(f"{self.url} serves the full weights {self._weight_version}, not {BASE_RELEASE}")
        self._adapters.add(release)
        return release

    def _heard(self, meta: Mapping[str, Any]) -> None:
        if "weight_version" in meta:
            self._weight_version = release_name(meta["weight_version"])

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        async with self._call(method, path, body) as response:
            return orjson.loads(await response.read())

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One exchange; anything but 200 and any failure of the network becomes an EngineError."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        data = None if body is None else orjson.dumps(body)
        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.request(method, self.url + path, data=data, headers=headers) as response:
                if response.status != 200:
                    error = _refusal(response.status, await response.text(), body or {})
                    if isinstance(error, ReleaseNotLoaded):
                        self._adapters.clear()  # ask again which releases are adapters
                    raise error
                yield response
        except TimeoutError as late:
            raise EngineUnavailable(f"{self.url}{path}: no answer within {self._timeout.total} s") from late
        except aiohttp.ClientError as broken:
            raise EngineUnavailable(f"{self.url}{path}: {broken or type(broken).__name__}") from broken


def sampling_body(sampling: Sampling, stop_ids: Sequence[int]) -> dict[str, Any]:
    """`sampling_params` as SGLang names them."""
    body: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": list(stop_ids),
    }
    if sampling.seed is not None:
        body["sampling_seed"] = sampling.seed
    if sampling.grammar is not None:
        body[sampling.grammar.kind] = sampling.grammar.text
    return body


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """The JSON texts of the server-sent events, as many as there are at a time, up to [DONE]."""
    rest = b""
    async for data in response.content.iter_any():
        *whole, rest = (rest + data).split(b"\n\n")
        lines = [line.strip().removeprefix(b"data:").strip() for line in whole]
        texts = [line for line in lines if line and line != b"[DONE]" and not line.startswith(b":")]
        if texts:
            yield texts
        if b"[DONE]" in lines:
            return


def _refusal(status: int, text: str, body: Mapping[str, Any]) -> EngineError:
    message = message_of(text)
    if status == 503:
        return EngineUnavailable(message)
    adapter = body.get("lora_name") or ("lora_path" in body and body["lora_path"])
    absent = "lora" in message.lower() and ("never been loaded" in message or "not loaded" in message)
    if status == 404 or (adapter and absent):
        return ReleaseNotLoaded(message)
    return EngineRejected(message) if status in (400, 422) else EngineError(f"HTTP {status}: {message}")


def _model_config(model_path: str) -> dict[str, Any]:
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise EngineError(f"the engine does not say its vocabulary, and {path} cannot be read here to find it out")
    config: dict[str, Any] = json.loads(path.read_text())
    config.update(config.get("text_config", {}))
    return config
