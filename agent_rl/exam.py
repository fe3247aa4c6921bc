"""The exam that a candidate passes before it serves: it answers probe questions, and the answers are read.

Loss, KL and length all look perfect while a model collapses to one sentence for everything, so the measure that counts
is **on-topic**: the share of pairs (own question, another probe's question) under which the reference model finds the
answer likelier to its own question than to the other: the sign of the pointwise mutual information of question and
answer. Pairs are symmetric (i with j, and j with i) and ties count half, so one answer to everything scores exactly
0.5, whatever it is. Measured on SmolLM2-135M-Instruct, 16 probes, the first 16 tokens of each answer, 64 pairs:

    long answers 0.98 · one sentence 1.0 · a few words of it 1.0 · "Thanks." 0.5 · "The answer is not available." 0.5
    four such phrases in turn 0.58 · good answers to other probes' questions 0.44

An exam has two halves, so that it also works where only one set of weights is loaded at a time: `sit` needs the
candidate alone, `mark` needs the reference (the base; for full weights, what serves) and live.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import TypeVar

from agent_rl.engine import Engine
from agent_rl.monitors import compression, non_finite, summary
from agent_rl.rendering import Renderer
from agent_rl.settings import ReleaseSettings
from agent_rl.types import BASE_RELEASE, ExamReport, Finish, Message, Sampling

CONCURRENCY = 8  # requests at once, all at priority 1: users go first
SCORED_TOKENS = 16  # of each answer, for on-topic and KL: enough to tell questions apart, cheap on a processor
OTHERS = (-1, 1)  # whose questions an answer is held against, counted round the probes; symmetric, see above
LOOP = 0.2  # an answer that compresses below this share of its size is a loop, with or without spaces

Said = tuple[Sequence[int], Sequence[int]]  # ids of a question's prompt and of what is scored of its answer
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a release answered to one probe, greedily; `ids` without the end marker."""

    probe: str
    prompt_ids: tuple[int, ...]  # [P]
    ids: tuple[int, ...]  # [R]
    text: str
    finish: Finish

    @property
    def scored(self) -> tuple[int, ...]:  # [min(R, SCORED_TOKENS)]
        return self.ids[:SCORED_TOKENS]


@dataclass(frozen=True, slots=True)
class Sitting:
    """What a candidate did in its half of the exam."""

    release_id: str
    answers: tuple[Answer, ...]
    logprobs: tuple[tuple[float, ...], ...]  # of each answer's `scored` tokens, under the candidate
    perplexity: float  # on the retention texts
    seconds: float


@dataclass(slots=True)
class Examiner:
    """Examines the candidates of one engine. What the reference and live did is remembered: they do not change.

    Raises EngineUnavailable and other EngineErrors: an exam that could not be held says nothing of the candidate.
    """

    engine: Engine
    renderer: Renderer
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONCURRENCY))
    summaries: dict[str, dict[str, float]] = field(default_factory=dict)  # release → what its answers were like
    perplexities: dict[str, float] = field(default_factory=dict)

    async def sit(self, release_id: str, settings: ReleaseSettings) -> Sitting:
        """The candidate's half: its answers to `settings.probes` probes, its own scores of them, and its perplexity on
        the retention texts."""
        start = time.monotonic()
        answers = await self._answers(release_id, settings)
        self.summaries[release_id] = _summary(answers)
        logprobs = await _each(lambda a: self._score(a.prompt_ids, a.scored, release_id), answers)
        perplexity = await self.perplexity(release_id)
        return Sitting(release_id, tuple(answers), tuple(logprobs), perplexity, time.monotonic() - start)

    async def mark(
        self, sitting: Sitting, live: str, settings: ReleaseSettings, *, reference: str = BASE_RELEASE
    ) -> ExamReport:
        """The other half: hold what the candidate did against the reference and live, and decide."""
        start = time.monotonic()
        for release in (reference, live):
            if release not in self.summaries:
                self.summaries[release] = _summary(await self._answers(release, settings))
        own = await _each(lambda a: self._score(a.prompt_ids, a.scored, reference), sitting.answers)
        under_live = own
        if live != reference:
            under_live = await _each(lambda a: self._score(a.prompt_ids, a.scored, live), sitting.answers)
        base = self.summaries[reference]
        values = dict(self.summaries[sitting.release_id])
        values |= {
            "loops": fmean((compression(a.text) or 1.0) < LOOP for a in sitting.answers),
            "length_ratio": _ratio(values["length_mean"], base["length_mean"]),
            "truncation_increase": values["truncation_rate"]
            - max(self.summaries[live]["truncation_rate"], base["truncation_rate"]),
            "perplexity": sitting.perplexity,
            "perplexity_ratio": _ratio(sitting.perplexity, await self.perplexity(reference)),
            "kl_to_live": kl(sitting.logprobs, under_live),
            "on_topic": mean(await self._wins([(a.prompt_ids, a.scored) for a in sitting.answers], own, reference)),
        }
        self._forget(sitting.release_id, live, reference)
        reasons = objections(values, settings)
        return ExamReport(
            release_id=sitting.release_id,
            passed=not reasons,
            reasons=tuple(reasons),
            values=values,
            samples=tuple((a.probe, a.text) for a in sitting.answers),
            seconds=sitting.seconds + time.monotonic() - start,
        )

    # ------------------------------------------------------------------------------------------------ measuring

    async def _answers(self, release_id: str, settings: ReleaseSettings) -> list[Answer]:
        async def answer(probe: str) -> Answer:
            prompt = self.renderer.render([Message("user", probe)])
            sampling = Sampling(max_tokens=settings.probe_max_tokens, temperature=0.0)
            async with self.gate:
                done = await self.engine.complete(
                    prompt, sampling, release=release_id, stop_ids=self.renderer.stop_ids, priority=1
                )
            ids = done.ids[:-1] if done.ids and done.ids[-1] in self.renderer.stop_ids else done.ids
            return Answer(probe, prompt, ids, self.renderer.answer(done.ids).content, done.finish)

        return await _each(answer, draw(probes(), settings.probes))

    async def _score(self, prompt: Sequence[int], ids: Sequence[int], release_id: str) -> tuple[float, ...]:
        """An empty answer has no tokens to score."""
        if not ids:
            return ()
        async with self.gate:
            return await self.engine.score(prompt, ids, release=release_id, priority=1)

    async def perplexity(self, release_id: str) -> float:
        """exp of the mean negative log-likelihood over all tokens of the retention texts, each from its second on."""
        if release_id not in self.perplexities:
            texts = [self.renderer.encode(text) for text in retention_texts()]
            scores = await _each(lambda ids: self._score(ids[:1], ids[1:], release_id), texts)
            self.perplexities[release_id] = _exp(-fmean(x for row in scores for x in row))
        return self.perplexities[release_id]

    async def on_topic(self, asked: Sequence[tuple[str, str]], reference: str = BASE_RELEASE) -> list[float]:
        """For (question, answer) pairs from elsewhere: whether the reference finds each answer likelier under its own
        question than under a neighbour's (1, 0, or ½ for a tie), two neighbours each."""
        said = [
            (self.renderer.render([Message("user", question)]), self.renderer.encode(text)[:SCORED_TOKENS])
            for question, text in asked
        ]
        own = await _each(lambda s: self._score(*s, reference), said)
        return await self._wins(said, own, reference)

    async def _wins(self, said: Sequence[Said], own: Sequence[tuple[float, ...]], reference: str) -> list[float]:
        pairs = [(i, (i + step) % len(said)) for i in range(len(said)) for step in OTHERS]
        pairs = [(i, j) for i, j in dict.fromkeys(pairs) if i != j]
        others = await _each(lambda ij: self._score(said[ij[1]][0], said[ij[0]][1], reference), pairs)
        return [win(math.fsum(own[i]), math.fsum(other)) for (i, _), other in zip(pairs, others, strict=True)]

    def _forget(self, *keep: str) -> None:
        """What will not be asked for again: releases that are neither live nor the newest candidate."""
        for known in (self.summaries, self.perplexities):
            for release_id in set(known) - set(keep):
                del known[release_id]


async def examine(
    engine: Engine, renderer: Renderer, release_id: str, live: str, settings: ReleaseSettings
) -> ExamReport:
    """One exam with the candidate, live and the base all loaded, and nothing remembered."""
    examiner = Examiner(engine, renderer)
    return await examiner.mark(await examiner.sit(release_id, settings), live, settings)


# ----------------------------------------------------------------------------------------------------------- pure


def objections(values: dict[str, float], settings: ReleaseSettings) -> list[str]:
    """Why these values may not serve, in words with numbers; [] if they may. A value that is no number fails."""
    s = settings
    limits = [
        ("empty_rate", ">", s.max_empty_rate),
        ("repetition", ">", s.max_repetition),
        ("loops", ">", s.max_repetition),
        ("truncation_increase", ">", s.max_truncation_increase),
        ("length_ratio", "<", s.min_length_ratio),
        ("perplexity_ratio", ">", s.max_perplexity_ratio),
        ("kl_to_live", ">", s.max_kl_to_live),
        ("on_topic", "<", s.min_on_topic),
    ]
    reasons = [f"{name} is not a finite number ({values[name]})" for name in non_finite(values)]
    for name, sign, limit in limits:
        if values[name] > limit if sign == ">" else values[name] < limit:
            reasons.append(f"{name.replace('_', ' ')} {values[name]:.3g} {sign} {limit:.3g}")
    return reasons


def win(own: float, other: float) -> float:
    """1 where the answer's log-probability under its own question is the higher one, ½ for a tie, NaN for no number.

    >>> win(-1.0, -5.0), win(-2.0, -2.0), win(-3.0, -2.0)
    (1.0, 0.5, 0.0)
    """
    if math.isnan(own) or math.isnan(other):
        return math.nan
    return (own > other) + 0.5 * (own == other)


def mean(values: Sequence[float]) -> float:
    """NaN where there is none, or one is no number."""
    return fmean(values) if values else math.nan


def kl(candidate: Sequence[Sequence[float]], live: Sequence[Sequence[float]]) -> float:
    """Mean over the candidate's own tokens of log p_candidate − log p_live; NaN where there is no token.

    The tokens are greedy, so this is the log-ratio where the candidate is surest, and no estimate over samples.
    """
    ratios = [c - at for cs, ls in zip(candidate, live, strict=True) for c, at in zip(cs, ls, strict=True)]
    return fmean(ratios) if ratios else math.nan


def draw(items: Sequence[str], n: int) -> list[str]:
    """n of the items (all, if there are fewer), always the same ones: candidate, live and base answer alike probes."""
    return random.Random(0).sample(items, min(n, len(items)))


@cache
def probes() -> tuple[str, ...]:
    """The shipped probe questions."""
    return tuple((files("agent_rl") / "data" / "probes.txt").read_text().split("\n")[:-1])


@cache
def retention_texts() -> tuple[str, ...]:
    """The shipped paragraphs of ordinary English that a release must not unlearn."""
    text = (files("agent_rl") / "data" / "retention.txt").read_text()
    return tuple(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _summary(answers: Sequence[Answer]) -> dict[str, float]:
    return summary([a.text for a in answers], [len(a.ids) for a in answers], [a.finish for a in answers])


def _ratio(value: float, base: float) -> float:
    """NaN where the base has nothing to compare with."""
    return value / base if base else math.nan


def _exp(x: float) -> float:
    """Infinity where the result is too large for a number, so that the exam fails instead of the examiner."""
    return math.exp(x) if not x > 700 else math.inf


async def _each(work: Callable[[A], Awaitable[B]], items: Sequence[A]) -> list[B]:
    """Work on all at once, results in order; the first error ends the rest."""
    tasks = [asyncio.ensure_future(work(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
