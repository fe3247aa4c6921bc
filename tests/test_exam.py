"""What an exam measures and decides: the arithmetic by hand, the plumbing on the scripted engine, and the collapses on
record on the real model."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from serving import serving

from agent_rl.engine import Engine
from agent_rl.exam import Answer, Examiner, Sitting, draw, examine, kl, mean, objections, probes, retention_texts, win
from agent_rl.models import LoraConfig, save_adapter
from agent_rl.rendering import Renderer
from agent_rl.settings import EngineSettings, ReleaseSettings, Settings
from agent_rl.types import BASE_RELEASE, Finish, Message
from server.engines import protocol, torch_engine
from server.engines.scripted import Rule, Script, ScriptedEngine

GOOD = {
    "empty_rate": 0.0,
    "repetition": 0.1,
    "loops": 0.0,
    "truncation_increase": 0.0,
    "length_ratio": 0.4,
    "perplexity_ratio": 1.01,
    "kl_to_live": 0.5,
    "on_topic": 0.97,
}


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, []),
        ({"empty_rate": 0.0625}, ["empty rate 0.0625 > 0"]),
        ({"repetition": 0.62}, ["repetition 0.62 > 0.3"]),
        ({"loops": 0.5}, ["loops 0.5 > 0.3"]),
        ({"truncation_increase": 0.3}, ["truncation increase 0.3 > 0.25"]),
        ({"length_ratio": 0.05}, ["length ratio 0.05 < 0.1"]),
        ({"perplexity_ratio": 1.2}, ["perplexity ratio 1.2 > 1.05"]),
        ({"kl_to_live": 2.5}, ["kl to live 2.5 > 2"]),
        ({"on_topic": 0.5}, ["on topic 0.5 < 0.8"]),
        ({"kl_to_live": math.nan}, ["kl_to_live is not a finite number (nan)"]),
        ({"on_topic": 0.5, "repetition": 0.9}, ["repetition 0.9 > 0.3", "on topic 0.5 < 0.8"]),
        ({"on_topic": 0.8, "repetition": 0.3, "length_ratio": 0.1}, []),  # on the limit is within it
    ],
)
def test_objections_are_words_with_numbers(change: dict[str, float], reasons: list[str]) -> None:
    assert objections(GOOD | change, ReleaseSettings()) == reasons


def test_on_topic_counts_ties_half_and_nothing_as_no_number() -> None:
    assert [win(-1.0, -5.0), win(-2.0, -2.0), win(-9.0, -3.0)] == [1.0, 0.5, 0.0]
    assert mean([1.0, 0.5, 0.0, 1.0]) == 2.5 / 4
    assert math.isnan(mean([]))
    assert math.isnan(mean([1.0, win(-1.0, math.nan)]))


def test_kl_is_the_mean_log_ratio_over_all_tokens() -> None:
    assert kl([(-1.0, -2.0), (-0.5,)], [(-2.0, -2.0), (-3.0,)]) == pytest.approx((1.0 + 0.0 + 2.5) / 3)
    assert math.isnan(kl([()], [()]))


def test_every_exam_asks_the_same_probes() -> None:
    items = [str(i) for i in range(50)]
    assert draw(items, 16) == draw(items, 16)
    assert len(set(draw(items, 16))) == 16
    assert sorted(draw(items, 99)) == sorted(items)


def test_what_is_shipped() -> None:
    assert len(set(probes())) == len(probes()) >= 48
    assert all(p.endswith("?") and len(p) < 80 for p in probes())
    assert len(retention_texts()) == 8
    assert all("\n" not in text and 150 < len(text) < 400 for text in retention_texts())


# --------------------------------------------------------------------------------------------------- scripted


@asynccontextmanager
async def scripted(model: Path, rules: list[Rule], releases: list[str], folder: Path) -> AsyncIterator[Engine]:
    """A client of a scripted engine with adapters of these names."""
    server = ScriptedEngine(model, Script(rules=rules, default=Rule(text="Tea is hot.")), 1024)
    async with serving(protocol.create_app(server, None)) as url:
        engine = Engine(url)
        try:
            for release in releases:
                save_adapter(folder / release, LoraConfig(1, 1.0, ("q_proj",)), {})
                await engine.load_adapter(release, folder / release)
            yield engine
        finally:
            await engine.close()


async def test_the_values_of_an_exam(tiny_model: Path, tmp_path: Path) -> None:
    """log p: −0.2 under the candidate, −0.1 under all others; every pair ties, so on-topic is at chance."""
    rules = [Rule(release="r1", text="Hot.", logprob=-0.2)]
    async with scripted(tiny_model, rules, ["r1"], tmp_path) as engine:
        renderer = Renderer(tiny_model)
        report = await examine(engine, renderer, "r1", BASE_RELEASE, ReleaseSettings(probes=4))
    assert not report.passed
    assert report.reasons == ("perplexity ratio 1.11 > 1.05", "on topic 0.5 < 0.8")
    values = report.values
    assert values["kl_to_live"] == pytest.approx(-0.1)
    assert values["perplexity"] == pytest.approx(math.exp(0.2))
    assert values["perplexity_ratio"] == pytest.approx(math.exp(0.1))
    assert values["length_mean"] == len(renderer.encode("Hot."))
    assert values["length_ratio"] == pytest.approx(len(renderer.encode("Hot.")) / len(renderer.encode("Tea is hot.")))
    assert values["empty_rate"] == values["truncation_rate"] == values["repetition"] == 0.0
    assert [answer for _, answer in report.samples] == ["Hot."] * 4
    assert [probe for probe, _ in report.samples] == draw(probes(), 4)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Rule(text=""), "empty rate 1 > 0"),
        (Rule(text=""), "kl_to_live is not a finite number (nan)"),
        (Rule(text="one more " * 12), "repetition 0.909 > 0.3"),  # 22 trigrams, 2 kinds
        (Rule(text="ha" * 60), "loops 1 > 0.3"),
        (Rule(text="word " * 40), "truncation increase 1 > 0.25"),
        (Rule(text="Hot.", logprob=5.0), "kl to live 5.1 > 2"),
        (Rule(text="Hot.", logprob=math.nan), "perplexity is not a finite number (nan)"),
        (Rule(text="Hot.", logprob=-1000.0), "perplexity is not a finite number (inf)"),
    ],
)
async def test_what_a_collapsed_candidate_is_told(tiny_model: Path, tmp_path: Path, rule: Rule, reason: str) -> None:
    rules = [rule.model_copy(update={"release": "r1"})]
    options = ReleaseSettings(probes=2, probe_max_tokens=200 if "word" not in rule.text else 20, min_on_topic=0.0)
    async with scripted(tiny_model, rules, ["r1"], tmp_path) as engine:
        report = await examine(engine, Renderer(tiny_model), "r1", BASE_RELEASE, options)
    assert not report.passed
    assert reason in report.reasons


async def test_only_what_may_be_asked_for_again_is_remembered(tiny_model: Path, tmp_path: Path) -> None:
    async with scripted(tiny_model, [], ["r1", "r2", "r3"], tmp_path) as engine:
        examiner, options = Examiner(engine, Renderer(tiny_model)), ReleaseSettings(probes=2, min_on_topic=0.5)
        for candidate, live in [("r1", BASE_RELEASE), ("r2", "r1"), ("r3", "r2")]:
            assert (await examiner.mark(await examiner.sit(candidate, options), live, options)).passed
            assert set(examiner.summaries) == {BASE_RELEASE, live, candidate}
            assert set(examiner.perplexities) <= {BASE_RELEASE, live, candidate}


# ------------------------------------------------------------------------------------------------- real model


def answers(renderer: Renderer, texts: dict[str, str]) -> tuple[Answer, ...]:
    return tuple(
        Answer(q, renderer.render([Message("user", q)]), renderer.encode(a), a, Finish.STOP) for q, a in texts.items()
    )


REAL = {
    "What is the capital of Portugal?": "Lisbon.",
    "Why does iron rust?": "Iron rusts because it reacts with oxygen and water.",
    "How is glass made?": "By melting sand.",
    "What does a heart do?": "It pumps blood through the body.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci painted it.",
    "How do bees make honey?": "Bees collect nectar from flowers and dry it in the hive.",
}
COLLAPSES = [["Thanks."], ["The answer is not available."]]


@pytest.mark.real
@pytest.mark.timeout(600)
async def test_collapses_fall_to_chance_on_the_real_model_and_short_answers_do_not(smollm2: Path) -> None:
    settings = Settings(engine=EngineSettings(model=smollm2, threads=1))
    options = ReleaseSettings(probes=4, probe_max_tokens=16, max_kl_to_live=99)
    async with serving(torch_engine.create_app(settings)) as url:
        engine, renderer = Engine(url), Renderer(smollm2)
        examiner = Examiner(engine, renderer)
        perplexity = await examiner.perplexity(BASE_RELEASE)

        async def measured(texts: dict[str, str]) -> float:
            sat = answers(renderer, texts)
            own = [await engine.score(a.prompt_ids, a.scored) for a in sat]
            examiner.summaries["r1"] = GOOD | {"length_mean": 8.0, "truncation_rate": 0.0}
            sitting = Sitting("r1", sat, tuple(own), perplexity, 0.0)
            return (await examiner.mark(sitting, BASE_RELEASE, options)).values["on_topic"]

        try:
            assert await measured(REAL) >= 0.9
            for phrases in COLLAPSES:
                texts = {q: phrases[i % len(phrases)] for i, q in enumerate(REAL)}
                assert await measured(texts) < 0.8
        finally:
            await engine.close()
