"""Our engine: any Hugging Face causal language model folder behind the engine protocol.

One thread owns the model and steps the scheduler; the event loop hands requests over and gets pieces back, once per
step for all of them together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch
from fastapi import FastAPI

from agent_rl.models import load_tokenizer
from agent_rl.settings import EngineSettings, Settings
from server.engines import protocol
from server.engines.contract import Description, GenerateRequest, PauseMode, Piece, Refused
from server.engines.grammar import Grammars, Matcher
from server.engines.runner import Runner
from server.engines.scheduler import MAX_CHUNK, Scheduler, Swap
from server.engines.stopping import Stopper
from server.engines.work import Work

log = logging.getLogger("agent_rl.engine")
T = TypeVar("T")
Delivery = tuple[asyncio.Queue[Piece], Piece]


class TorchEngine:
    """An EngineServer. `start` it inside the event loop that it serves; `close` it."""

    def __init__(self, settings: EngineSettings) -> None:
        assert settings.model is not None
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model)
        self.inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.outbox: list[Delivery] = []
        self.closed = False
        self.ready: Future[None] = Future()

    async def start(self) -> None:
        """Load the model. Raises ModelError."""
        self.loop = asyncio.get_running_loop()
        self.thread = Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()
        await asyncio.wrap_future(self.ready)

    async def close(self) -> None:
        def stop() -> None:
            self.scheduler.abort_all()
            self.closed = True

        self.inbox.put(stop)
        await asyncio.to_thread(self.thread.join)

    # ---------------------------------------------------------------------------------------- the event loop's

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece, None]:
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        stopper = Stopper(request.sampling_params, self.runner.eos_ids, self.tokenizer.decode)
        matcher = await self._matcher(request, stopper.stop_ids)
        work = Work(request, stopper, lambda piece: self.outbox.append((pieces, piece)), matcher)
        finished = False
        try:
            await self._do(lambda: self.scheduler.submit(work))
            while not finished:
                piece = await pieces.get()
                finished = piece.finish is not None
                yield piece
        finally:
            if not finished:
                self.inbox.put(lambda: self.scheduler.give_up(work))

    async def _matcher(self, request: GenerateRequest, ends: frozenset[int]) -> Matcher | None:
        """Compiled away from both threads: a large schema takes its time. Raises Refused."""
        grammar = request.sampling_params.grammar
        return None if grammar is None else await asyncio.to_thread(self.grammars.matcher, grammar, ends)

    async def abort(self, rid: str) -> None:
        await self._do(lambda: self.scheduler.abort(rid))

    async def load_adapter(self, name: str, folder: Path) -> None:
        await self._do(lambda: self.scheduler.load_adapter(name, folder))

    async def unload_adapter(self, name: str) -> None:
        await self._do(lambda: self.scheduler.unload_adapter(name))

    async def update_weights(self, folder: Path, version: str, abort: bool) -> None:
        if not (folder / "config.json").is_file():
            raise Refused(f"{folder} is no model folder: it has no config.json")
        done: Future[None] = Future()
        await self._do(lambda: self.scheduler.plan_swap(Swap(folder, version, done), abort))
        await asyncio.wrap_future(done)

    async def pause(self, mode: PauseMode) -> None:
        await self._do(lambda: self.scheduler.pause(mode))

    async def resume(self) -> None:
        await self._do(self.scheduler.resume)

    async def flush_cache(self) -> None:
        await self._do(self.scheduler.prefixes.forget)

    def describe(self) -> Description:
        scheduler = self.scheduler
        return Description(
            model_path=str(self.runner.folder),
            vocab_size=self.runner.vocab_size,
            max_context=self.runner.max_context,
            weight_version=scheduler.version,
            adapters={name: a.checksum for name, a in scheduler.adapters.items() if a.wanted},
            paused=scheduler.paused,
            running=len(scheduler.rows),
            waiting=len(scheduler.waiting),
        )

    async def _do(self, command: Callable[[], T]) -> T:
        """Run a command on the engine's thread, between two steps."""
        future: Future[T] = Future()

        def act() -> None:
            if not future.set_running_or_notify_cancel():  # whoever asked has gone
                return
            try:
                future.set_result(command())
            except Exception as error:  # handed to whoever waits
                future.set_exception(error)

        self.inbox.put(act)
        return await asyncio.wrap_future(future)

    # --------------------------------------------------------------------------------------------- the thread's

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while not self.closed:
                self._obey()
                self.scheduler.step()
                self._deliver()
        except BaseException:
            log.critical("the engine's thread died; the process ends so that it is started again", exc_info=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _load(self) -> None:
        settings = self.settings
        assert settings.model is not None
        torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) - 1))
        self.runner = Runner(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            rows=settings.max_batch,
            max_context=settings.max_context,
            max_chunk=MAX_CHUNK,
        )
        self.grammars = Grammars(self.tokenizer, self.runner.vocab_size, self.runner.eos_ids)
        self.scheduler = Scheduler(
            self.runner, max_queue=settings.max_queue, prefix_cache_bytes=settings.prefix_cache_mb * 2**20
        )
        log.info("serving %s, %s, on %d threads", settings.model, self.runner.shape.dtype, torch.get_num_threads())

    def _obey(self) -> None:
        """Do what was asked meanwhile; with nothing to do, wait until something is asked."""
        try:
            while True:
                self.inbox.get(block=self.scheduler.idle and not self.closed and not self.outbox)()
        except Empty:
            return

    def _deliver(self) -> None:
        if self.outbox:
            batch, self.outbox = self.outbox, []
            self.loop.call_soon_threadsafe(_hand_out, batch)


def _hand_out(batch: list[Delivery]) -> None:
    for queue, piece in batch:
        queue.put_nowait(piece)


def create_app(settings: Settings) -> FastAPI:
    """The engine of these settings. The model is loaded when the server starts, before it listens."""
    engine = TorchEngine(settings.engine)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.close()

    return protocol.create_app(engine, settings.engine.admin_key, lifespan)
