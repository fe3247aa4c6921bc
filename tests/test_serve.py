"""`agent-rl serve` as a user runs it: real processes, the real client library, kill -9, Ctrl-C, and nobody left behind.

The model is the two-layer one, so that what is tested here is the machinery; what it learns is tested elsewhere.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from server.launch import base_url, read_settings

ROLES = ("engine", "recorder", "judge", "publisher", "learner", "gateway", "redis")
pytestmark = pytest.mark.timeout(240)


class Served:
    """One running `agent-rl serve`."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home = home
        command = [
            sys.executable,
            "-m",
            "server.cli",
            "serve",
            "--home",
            str(home),
            "--port",
            "0",
            "--model",
            str(model),
        ]
        self.log = home.parent / f"{home.name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        until(lambda: "API key" in self.log.read_text() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.log.read_text()
        self.url = base_url(read_settings(home / "run" / "settings.json"))
        self.key = (home / "key").read_text().strip()
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=8, timeout=60)

    def pid(self, role: str) -> int:
        return int((self.home / "run" / f"{role}.pid").read_text())

    def ask(self, text: str) -> str:
        """The turn's id."""
        raw = self.client.chat.completions.with_raw_response.create(
            model="default", messages=[{"role": "user", "content": text}], max_tokens=8
        )
        return raw.headers["x-turn-id"]

    def recorded(self) -> list[str]:
        with sqlite3.connect(self.home / "agent-rl.db", timeout=10) as connection:
            return [row[0] for row in connection.execute("SELECT turn_id FROM turns")]


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("serve") / "home", tiny_model)
    yield server
    server.client.close()
    pids = [server.pid(role) for role in ROLES]
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.log.read_text()
    assert [pid for pid in pids if alive(pid)] == []


def test_what_is_printed_is_enough_to_start(served: Served) -> None:
    printed = served.log.read_text()
    assert served.url in printed
    assert served.key in printed
    assert "curl" in printed
    assert str(served.home) in printed.replace("\n", "")
    assert stat.S_IMODE((served.home / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE((served.home / "redis" / "redis.sock").stat().st_mode) & 0o077 == 0


def test_a_conversation_is_recorded_and_explained(served: Served) -> None:
    turn_id = served.ask("What is tea?")
    until(lambda: turn_id in served.recorded(), 20)
    answer = httpx.get(f"{served.url}/v1/turns/{turn_id}", headers={"Authorization": f"Bearer {served.key}"})
    assert answer.status_code == 200
    assert turn_id in answer.text


def test_each_role_can_be_killed_once_and_nothing_is_lost(served: Served) -> None:
    asked = []
    for role in ROLES:
        asked.append(served.ask(f"Before {role}?"))
        before = served.pid(role)
        os.kill(before, signal.SIGKILL)
        until(lambda role=role, before=before: served.pid(role) != before, 30)  # type: ignore[misc]
        asked.append(served.ask(f"After {role}?"))
    until(lambda: set(asked) <= set(served.recorded()), 60)
    recorded = served.recorded()
    assert len(recorded) == len(set(recorded))


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path, tiny_model: Path) -> None:
    server = Served(tmp_path / "home", tiny_model)
    server.client.close()
    pids = [server.pid(role) for role in ROLES]
    server.process.kill()
    server.process.wait()
    until(lambda: not any(map(alive, pids)), 10)
