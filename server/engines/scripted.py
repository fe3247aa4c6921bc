"""The engine that answers from a script, with the timing of a real one: for tests and demonstrations without a model.

    {"first_token_s": 0.05, "token_s": 0.01, "default": {"text": "Okay."},
     "rules": [{"user": "capital of France", "text": "Paris."},
               {"user": "capital", "release": "r1", "text": "Ask me of France.", "logprob": -0.5},
               {"prompt": "<tired>", "text": "I am …", "abort_after": 2},
               {"user": "go away", "unavailable": true}]}

The first rule that fits answers. `user` is searched in the last user message, `prompt` in the whole prompt with its
markup, both as regular expressions; `release` is an adapter's name or the weight version. Sampling parameters change
nothing but where an answer ends and whether its tokens have logprobs; a grammar asks for nothing that the script says.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from itertools import chain, islice, repeat, takewhile
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_rl.models import ModelError, load_adapter, load_tokenizer, tensors_checksum
from agent_rl.settings import Settings
from agent_rl.types import BASE_RELEASE
from server.engines import protocol
from server.engines.contract import (
    ABORTED,
    Busy,
    Description,
    GenerateRequest,
    PauseMode,
    Piece,
    Refused,
    length_reached,
)
from server.engines.stopping import Stopper

PROBE = "\x01"  # a message that no template holds


class Rule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = ""
    user: str | None = None
    prompt: str | None = None
    release: str | None = None
    logprob: float | list[float] = -0.1
    """Of each token of the answer, end marker included; a list says them one by one, then repeats its last. Scoring a
    prompt gives the same ones."""
    first_token_s: float | None = None
    token_s: float | None = None
    abort_after: int | None = None
    """Tokens after which the engine gives the answer up."""
    unavailable: bool = False
    """Whether the request is answered 503."""

    def fits(self, user: str, prompt: str, release: str) -> bool:
        return (
            (self.user is None or re.search(self.user, user) is not None)
            and (self.prompt is None or re.search(self.prompt, prompt) is not None)
            and (self.release is None or self.release == release)
        )

    def logprobs(self, count: int) -> list[float]:
        given = self.logprob if isinstance(self.logprob, list) else [self.logprob]
        return list(islice(chain(given, repeat(given[-1])), count))


class Script(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: list[Rule] = []
    default: Rule = Rule(text="Okay.")
    first_token_s: float = Field(0.0, ge=0)
    token_s: float = Field(0.0, ge=0)

    def rule(self, user: str, prompt: str, release: str) -> Rule:
        return next((rule for rule in self.rules if rule.fits(user, prompt, release)), self.default)


def read_script(path: Path | None) -> Script:
    """Raises ValueError, with every rule that cannot be used."""
    if path is None:
        return Script()
    try:
        return Script.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{path} is no script for the scripted engine: {error}") from error


@dataclass(slots=True, eq=False)
class Job:
    """One answer in progress."""

    kv_version: str | None = None  # the weights behind its KV; None: still to be computed
    ids: list[int] = field(default_factory=list)
    started: bool = False
    aborted: bool = False
    retractions: int = 0
    nap: asyncio.Future[None] | None = None

    def abort(self) -> None:
        self.aborted = True
        if self.nap:
            _wake(self.nap)


class ScriptedEngine:
    """An EngineServer; all state lives in the event loop."""

    def __init__(self, folder: Path, script: Script, max_context: int) -> None:
        self.folder = folder
        self.script = script
        self.max_context = max_context
        self.tokenizer = load_tokenizer(folder)
        self.last_user = last_user_reader(self.tokenizer)
        self.version = BASE_RELEASE
        self.adapters: dict[str, str] = {}  # name → checksum
        self.jobs: dict[str, Job] = {}
        self.paused = False
        self.swapping = False
        self.changed = asyncio.Condition()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece, None]:
        if request.rid in self.jobs:
            raise Refused(f"a request {request.rid} is being answered already")
        job = self.jobs[request.rid] = Job()
        try:
            await self._until(job, lambda: not self.paused and not self.swapping)
            job.started = True
            if request.scores:
                yield self._score(request)
                return
            async for piece in self._sample(request, job):
                yield piece
        finally:
            del self.jobs[request.rid]
            async with self.changed:
                self.changed.notify_all()

    async def _sample(self, request: GenerateRequest, job: Job) -> AsyncGenerator[Piece, None]:
        rule, params = self._rule(request, request.input_ids), request.sampling_params
        if rule.unavailable:
            raise Busy("the script makes this request unavailable")
        eos = [self.tokenizer.eos_token_id]
        ids = [*self.tokenizer.encode(rule.text, add_special_tokens=False), (params.stop_token_ids or eos)[0]]
        stopper = Stopper(params, eos, self.tokenizer.decode)
        first_s = self.script.first_token_s if rule.first_token_s is None else rule.first_token_s
        token_s = self.script.token_s if rule.token_s is None else rule.token_s
        for token, logprob in zip(ids, rule.logprobs(len(ids)), strict=True):
            await self._sleep(job, token_s if job.ids else first_s)
            await self._until(job, lambda: not self.paused)
            if job.aborted or len(job.ids) == rule.abort_after:
                yield Piece(self.version, finish=ABORTED, retractions=job.retractions)
                return
            job.ids.append(token)
            job.kv_version = job.kv_version or self.version
            finish = stopper.reason(job.ids) or (
                {"type": "stop", "matched": token} if len(job.ids) == len(ids) else None
            )
            yield Piece(
                version=self.version,
                ids=(token,),
                logprobs=(None if params.ratio_free else logprob,),
                kept_mass=(1.0 if params.truncates or params.grammar else None,),
                kv_mixed=job.kv_version != self.version,
                finish=finish,
                retractions=job.retractions,
            )
            if finish:
                return

    def _score(self, request: GenerateRequest) -> Piece:
        if request.logprob_start_len < 0:
            return Piece(self.version, finish=length_reached(0))
        prompt = request.input_ids[: request.logprob_start_len + 1]
        count = len(request.input_ids) - len(prompt)
        logprobs = tuple(self._rule(request, prompt).logprobs(count))
        return Piece(self.version, finish=length_reached(0), prompt_logprobs=logprobs)

    def _rule(self, request: GenerateRequest, prompt_ids: list[int]) -> Rule:
        prompt = self.tokenizer.decode(prompt_ids)
        return self.script.rule(self.last_user(prompt), prompt, request.lora_path or self.version)

    async def abort(self, rid: str) -> None:
        if rid in self.jobs:
            self.jobs[rid].abort()
        await self._notify()

    async def load_adapter(self, name: str, folder: Path) -> None:
        try:
            checksum = tensors_checksum(load_adapter(folder)[1])
        except ModelError as error:
            raise Refused(str(error)) from error
        if self.adapters.setdefault(name, checksum) != checksum:
            raise Refused(f"adapter {name} is loaded already, with other weights; a release has one name for ever")

    async def unload_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is None:
            raise Refused(f"LoRA adapter {name} is not loaded")

    async def update_weights(self, folder: Path, version: str, abort: bool) -> None:
        if not (folder / "config.json").is_file():
            raise Refused(f"{folder} is no model folder: it has no config.json")
        if self.adapters:
            raise Refused(f"adapters {sorted(self.adapters)} belong to the weights that serve; unload them first")
        self.swapping = True
        try:
            if abort:
                await self._abort_all()
            if not self.paused:
                async with self.changed:
                    await self.changed.wait_for(lambda: not any(job.started for job in self.jobs.values()))
            self.version, self.folder = version, folder
        finally:
            self.swapping = False
            await self._notify()

    async def pause(self, mode: PauseMode) -> None:
        self.paused = True
        if mode == "abort":
            await self._abort_all()
        for job in self.jobs.values():
            if mode == "retract" and job.ids:
                job.kv_version = None
                job.retractions += 1

    async def resume(self) -> None:
        self.paused = False
        await self._notify()

    async def flush_cache(self) -> None:
        """There is none."""

    def describe(self) -> Description:
        return Description(
            model_path=str(self.folder),
            vocab_size=len(self.tokenizer),
            max_context=self.max_context,
            weight_version=self.version,
            adapters=dict(self.adapters),
            paused=self.paused,
            running=sum(job.started for job in self.jobs.values()),
            waiting=sum(not job.started for job in self.jobs.values()),
        )

    async def _abort_all(self) -> None:
        for job in self.jobs.values():
            job.abort()
        await self._notify()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _until(self, job: Job, ready: Callable[[], bool]) -> None:
        if ready():
            return
        async with self.changed:
            await self.changed.wait_for(lambda: job.aborted or ready())

    async def _sleep(self, job: Job, seconds: float) -> None:
        """Let time pass, but not for an answer that is given up."""
        if seconds == 0 or job.aborted:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        job.nap = loop.create_future()
        timer = loop.call_later(seconds, _wake, job.nap)
        try:
            await job.nap
        finally:
            timer.cancel()


def _wake(nap: asyncio.Future[None]) -> None:
    if not nap.done():
        nap.set_result(None)


def last_user_reader(tokenizer: Any) -> Callable[[str], str]:
    """Finds the last user message in a prompt that ends with one, whatever the template: by a probe.

    A prompt of another form reads as a whole.
    """
    first = [{"role": "user", "content": PROBE}]
    later = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}, *first]
    probes = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in (first, later)]
    befores, afters = zip(*(probe.split(PROBE) for probe in probes), strict=True)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(*(reversed(before) for before in befores), strict=False))
    opening = "".join(pair[0] for pair in alike)[::-1]
    after = afters[0]

    def last_user(prompt: str) -> str:
        start = prompt.rfind(opening)
        if start < 0 or not prompt.endswith(after):
            return prompt
        return prompt[start + len(opening) : len(prompt) - len(after)]

    return last_user


def create_app(settings: Settings) -> FastAPI:
    """The scripted engine of these settings. Raises ValueError where the script or the model folder cannot be used."""
    assert settings.engine.model is not None
    script = read_script(settings.engine.script)
    engine = ScriptedEngine(settings.engine.model, script, settings.engine.max_context)
    return protocol.create_app(engine, settings.engine.admin_key)
