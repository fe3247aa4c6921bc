"""The learner: lessons in, checkpoints and candidates out. It calls nobody but the engine, for re-answers.

    oldest lesson's policy ─▶ lease ─▶ head ─▶ claim ─▶ prepare ─▶ update ─▶ claim … ─▶ commit ─▶ next policy
                                                        view, re-answer,                checkpoint, release, uses:
                                                        sample | drop                   one compare-and-swap

Policies take turns on one resident base: a turn ends with a checkpoint, or when there is nothing to learn. The next one
is again that with the oldest lesson, so none waits longer than what was said before it takes.

A crash at any point loses nothing: what is not committed leaves no trace but claimed lessons, and those return to the
pool with the next epoch of the lease. A head that moved (a candidate was rejected, a release rolled back) means: throw
away what is not committed, load the new head, go on. One worker thread does all heavy work, one job at a time, so that
the lease is renewed meanwhile and an abandoned job never meets its successor.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from agent_rl.engine import Engine, EngineError
from agent_rl.experience import lessons as pool
from agent_rl.experience import lineage
from agent_rl.experience.lineage import HeadMoved, LeaseLost
from agent_rl.experience.store import Store, StoreUnavailable
from agent_rl.intake import Admitted, Intake, Refusal, Views
from agent_rl.methods import METHODS
from agent_rl.models import ModelError, base_hash, tokenizer_hash
from agent_rl.objectives.rows import Rows
from agent_rl.rendering import Renderer
from agent_rl.settings import LearnerSettings, Settings
from agent_rl.teachers.own import TEACHERS
from agent_rl.training.backend import Backend, NotFinite, means
from agent_rl.training.torch_backend import TorchBackend
from agent_rl.types import (
    BASE_RELEASE,
    Checkpoint,
    DropReason,
    Lease,
    Lesson,
    Release,
    ReleaseState,
    Sample,
    StepMetrics,
)

log = logging.getLogger("agent_rl.learner")
T = TypeVar("T")
POLL_S = 0.25  # pause when there is nothing to learn
BROKEN_S = 60.0  # a policy whose head cannot be loaded is left alone for so long


class Method(Views, Protocol):
    """How lessons become updates; the loop and the backend are blind to it."""

    @property
    def name(self) -> str: ...

    @property
    def min_gap(self) -> float:
        """Least mean reverse KL between student and teacher for a turn to be a lesson, nats per token."""

    def loss(self, rows: Rows) -> Tensor:
        """Per response token."""


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Learn until `stop`. Whatever is lost on the way (lease, SQL, engine), it starts over from the policy's head."""
    with ThreadPoolExecutor(1, "learner", initializer=_behave, initargs=(settings.learner.threads,)) as worker:
        learner = await _assemble(settings, worker)
        try:
            while not stop.is_set():
                try:
                    await learner.hold(stop)
                except (LeaseLost, StoreUnavailable, EngineError) as error:
                    log.warning("starting over from the head: %s", error)
                    await _pause(stop, 1.0)
        finally:
            await learner.engine.close()
            await learner.store.close()


@dataclass
class Learner:
    settings: Settings
    store: Store
    engine: Engine
    intake: Intake
    backend: Backend
    method: Method
    base: str  # hash of the base
    tokenizer: str  # hash of the tokenizer
    worker: ThreadPoolExecutor
    owner: str  # the same for a learner that is started again, so that it need not wait for its own old lease
    loaded: tuple[str, str | None] | None = None  # policy and checkpoint that the backend is, bit by bit
    broken: dict[str, float] = field(default_factory=dict)  # policy whose head cannot be loaded → when to try again

    @property
    def options(self) -> LearnerSettings:
        return self.settings.learner

    # ------------------------------------------------------------------------------------------- the loop
    async def hold(self, stop: asyncio.Event) -> None:
        """One turn of the policy that has waited longest; a short rest where none waits."""
        held = await self._acquire()
        if held is None:
            await _pause(stop, POLL_S)
            return
        policy_id, lease = held
        try:
            async with _renewed(self.store, lease, self.options.lease_s):
                await self.follow(policy_id, lease, stop)
        except ModelError:
            log.exception("policy %s cannot be learned for now", policy_id)
            self.broken[policy_id] = time.monotonic() + BROKEN_S
            self.loaded = None
        finally:
            await asyncio.shield(lineage.release_lease(self.store, lease))

    async def follow(self, policy_id: str, lease: Lease, stop: asyncio.Event) -> None:
        """Load the head and add one checkpoint to it, unless there is nothing to learn or the head is moved by somebody
        else. A part of a checkpoint is kept open for a while, but not where another policy waits."""
        head = await lineage.head(self.store, policy_id)
        await self.load(policy_id, head)
        steps: list[StepMetrics] = []
        learned_at = time.monotonic()
        while await lineage.head(self.store, policy_id) == head:
            lessons = [] if stop.is_set() else await self._claim(lease)
            if lessons:
                steps += await self.learn(lease, head, lessons, bool(steps))
                learned_at = time.monotonic()
            part = 0 < len(lessons) < self.options.lessons_per_step
            late = not lessons and time.monotonic() - learned_at >= self.options.max_wait_s
            enough = part or late or stop.is_set() or (not lessons and await self._others_wait(policy_id))
            if steps and (enough or len(steps) >= self.options.steps_per_checkpoint):
                try:
                    await self.commit(policy_id, lease, head, steps)
                except HeadMoved:
                    break
                return
            if not steps and (not lessons or await self._others_wait(policy_id)):
                return
            if not lessons:
                await _pause(stop, POLL_S)
        self.loaded = None
        log.info("the head of %s was moved; %d uncommitted steps are thrown away", policy_id, len(steps))
        await pool.release_lessons(self.store, lease, [lesson for step in steps for lesson in step.lesson_ids])

    async def load(self, policy_id: str, head: Checkpoint | None) -> None:
        """Become this policy at its head: adapter, optimizer and EMA; nothing to do where that is what was last."""
        at = (policy_id, head.checkpoint_id if head else None)
        if self.loaded == at:
            return
        self.loaded = None
        await self.work(self.backend.load, Path(head.path) if head else None)
        self.loaded = at
        log.info("learning for policy %s from step %d", policy_id, self.backend.steps)

    async def learn(
        self, lease: Lease, head: Checkpoint | None, lessons: Sequence[Lesson], uncommitted: bool
    ) -> list[StepMetrics]:
        """One update by these lessons; none where every one of them is dropped."""
        admitted, refused = await self.intake.admit(lessons, head)
        await self.drop(lease, refused)
        if not admitted:
            return []
        seed = self.options.seed + self.backend.steps
        again = self.intake.replays(await pool.claim_replays(self.store, lease, self.options.replays_per_step, seed))
        on_head = not uncommitted and {s.release for x in lessons for s in x.evidence.transcript.turn.spans} == {
            _release_id(lease.policy_id, head)
        }
        try:
            self.loaded = None  # until what changes now is committed
            step, weak = await self.work(self.update, admitted, again, on_head)
        except NotFinite as error:
            await self.drop(lease, [Refusal(a.own.lesson_id, DropReason.NOT_FINITE, str(error)) for a in admitted])
            return []
        await self.drop(lease, weak)
        return [step] if step else []

    async def drop(self, lease: Lease, refused: Sequence[Refusal]) -> None:
        for refusal in refused:
            log.info("lesson %s dropped, %s: %s", refusal.lesson_id, refusal.reason.value, refusal.detail)
            await pool.drop(self.store, lease, refusal.lesson_id, refusal.reason, refusal.detail)

    def update(
        self, admitted: list[Admitted], again: list[Sample], on_head: bool
    ) -> tuple[StepMetrics | None, list[Refusal]]:
        """One step of the optimizer (in the worker), and the lessons on which student and teacher agree anyway."""
        start = time.perf_counter()
        fresh = [a.own for a in admitted]
        scores = self.backend.forward_backward(fresh, self.method.loss, self.method.min_gap)
        learned = [s for s, score in zip(fresh, scores, strict=True) if score.loss is not None]
        weak = [
            Refusal(s.lesson_id, DropReason.WEAK_SIGNAL, f"reverse KL {score.reverse_kl:.4f} < {self.method.min_gap}")
            for s, score in zip(fresh, scores, strict=True)
            if score.loss is None
        ]
        if not learned:
            return None, weak
        if again:
            scores += self.backend.forward_backward(again, self.method.loss)
        kept = {s.lesson_id for s in learned}
        shown = [a.reanswer for a in admitted if a.reanswer and a.reanswer.lesson_id in kept]
        reanswers = self.backend.forward_backward(shown, self.method.loss) if shown else []
        lr = self.options.lr * math.sqrt(len(learned) / self.options.lessons_per_step)
        norm = self.backend.step(lr)
        scored = [score for score in scores if score.loss is not None]
        values = means(scored) | {"on_head": float(on_head), "reanswers": float(len(shown))}
        values |= {f"reanswer_{name}": value for name, value in (means(reanswers) if reanswers else {}).items()}
        scored += reanswers
        tokens = sum(score.tokens for score in scored)
        step = StepMetrics(
            step=self.backend.steps,
            method=self.method.name,
            lesson_ids=tuple(s.lesson_id for s in learned),
            replay_ids=tuple(s.lesson_id for s in again),
            tokens=tokens,
            loss=sum(score.loss or 0.0 for score in scored) / tokens,
            grad_norm=norm,
            lr=lr,
            seconds=time.perf_counter() - start,
            values=values,
        )
        log.info(
            "step %d: %d lessons, %d replays, %d tokens, loss %.4f, reverse KL %.4f, %.1f s",
            *(step.step, len(learned), len(again), tokens, step.loss, step.values["reverse_kl"], step.seconds),
        )
        return step, weak

    async def commit(self, policy_id: str, lease: Lease, head: Checkpoint | None, steps: Sequence[StepMetrics]) -> None:
        """Write the checkpoint and the candidate, then the rows. Raises HeadMoved, LeaseLost."""
        root = self.settings.checkpoints_dir / policy_id
        parent_id = head.checkpoint_id if head else None
        checkpoint_id = await self.work(self.backend.save, root, parent_id, policy_id)
        now, step = time.time(), self.backend.steps
        checkpoint = Checkpoint(
            checkpoint_id, policy_id, parent_id, step, str(root / checkpoint_id), self.method.name, now
        )
        release_id = _release_id(policy_id, checkpoint)
        folder = self.settings.releases_dir / release_id
        release = Release(
            release_id=release_id,
            policy_id=policy_id,
            checkpoint_id=checkpoint_id,
            kind="adapter" if self.options.tuning == "lora" else "full",
            path=str(folder),
            base_hash=self.base,
            checksum=await self.work(self.backend.export, folder),
            tokenizer_hash=self.tokenizer,
            state=ReleaseState.STAGED,
            created_at=now,
            step=step,
        )
        await lineage.commit(self.store, lease, checkpoint, steps, release)
        self.loaded = (policy_id, checkpoint_id)
        log.info("release %s staged: %d steps", release_id, len(steps))

    # ----------------------------------------------------------------------------------------------- means
    async def work(self, job: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.worker, lambda: job(*args))

    async def _claim(self, lease: Lease) -> list[Lesson]:
        """A full batch, or what there is once the oldest has waited long enough."""
        n, wait_s = self.options.lessons_per_step, self.options.max_wait_s
        return await pool.claim_lessons(self.store, lease, n, min_age_s=wait_s)

    async def _waiting(self) -> list[str]:
        """Policies with something to learn, and not broken, by the age of their oldest lesson."""
        n, wait_s = self.options.lessons_per_step, self.options.max_wait_s
        found = await pool.waiting(self.store, self.base, self.owner, n, min_age_s=wait_s)
        return [policy_id for policy_id in found if self.broken.get(policy_id, 0.0) < time.monotonic()]

    async def _others_wait(self, policy_id: str) -> bool:
        return any(other != policy_id for other in await self._waiting())

    async def _acquire(self) -> tuple[str, Lease] | None:
        for policy_id in await self._waiting():
            lease = await lineage.acquire(self.store, policy_id, self.owner, self.options.lease_s)
            if lease:
                return policy_id, lease
        return None


async def _assemble(settings: Settings, worker: ThreadPoolExecutor) -> Learner:
    options, folder = settings.learner, settings.engine.model
    if folder is None or settings.engine.url is None:
        raise ValueError("the learner needs engine.model and engine.url; `agent-rl serve` sets both")
    chosen = options.method
    method = METHODS[chosen.type](**chosen.model_dump(exclude={"type"}))
    teacher = TEACHERS[options.teacher](options.ema_rate)
    loop = asyncio.get_running_loop()
    backend = await loop.run_in_executor(worker, TorchBackend, folder, options, teacher)
    engine = Engine(settings.engine.url)
    store = await Store.open(settings.database_url)
    intake = Intake(options, store, engine, Renderer(folder), method)
    base, tokenizer = base_hash(folder), tokenizer_hash(folder)
    owner = f"{socket.gethostname()}:{settings.home.resolve()}"
    return Learner(settings, store, engine, intake, backend, method, base, tokenizer, worker, owner)


@asynccontextmanager
async def _renewed(store: Store, lease: Lease, ttl_s: float) -> AsyncIterator[None]:
    """Renew the lease as long as the block runs; when it is lost, the block is cancelled and LeaseLost raised."""
    try:
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(_renew(store, lease, ttl_s))
            yield
            renewing.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _renew(store: Store, lease: Lease, ttl_s: float) -> None:
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            await lineage.renew(store, lease, ttl_s)
        except StoreUnavailable as error:  # the epoch still fences; somebody else may take over meanwhile
            log.warning("the lease could not be renewed: %s", error)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


def _behave(threads: int) -> None:
    """The worker thread gives way to whoever serves (on Linux a thread has its own niceness)."""
    os.nice(10)
    torch.set_num_threads(threads)


def _release_id(policy_id: str, checkpoint: Checkpoint | None) -> str:
    """Readable, and in the order of steps within a policy."""
    if checkpoint is None:
        return BASE_RELEASE
    name = policy_id
    if len(name) > 40:  # an id has 64 characters, and two policies are never called the same
        name = f"{policy_id[:23]}-{hashlib.sha256(policy_id.encode()).hexdigest()[:16]}"
    return f"{name}-{checkpoint.step:05d}-{checkpoint.checkpoint_id[:8]}"
