"""The publisher: keeps what serves equal to what is wanted, and lets a new release serve if it passes its exam.

Each round: load what is wanted and missing, unload what has drained, prove what is live, then examine the newest
candidate of each policy. Adapters of many policies lie on one engine; a policy without a release costs nothing.
Everything it decides is a row; it may die anywhere and another goes on from the rows. An engine that does not answer is
waited for: that is never a candidate's fault.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent_rl.engine import Engine, EngineError, EngineInfo, EngineRejected, EngineUnavailable, ReleaseNotLoaded
from agent_rl.exam import Examiner
from agent_rl.experience import lineage
from agent_rl.experience.store import Store
from agent_rl.monitors import is_empty
from agent_rl.release import coming_from
from agent_rl.rendering import Renderer
from agent_rl.settings import Settings
from agent_rl.types import BASE_RELEASE, Deployment, Message, Release, ReleaseState, Sampling

log = logging.getLogger("agent_rl.publisher")
ACTOR = "publisher"
CANARY_PROMPT = "What is water?"
CANARY_TOKENS = 16
MAX_FAILURES = 3  # exams that the engine breaks off though it is there: then it is the candidate's fault


class Unfit(Exception):
    """A release cannot serve: its files, its weights or its answer are not what they should be."""


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Publish until told to stop."""
    assert settings.engine.url is not None
    assert settings.engine.model is not None
    key = settings.engine.admin_key
    store = await Store.open(settings.database_url)
    engine = Engine(settings.engine.url, admin_key=key.get_secret_value() if key else None)
    try:
        publisher = Publisher(settings, store, engine, Renderer(settings.engine.model))
        while not stop.is_set():
            await _unless(stop, publisher.round())  # an exam takes a while, and can be held again
            await _pause(stop, settings.release.poll_s)
    finally:
        await engine.close()
        await store.close()


@dataclass(slots=True)
class Publisher:
    settings: Settings
    store: Store
    engine: Engine
    renderer: Renderer
    proven: set[str] = field(default_factory=set)  # live releases whose answer was seen
    unwanted: dict[str, float] = field(default_factory=dict)  # loaded adapter → since when nothing wants it
    failures: Counter[str] = field(default_factory=Counter)  # exams that the engine broke off, by release
    complaint: str = ""  # what the engine said last, so that it is logged once
    examiner: Examiner = field(init=False)

    def __post_init__(self) -> None:
        self.examiner = Examiner(self.engine, self.renderer)

    async def round(self) -> None:
        """One look at everything. An engine that does not answer ends it early; the next round goes on."""
        try:
            await self.reconcile()
            await self.unload()
            for deployment in await lineage.deployed(self.store):
                await self.advance(deployment)
            self.complaint = ""
        except EngineError as error:
            if str(error) != self.complaint:
                log.warning("waiting for the engine: %s", error)
            self.complaint = str(error)

    # -------------------------------------------------------------------------------- what is wanted, and what is

    async def reconcile(self) -> None:
        """Look after the deployments whose releases are not all there and proven."""
        info, wanted = await self.engine.info(), await lineage.wanted(self.store)
        for deployment in await lineage.deployed(self.store):
            for release in wanted.get(deployment.policy_id, []):
                there = info.weight_version if release.kind == "full" else info.adapters.get(release.release_id)
                right = release.release_id if release.kind == "full" else release.checksum
                if there != right or (release.release_id == deployment.live and deployment.live not in self.proven):
                    await self.serve(deployment)
                    break
        await self._serve_base(info.weight_version)

    async def serve(self, deployment: Deployment) -> None:
        """Load what this deployment wants, and prove its live release; one that cannot serve is rolled back."""
        for release in (await lineage.wanted(self.store)).get(deployment.policy_id, []):
            try:
                await self.load(release)
                if release.release_id == deployment.live and deployment.live not in self.proven:
                    await self.prove(release)
            except Unfit as unfit:
                await self._give_up(release, deployment, str(unfit))

    async def load(self, release: Release) -> None:
        """Bring a release into the engine if it is not there. Raises Unfit where the engine has other weights of it."""
        info = await self.engine.info()
        try:
            if release.kind == "full":
                await self._swap(info, release.release_id, Path(release.path))
                return
            if release.release_id not in info.adapters:
                await self.engine.load_adapter(release.release_id, Path(release.path))
                info = await self.engine.info()
        except EngineRejected as error:
            raise Unfit(f"the engine does not load it: {error}") from error
        loaded = info.adapters.get(release.release_id)
        if loaded != release.checksum:
            if loaded is not None:
                await self.engine.unload_adapter(release.release_id)
            raise Unfit(f"the engine has weights {loaded}, the release is {release.checksum}")

    async def prove(self, release: Release) -> None:
        """Ask the live release something: it must answer, and the answer must be its own. Raises Unfit."""
        prompt = self.renderer.render([Message("user", CANARY_PROMPT)])
        sampling = Sampling(max_tokens=CANARY_TOKENS, temperature=0.0)
        stop = self.renderer.stop_ids
        done = await self.engine.complete(prompt, sampling, release=release.release_id, stop_ids=stop, priority=1)
        sampled_by = {span.release for span in done.spans}
        if is_empty(self.renderer.answer(done.ids).content):
            raise Unfit(f"it answers {CANARY_PROMPT!r} with nothing")
        if sampled_by != {release.release_id}:
            raise Unfit(f"its answer was sampled by {sorted(sampled_by)}")
        self.proven.add(release.release_id)
        log.info("release %s serves", release.release_id)

    async def unload(self) -> None:
        """Take out the adapters of ours that nothing has wanted for `drain_s`; a rejected one at once."""
        loaded = (await self.engine.info()).adapters
        wanted = {r.release_id for of_policy in (await lineage.wanted(self.store)).values() for r in of_policy}
        now = time.monotonic()
        self.unwanted = {name: self.unwanted.get(name, now) for name in loaded if name not in wanted}
        for name, since in list(self.unwanted.items()):
            release = await lineage.find_release(self.store, name)
            if release is None or release.release_id != name:
                continue  # not ours to take out
            if release.state in (ReleaseState.STAGED, ReleaseState.EXAMINING):
                continue
            never_served = release.state is ReleaseState.REJECTED and name not in self.proven
            if never_served or now - since >= self.settings.release.drain_s:
                await self.engine.unload_adapter(name)
                log.info("release %s unloaded", name)

    async def _serve_base(self, weights: str) -> None:
        """Full weights of a release whose policy is back at its base give way to the base."""
        release = await lineage.find_release(self.store, weights) if weights != BASE_RELEASE else None
        if release is None or release.kind != "full":
            return
        deployment = await self.store.deployment(release.policy_id)
        if deployment and deployment.live == BASE_RELEASE:
            await self._swap(await self.engine.info(), BASE_RELEASE, self._base_folder)

    async def _swap(self, info: EngineInfo, release_id: str, folder: Path) -> None:
        """Full weights, once running answers have drained. Raises Unfit where others serve afterwards."""
        if info.weight_version == release_id:
            return
        await self.engine.update_weights(folder, release_id)
        serving = (await self.engine.info()).weight_version
        if serving != release_id:
            raise Unfit(f"the engine serves the weights {serving} after it was given {release_id}")

    # ------------------------------------------------------------------------------------------------ candidates

    async def advance(self, deployment: Deployment) -> None:
        """Examine the newest candidate, or let one that has passed go live; older candidates are superseded."""
        waiting = await lineage.staged(self.store, deployment.policy_id)
        if waiting:
            newest = waiting[0]
            canaries = await lineage.in_state(self.store, deployment.policy_id, ReleaseState.CANARY)
            for older in [*waiting[1:], *(r for r in canaries if r.created_at < newest.created_at)]:
                await self._set(older, ReleaseState.SUPERSEDED, [f"{newest.release_id} is newer"])
            if await self._set(newest, ReleaseState.EXAMINING):
                await self.examine(newest, deployment)
        if self.settings.release.auto:
            for canary in (await lineage.in_state(self.store, deployment.policy_id, ReleaseState.CANARY))[:1]:
                await self.promote(canary, deployment)

    async def examine(self, release: Release, deployment: Deployment) -> None:
        """Hold the exam and write down what it says: canary, or rejected with the policy's head moved back."""
        options = self.settings.release
        try:
            await self.load(release)
            sitting = await self.examiner.sit(release.release_id, options)
        except Unfit as unfit:
            await self._reject(release, [str(unfit)])
            return
        except (EngineUnavailable, ReleaseNotLoaded):  # it went away or was started again: not the candidate's fault
            raise
        except EngineError as error:
            self.failures[release.release_id] += 1
            if self.failures[release.release_id] < MAX_FAILURES:
                raise
            await self._reject(release, [f"the engine failed with it {MAX_FAILURES} times: {error}"])
            return
        finally:
            if release.kind == "full":
                await self._restore(deployment)
        reference = deployment.live if release.kind == "full" else BASE_RELEASE
        report = await self.examiner.mark(sitting, deployment.live, options, reference=reference)
        await lineage.add_exam(self.store, report)
        if not report.passed:
            await self._reject(release, report.reasons)
        elif await self._set(release, ReleaseState.CANARY):
            log.info("release %s passed its exam in %.1f s", release.release_id, report.seconds)

    async def promote(self, release: Release, deployment: Deployment) -> None:
        """Live: loaded before the row, so that no request fails; proven after it, else rolled back."""
        try:
            if release.kind != "full":  # full weights replace what serves: only after the row
                await self.load(release)
        except Unfit as unfit:
            await self._reject(release, [str(unfit)])
            return
        attempts = self.settings.learner.max_attempts
        after = await lineage.promote(
            self.store,
            release.release_id,
            actor=ACTOR,
            reason="passed its exam",
            max_attempts=attempts,
            expect=ReleaseState.CANARY,
        )
        if after.live != release.release_id:
            return
        log.info("release %s is live (generation %d, before: %s)", after.live, after.generation, deployment.live)
        await self.serve(after)

    # ------------------------------------------------------------------------------------------- rows and engine

    @property
    def _base_folder(self) -> Path:
        assert self.settings.engine.model is not None
        return self.settings.engine.model

    async def _restore(self, deployment: Deployment) -> None:
        """After an exam of full weights: those that serve, again."""
        live = await lineage.find_release(self.store, deployment.live) if deployment.live != BASE_RELEASE else None
        folder = Path(live.path) if live else self._base_folder
        await self._swap(await self.engine.info(), deployment.live, folder)

    async def _give_up(self, release: Release, deployment: Deployment, why: str) -> None:
        """A live release that cannot serve is rolled back; one that only waits to serve is rejected."""
        log.error("release %s cannot serve: %s", release.release_id, why)
        attempts = self.settings.learner.max_attempts
        if release.release_id != deployment.live:
            await self._reject(release, [why])
            return
        after = await lineage.rollback(
            self.store, deployment.policy_id, None, actor=ACTOR, reason=why, max_attempts=attempts
        )
        log.warning("rolled back to %s", after.live)
        await self.serve(after)

    async def _reject(self, release: Release, reasons: Sequence[str]) -> None:
        log.warning("release %s is rejected: %s", release.release_id, "; ".join(reasons))
        attempts = self.settings.learner.max_attempts
        await lineage.reject(self.store, release.release_id, reasons, max_attempts=attempts)

    async def _set(self, release: Release, state: ReleaseState, reasons: Sequence[str] = ()) -> bool:
        return await lineage.set_state(
            self.store, release.release_id, state, expect=coming_from(state), reasons=reasons
        )


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, but not past the end."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


async def _unless(stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Do the work, or leave it when told to stop."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel(), stopped.cancel()
        await asyncio.gather(working, stopped, return_exceptions=True)
