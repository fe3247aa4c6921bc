"""What of the claimed lessons can be learned: view, re-answer, sample, or a drop with its reason.

A lesson counts only if the teacher can give it. So the teacher is asked to answer again under its view; where that
answer does not do what the user asked, the turn is no lesson. Where no rule can tell, the lesson goes on, and the
method's least divergence between student and teacher decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent_rl.engine import Engine, EngineRejected, ReleaseNotLoaded
from agent_rl.experience import lineage
from agent_rl.experience.store import Store
from agent_rl.hindsight import spoken
from agent_rl.judge import obeys
from agent_rl.rendering import Renderer, RenderError
from agent_rl.samples import make_sample
from agent_rl.settings import LearnerSettings
from agent_rl.types import BASE_RELEASE, Checkpoint, DropReason, Lesson, Sample, Sampling, TeacherView

log = logging.getLogger("agent_rl.learner")
REANSWER = Sampling(max_tokens=64, temperature=0.0)
AGREE = 3  # re-answers to the same request that must agree before no more are asked for


class Views(Protocol):
    """What is asked of a method before the update."""

    @property
    def needs_behavior(self) -> bool:
        """Whether a response without behaviour logprobs is of no use."""

    @property
    def check_teacher(self) -> bool:
        """Whether the teacher must do in a re-answer what was asked."""

    def view(self, lesson: Lesson) -> TeacherView | DropReason:
        """What the teacher sees."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A lesson that cannot be learned, and why."""

    lesson_id: str
    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class Intake:
    settings: LearnerSettings
    store: Store
    engine: Engine
    renderer: Renderer
    method: Views
    abilities: defaultdict[tuple[tuple[str, ...], tuple[str, ...]], deque[bool]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=AGREE))
    )  # (standing, asked) → how the last re-answers did

    async def samples(self, lessons: Sequence[Lesson], head: Checkpoint | None) -> tuple[list[Sample], list[Refusal]]:
        """Samples of the fresh lessons that can be learned, and why the others cannot."""
        made = await asyncio.gather(*(self._fresh(lesson, head) for lesson in lessons))
        return [m for m in made if isinstance(m, Sample)], [m for m in made if isinstance(m, Refusal)]

    def replays(self, lessons: Sequence[Lesson]) -> list[Sample]:
        """Samples of lessons that were learned before; one whose evidence is gone by now is passed over."""
        made = [self._sample(lesson, replay=True) for lesson in lessons]
        return [m for m in made if isinstance(m, Sample)]

    async def _fresh(self, lesson: Lesson, head: Checkpoint | None) -> Sample | Refusal:
        sample = self._sample(lesson)
        if isinstance(sample, Refusal):
            return sample
        behind = await self._behind(lesson, head)
        if behind > self.settings.max_staleness:
            return Refusal(lesson.lesson_id, DropReason.STALE, f"{behind} checkpoints behind the head")
        if self.method.check_teacher and await self._teacher_can(lesson, sample.teacher_prompt_ids) is False:
            asked = " ".join(spoken(lesson.evidence, lesson.verdict))
            return Refusal(lesson.lesson_id, DropReason.TEACHER_CANNOT, f"its own answer does not do: {asked}")
        return sample

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

    async def _teacher_can(self, lesson: Lesson, view_ids: Sequence[int]) -> bool | None:
        """None where no rule can tell, or where nobody serves the untouched base."""
        evidence = lesson.evidence
        asked = tuple(spoken(evidence, lesson.verdict))
        before = self.abilities[evidence.standing, asked]
        if len(before) == AGREE and len(set(before)) == 1:
            return before[0]
        try:
            answer = await self.engine.complete(
                view_ids, REANSWER, release=BASE_RELEASE, stop_ids=self.renderer.stop_ids, priority=1
            )
        except (ReleaseNotLoaded, EngineRejected) as error:
            log.info("no re-answer for lesson %s: %s", lesson.lesson_id, error)
            return None
        after = self.renderer.answer(answer.ids).content
        can = obeys("\n".join(asked), evidence.transcript.turn.answer.content, after)
        if can is not None:
            before.append(can)
        return can

    async def _behind(self, lesson: Lesson, head: Checkpoint | None) -> int:
        """Checkpoints between the oldest release that sampled this turn and the head."""
        steps = []
        for name in {span.release for span in lesson.evidence.transcript.turn.spans} - {BASE_RELEASE}:
            release = await lineage.find_release(self.store, name)
            steps.append(release.step if release else 0)
        return ((head.step if head else 0) - min(steps, default=0)) // self.settings.steps_per_checkpoint
