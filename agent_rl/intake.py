"""What of the claimed lessons can be learned: view, re-answer, sample, or a drop with its reason.

A lesson counts only if the teacher can give it. So the teacher is asked to answer again under its view; where that
answer does not do what the user asked, the turn is no lesson. Where no rule can tell, the lesson goes on, and the
method's least divergence between student and teacher decides. The re-answer itself is a second sample.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent_rl.engine import Engine, EngineError, EngineUnavailable
from agent_rl.experience import lineage
from agent_rl.experience.store import Store
from agent_rl.hindsight import spoken
from agent_rl.judge import obeys
from agent_rl.rendering import Renderer, RenderError
from agent_rl.samples import make_sample, reanswer_sample
from agent_rl.settings import LearnerSettings
from agent_rl.types import BASE_RELEASE, Checkpoint, DropReason, Lesson, Sample, Sampling, TeacherView

log = logging.getLogger("agent_rl.learner")
TRIES = (1.0, 0.0)  # temperatures of the re-answers: as the student samples, then the teacher's surest
REANSWER_TOKENS = 64


class Views(Protocol):
    """What is asked of a method before the update."""

    @property
    def needs_behavior(self) -> bool:
        """Whether a response without behaviour logprobs is of no use."""

    @property
    def check_teacher(self) -> bool:
        """Whether the teacher must do in a re-answer what was asked."""

    @property
    def reanswers(self) -> float:
        """Weight of the re-answers as samples; 0: they are none."""

    def view(self, lesson: Lesson) -> TeacherView | DropReason:
        """What the teacher sees."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A lesson that cannot be learned, and why."""

    lesson_id: str
    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """One lesson to learn: the student's own answer, and the teacher's where it gave one."""

    own: Sample
    reanswer: Sample | None


@dataclass(frozen=True, slots=True)
class Intake:
    settings: LearnerSettings
    store: Store
    engine: Engine
    renderer: Renderer
    method: Views

    async def admit(self, lessons: Sequence[Lesson], head: Checkpoint | None) -> tuple[list[Admitted], list[Refusal]]:
        """The fresh lessons that can be learned, and why the others cannot."""
        made = await asyncio.gather(*(self._fresh(lesson, head) for lesson in lessons))
        return [m for m in made if isinstance(m, Admitted)], [m for m in made if isinstance(m, Refusal)]

    def replays(self, lessons: Sequence[Lesson]) -> list[Sample]:
        """Samples of lessons that were learned before; one whose evidence is gone by now is passed over."""
        made = [self._sample(lesson, replay=True) for lesson in lessons]
        return [m for m in made if isinstance(m, Sample)]

    async def _fresh(self, lesson: Lesson, head: Checkpoint | None) -> Admitted | Refusal:
        sample = self._sample(lesson)
        if isinstance(sample, Refusal):
            return sample
        behind = await self._behind(lesson, head)
        if behind > self.settings.max_staleness:
            return Refusal(lesson.lesson_id, DropReason.STALE, f"{behind} checkpoints behind the head")
        if not (self.method.check_teacher or self.method.reanswers):
            return Admitted(sample, None)
        ids = await self._reanswer(lesson, sample.teacher_prompt_ids)
        if isinstance(ids, Refusal):
            return ids
        weight = self.method.reanswers
        return Admitted(sample, reanswer_sample(sample, ids, weight) if weight else None)

    def _sample(self, lesson: Lesson, *, replay: bool = False) -> Sample | Refusal:
        view = self.method.view(lesson)
        if isinstance(view, DropReason):
            return Refusal(lesson.lesson_id, view, lesson.verdict.reason)
        try:
            view_ids = self.renderer.render(view.messages, lesson.evidence.transcript.turn.tools)
        except RenderError as error:
            return Refusal(lesson.lesson_id, DropReason.NO_HINDSIGHT, f"the view cannot be rendered: {error}")
        sample = make_sample(
            lesson,
            view_ids,
            max_tokens=self.settings.max_tokens,
            needs_behavior=self.method.needs_behavior,
            replay=replay,
        )
        return sample if isinstance(sample, Sample) else Refusal(lesson.lesson_id, sample, f"view {view.template}")

    async def _reanswer(self, lesson: Lesson, view_ids: Sequence[int]) -> tuple[int, ...] | Refusal:
        """The teacher's own answer under its view, if it does what was asked or no rule can tell; () where the
        engine has none to give."""
        asked = "\n".join(spoken(lesson.evidence, lesson.verdict))
        before = lesson.evidence.transcript.turn.answer.content
        for temperature in TRIES:
            sampling = Sampling(max_tokens=REANSWER_TOKENS, temperature=temperature)
            try:
                done = await self.engine.complete(
                    view_ids, sampling, release=BASE_RELEASE, stop_ids=self.renderer.stop_ids, priority=1
                )
            except EngineUnavailable:
                raise
            except EngineError as error:  # it refuses, has no base, or gave the answer up
                log.info("no re-answer for lesson %s: %s", lesson.lesson_id, error)
                return ()
            can = obeys(asked, before, self.renderer.answer(done.ids).content)
            if can is not False or not self.method.check_teacher:
                return done.ids
        return Refusal(lesson.lesson_id, DropReason.TEACHER_CANNOT, f"its own answer does not do: {asked}")

    async def _behind(self, lesson: Lesson, head: Checkpoint | None) -> int:
        """Checkpoints between the oldest release that sampled this turn and the head."""
        steps = []
        for name in {span.release for span in lesson.evidence.transcript.turn.spans} - {BASE_RELEASE}:
            release = await lineage.find_release(self.store, name)
            steps.append(release.step if release else 0)
        return ((head.step if head else 0) - min(steps, default=0)) // self.settings.steps_per_checkpoint
