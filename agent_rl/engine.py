"""The one client of the engine protocol, a stated subset of SGLang's HTTP interface. Gateway, judge, exam and
teachers all speak through it, whether the server is ours or SGLang.

    POST /generate            ids in; ids, logprobs and version spans out; streaming; prompt scoring
    POST /load_lora_adapter, /unload_lora_adapter, /update_weights_from_disk, /weights_checker
    POST /abort_request, /pause_generation, /continue_generation, /flush_cache
    GET  /health, /model_info, /server_info

Ours adds to SGLang's answers, all under `meta_info`: `output_token_kept_mass` (a list of float or null per output
token) and truthful nulls in `output_token_logprobs` where sampling was greedy, penalised or grammar-forced; to its
requests: `priority` (0 is a user's request, larger is less urgent) and `/model_info`'s `adapters` {name: checksum}.
A release is served by its name: BASE_RELEASE without an adapter, any other as `lora_path` (adapters) or as the
server's weight version (full weights).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent_rl.types import BASE_RELEASE, Finish, Sampling, Span


class EngineError(RuntimeError):
    """The engine answered with something that is neither an answer nor a known refusal."""


class EngineUnavailable(EngineError, ConnectionError):
    """Nobody answers, or the server is still starting; try again."""


class EngineRejected(EngineError, ValueError):
    """The engine refuses this request (too long, bad parameter); trying again does not help."""


class ReleaseNotLoaded(EngineError, LookupError):
    """The engine does not have this release (yet)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event of a stream adds."""

    ids: tuple[int, ...]  # [C]
    logprobs: tuple[float | None, ...]  # [C]
    kept_mass: tuple[float | None, ...]  # [C] None where nothing was cut or the server does not say
    finish: Finish | None = None  # on the last chunk
    matched_stop: str | None = None  # the stop string that ended it, if one did
    spans: tuple[Span, ...] = ()  # on the last chunk: of the whole response


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    ids: tuple[int, ...]  # [R]
    logprobs: tuple[float | None, ...]  # [R]
    kept_mass: tuple[float | None, ...]  # [R]
    finish: Finish
    spans: tuple[Span, ...]


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
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        rid: str,
        release: str = BASE_RELEASE,
        stop_ids: Sequence[int] = (),
        priority: int = 0,
    ) -> AsyncIterator[Chunk]:
        """Sample an answer token by token. Closing the iterator early aborts the request on the server.

        Raises EngineRejected, ReleaseNotLoaded, EngineUnavailable.
        """
        raise NotImplementedError

    async def complete(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        rid: str | None = None,
        release: str = BASE_RELEASE,
        stop_ids: Sequence[int] = (),
        priority: int = 1,
    ) -> Completion:
        """Sample a whole answer."""
        raise NotImplementedError

    async def score(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], *, release: str = BASE_RELEASE, priority: int = 1
    ) -> tuple[float, ...]:
        """log p(response_ids[i] | prompt_ids, response_ids[:i]) at T = 1, full vocabulary, [R]; the first token too."""
        raise NotImplementedError

    async def info(self) -> EngineInfo:
        raise NotImplementedError

    async def healthy(self) -> bool:
        raise NotImplementedError

    async def abort(self, rid: str) -> None:
        raise NotImplementedError

    async def load_adapter(self, release: str, folder: Path) -> None:
        """Load an adapter under the release's name; loading what is loaded is no error."""
        raise NotImplementedError

    async def unload_adapter(self, release: str) -> None:
        """Take new requests away from an adapter; answers that began with it finish on it."""
        raise NotImplementedError

    async def update_weights(self, folder: Path, release: str, *, abort: bool = False) -> None:
        """Replace the full weights; running answers drain first, or are aborted."""
        raise NotImplementedError

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        raise NotImplementedError

    async def resume(self) -> None:
        raise NotImplementedError

    async def flush_cache(self) -> None:
        raise NotImplementedError
