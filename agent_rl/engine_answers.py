"""What an engine says: the events of an answer, and its errors, in SGLang's shapes and ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from agent_rl.types import BASE_RELEASE, Finish, Sampling, Span

log = logging.getLogger("agent_rl.engine")

UNNAMED_VERSION = "default"  # what SGLang calls the weights that it was started with, unless told otherwise


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
    finish: Finish | None = None  # on the last chunk; ERROR: the engine failed, what came before is what it sampled
    matched_stop: str | None = None  # the stop string that ended it, if one did
    spans: tuple[Span, ...] = ()  # on the last chunk: of the whole response
    cached_tokens: int = 0  # on the last chunk: of the prompt, those whose KV the engine had from before


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    ids: tuple[int, ...]  # [R]
    logprobs: tuple[float | None, ...]  # [R]
    kept_mass: tuple[float | None, ...]  # [R]
    finish: Finish
    spans: tuple[Span, ...]
    matched_stop: str | None = None


class AnswerReader:
    """Turns the events of one answer into chunks, whether each event repeats all that came before or only adds."""

    def __init__(self, adapter: str | None, sampling: Sampling) -> None:
        self.adapter = adapter
        self.sampling = sampling
        self.seen = 0

    def read(self, event: Mapping[str, Any]) -> Chunk:
        meta = event["meta_info"]
        all_ids, total = event["output_ids"], int(meta["completion_tokens"])
        new = total - self.seen
        if new < 0 or len(all_ids) not in (total, new):
            raise EngineError(f"an event of {len(all_ids)} ids after {self.seen} makes no answer of {total}")
        ids = tuple(all_ids[len(all_ids) - new :])
        entries = meta.get("output_token_logprobs") or []
        logprobs = _last(new, [entry[0] for entry in entries[len(entries) - new :]], "logprobs")
        kept = meta.get("output_token_kept_mass")
        kept_mass = (None,) * new if kept is None else _last(new, kept, "kept masses")
        masked = self.sampling.grammar is not None and kept is None  # its logprobs may be of the masked distribution
        self.seen = total
        reason = meta.get("finish_reason")
        return Chunk(
            ids=ids,
            logprobs=(None,) * new if self.sampling.ratio_free or masked else logprobs,
            kept_mass=kept_mass,
            finish=_finish(reason) if reason else None,
            matched_stop=reason["matched"] if reason and isinstance(reason.get("matched"), str) else None,
            spans=read_spans(meta, self.adapter) if reason else (),
            cached_tokens=int(meta.get("cached_tokens") or 0) if reason else 0,
        )


def read_spans(meta: Mapping[str, Any], adapter: str | None) -> tuple[Span, ...]:
    """Which release sampled which tokens. An adapter's answer is its own throughout, mixed where the base moved."""
    total = int(meta["completion_tokens"])
    if total == 0:
        return ()
    versions = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": total}]
    careful = int(meta.get("num_retractions") or 0) == 0  # a server that does not say: mixed unless KV was made anew
    return tuple(
        Span(adapter or release_name(v["version"]), v["start"], v["end"], bool(v.get("kv_mixed", careful and n > 0)))
        for n, v in enumerate(versions)
        if v["end"] > v["start"]
    )


def needed(texts: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Of events that came together the last alone, where it repeats the others. Raises EngineError at an error."""
    last = orjson.loads(texts[-1])
    repeats = "error" not in last and len(last["output_ids"]) == last["meta_info"]["completion_tokens"]
    for event in [last] if repeats else map(orjson.loads, texts):
        if "error" in event:
            raise EngineError(f"the engine failed: {message_of(orjson.dumps(event).decode())}")
        yield event


def _finish(reason: Mapping[str, Any]) -> Finish:
    if reason["type"] == "abort" and reason.get("status_code"):
        log.warning("the engine gave an answer up: %s", reason.get("message"))
        return Finish.ERROR
    return {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORTED}[reason["type"]]


def _last(count: int, values: Sequence[float | None], what: str) -> tuple[float | None, ...]:
    if len(values) < count:
        raise EngineError(f"{len(values)} {what} for {count} new ids")
    return tuple(values[len(values) - count :])


def message_of(text: str) -> str:
    """The words of an error in any of SGLang's shapes."""
    try:
        answer = json.loads(text)
    except ValueError:
        return text or "no message"
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("error_message") or error
    return str(error)


def release_name(weight_version: str) -> str:
    return BASE_RELEASE if weight_version == UNNAMED_VERSION else weight_version
