"""A simulated user with a standing preference talks to the server, and the model behind it takes it up.

The user is an ordinary client of the openai SDK: asks a question, reads the answer, complains in the next message if
the answer is not as they like it. Nobody tells the server that this is a demonstration. Before and after, held-out
questions are asked with no preference mentioned; what changed between the two is what was learned.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam as Param
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from agent_rl.engine import Engine
from agent_rl.exam import Examiner
from agent_rl.experience import lessons
from agent_rl.experience.store import Store
from agent_rl.monitors import Interval, bootstrap, is_empty, repetition, wilson
from agent_rl.rendering import Renderer
from agent_rl.settings import Settings
from server.launch import base_url

View = Callable[[str, str], list[Param]]  # (question, complaint) → the messages that the teacher is shown
USERS = 4  # conversations at once
ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Preference:
    """What the simulated user says when an answer does not please, and when it pleases."""

    name: str
    complaint: str
    pleased: Callable[[str], bool]
    conversations: int  # enough to learn it from


def one_sentence(answer: str) -> bool:
    return bool(answer.strip()) and len(re.findall(r"[.!?](?=\s|$)", answer.strip())) <= 1 and len(answer.split()) <= 40


def numbered(answer: str) -> bool:
    return bool(re.match(r"\s*1[.)]\s", answer))


PREFERENCES = {
    p.name: p
    for p in (
        Preference("short", "Too long. Please answer in one short sentence.", one_sentence, 32),
        Preference("numbered", "Please use a numbered list.", numbered, 48),
    )
}


@dataclass(frozen=True, slots=True)
class Answer:
    question: str
    text: str
    tokens: int
    finish: str
    release: str
    turn_id: str
    at: float


@dataclass(slots=True)
class Results:
    """What one scenario found; written as result.json beside its transcript and chart."""

    preference: str
    complaint: str
    told: float | None = None  # share of answers that please when the teacher view is shown
    before: list[Answer] = field(default_factory=list)
    talk: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    before_measures: dict[str, Interval] = field(default_factory=dict)
    after_measures: dict[str, Interval] = field(default_factory=dict)
    seconds: float | None = None


class Client:
    """The openai SDK on the server, with the headers that say which release answered."""

    def __init__(self, settings: Settings) -> None:
        key = (settings.home / "key").read_text().strip()
        self.openai = AsyncOpenAI(base_url=f"{base_url(settings)}/v1", api_key=key, max_retries=2, timeout=300)
        self.gate = asyncio.Semaphore(8)

    async def ask(self, messages: Sequence[Param], temperature: float) -> Answer:
        async with self.gate:
            raw = await self.openai.chat.completions.with_raw_response.create(
                model="default", messages=list(messages), temperature=temperature, max_tokens=ANSWER_TOKENS
            )
        completion = raw.parse()
        choice = completion.choices[0]
        assert completion.usage is not None
        return Answer(
            question=str(messages[-1].get("content")),
            text=choice.message.content or "",
            tokens=completion.usage.completion_tokens,
            finish=choice.finish_reason,
            release=raw.headers["x-policy-version"],
            turn_id=raw.headers["x-turn-id"],
            at=time.time(),
        )

    async def ask_all(self, questions: Sequence[str]) -> list[Answer]:
        """Each in a conversation of its own, greedily."""
        return list(await asyncio.gather(*(self.ask([user(q)], 0.0) for q in questions)))


def user(text: str) -> Param:
    return {"role": "user", "content": text}


def questions() -> tuple[list[str], list[str]]:
    """(for the talk, held out): every other line of the shipped list."""
    lines = (files("server") / "data" / "questions.txt").read_text().splitlines()
    return lines[::2], lines[1::2]


@dataclass(slots=True)
class Scene:
    """What every part of a scenario needs; `view` is what the teacher is shown, `store` the look inside."""

    settings: Settings
    client: Client
    store: Store
    view: View
    console: Console
    started: float = field(default_factory=time.time)

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.time() - self.started:5.0f} s[/dim]  {text}")


# ------------------------------------------------------------------------------------------------- one scenario


async def play(scene: Scene, preference: Preference, interactions: int, n_questions: int, results: Results) -> None:
    """Ability of the teacher, held-out answers before, the talk, held-out answers after; all goes into `results`."""
    started = time.time()
    ask, held_out = questions()
    held_out = held_out[:n_questions]
    scene.say(f"asking {len(held_out)} held-out questions, no preference mentioned")
    results.before = await scene.client.ask_all(held_out)
    results.told = await ability(scene, preference, held_out[:16])
    untold = share(preference, results.before)
    scene.say(f"told “{preference.complaint}” the teacher obeys {results.told:.0%}; untold, {untold:.0%} do")
    if results.told < 0.8 or untold > 0.2:
        scene.say("the teacher has nothing to teach here: 80 % told and at most 20 % untold are needed")
        return
    results.before_measures = await measure(scene, preference, results.before)
    await talk(scene, preference, ask, interactions, results)
    await settled(scene)
    scene.say(f"asking the {len(held_out)} held-out questions again")
    results.after = await scene.client.ask_all(held_out)
    results.after_measures = await measure(scene, preference, results.after)
    results.seconds = time.time() - started


async def ability(scene: Scene, preference: Preference, asked: Sequence[str]) -> float:
    """Share of answers that please when the model is shown what the teacher will be shown."""
    views = [scene.view(question, preference.complaint) for question in asked]
    answers = await asyncio.gather(*(scene.client.ask(view, 0.0) for view in views))
    return share(preference, answers)


async def talk(scene: Scene, preference: Preference, asked: Sequence[str], interactions: int, results: Results) -> None:
    """USERS conversations at a time: a question, and a complaint if the answer does not please. No session ids are
    sent: the server finds the conversation by what was said in it."""
    waiting = itertools.islice(itertools.cycle(asked), interactions)
    columns = BarColumn(), TextColumn("{task.completed}/{task.total} conversations  {task.description}")
    with Progress(*columns, console=scene.console) as progress:
        bar = progress.add_task("", total=interactions)

        async def one_user() -> None:
            for question in waiting:
                first = await scene.client.ask([user(question)], 1.0)
                results.talk.append(first)
                if not preference.pleased(first.text):
                    answer: Param = {"role": "assistant", "content": first.text}
                    await scene.client.ask([user(question), answer, user(preference.complaint)], 1.0)
                lately = results.talk[-16:]
                pleased, tokens = share(preference, lately), sum(a.tokens for a in lately) / len(lately)
                now = (
                    f"of the last {len(lately)} answers {pleased:.0%} please, {tokens:.0f} tokens, {lately[-1].release}"
                )
                progress.update(bar, advance=1, description=now)

        await asyncio.gather(*(one_user() for _ in range(USERS)))


async def settled(scene: Scene, patience_s: float = 240.0) -> None:
    """Wait until everything said has been learned or dropped, and every release examined."""
    for _ in range(int(patience_s)):
        open_ends = await lessons.pending(scene.store, "default")
        if not open_ends:
            return
        await asyncio.sleep(1)
    scene.say(f"[yellow]going on although {open_ends} lessons or releases are still open[/yellow]")


async def measure(scene: Scene, preference: Preference, answers: Sequence[Answer]) -> dict[str, Interval]:
    """What the table shows of a set of held-out answers: their own properties, and the model's that gave them."""
    pairs = [(a.question, a.text) for a in answers]
    release = answers[-1].release
    engine = Engine(scene.settings.engine.url or "")
    try:
        examiner = Examiner(engine, Renderer(scene.settings.engine.model or Path()))
        on_topic = await examiner.on_topic(pairs)
        perplexity = await examiner.perplexity(release)
    finally:
        await engine.close()
    return {
        "answers that please": wilson(sum(preference.pleased(a.text) for a in answers), len(answers)),
        "length, tokens": bootstrap([a.tokens for a in answers]),
        "empty": wilson(sum(map(is_empty, (a.text for a in answers))), len(answers)),
        "cut off by the limit": wilson(sum(a.finish == "length" for a in answers), len(answers)),
        "repeated 3-grams": bootstrap([repetition(a.text) for a in answers]),
        "on topic": bootstrap(on_topic),
        "perplexity, retention texts": Interval(perplexity, perplexity, perplexity, 1),
    }


def share(preference: Preference, answers: Sequence[Answer]) -> float:
    return sum(preference.pleased(a.text) for a in answers) / len(answers)
