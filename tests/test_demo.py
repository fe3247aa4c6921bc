"""The demo on the real model, short: a preference is learned from conversations, and the books say how."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console

from agent_rl.settings import load
from server import launch
from server.cli import teacher_messages
from server.demo.command import run
from server.demo.scenario import PREFERENCES, numbered, one_sentence, questions


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="demo-"))  # a socket's path must be short
    yield folder
    shutil.rmtree(folder)


@pytest.mark.real
@pytest.mark.timeout(900)
async def test_a_preference_is_learned_and_nothing_else_is_lost(smollm2: Path, home: Path) -> None:
    settings = load(None, {"home": home, "gateway.port": 0, "engine.model": smollm2})
    async with launch.served(settings, print, lambda role, line: None) as served:
        (results,) = await run(served, 16, 12, ["short"], partial(teacher_messages, "hint"), Console(quiet=True))
    assert results.told is not None
    assert results.told >= 0.8
    before, after = results.before_measures, results.after_measures
    assert after["length, tokens"].mean <= 0.6 * before["length, tokens"].mean
    assert after["answers that please"].mean >= before["answers that please"].mean + 0.4
    assert after["empty"].mean == 0.0
    assert after["on topic"].mean >= 0.8
    assert after["perplexity, retention texts"].mean <= 1.05 * before["perplexity, retention texts"].mean
    assert {a.release for a in results.before} == {"base"}
    assert "base" not in {a.release for a in results.after}

    (folder,) = (home / "demo").iterdir()
    lines = [json.loads(line) for line in (folder / "transcript.jsonl").read_text().splitlines()]
    assert fmean(a["tokens"] for a in lines if a["part"] == "after") == after["length, tokens"].mean
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_questions_asked_in_the_talk_are_never_held_out() -> None:
    talk, held_out = questions()
    assert len(held_out) >= 60
    assert not set(talk) & set(held_out)


@pytest.mark.parametrize(
    ("answer", "short", "list_"),
    [
        ("Tea is a drink.", True, False),
        ("Tea is a drink. It is hot.", False, False),
        ("1. Boil water.\n2. Add tea.", False, True),
        ("Version 1.5 is out", True, False),
        ("", False, False),
        ("word " * 41, False, False),
    ],
)
def test_what_pleases_the_simulated_user(answer: str, short: bool, list_: bool) -> None:
    assert (one_sentence(answer), numbered(answer)) == (short, list_)
    assert PREFERENCES["short"].pleased(answer) is short
