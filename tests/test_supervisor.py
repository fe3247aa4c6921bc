"""Children are restarted, stopped in order, killed when they do not listen, and never outlive the supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from server.supervisor import Role, Supervisor, describe

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(100)",
]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


async def until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.02)


async def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    supervisor = Supervisor(tmp_path, lambda role, line: lines.append((role, line)))
    role = Role("sleeper", SLEEPER)
    try:
        await supervisor.start(role)
        await until(lambda: ("sleeper", "up") in lines)
        assert role.process is not None
        first = role.process.pid
        assert (tmp_path / "run" / "sleeper.pid").read_text() == str(first)
        os.kill(first, signal.SIGKILL)
        await until(lambda: lines.count(("sleeper", "up")) == 2)
        assert role.restarts == 1
        assert role.process.pid != first
        assert (tmp_path / "run" / "sleeper.pid").read_text() == str(role.process.pid)
    finally:
        await supervisor.stop()
    assert not alive(role.process.pid)
    assert (tmp_path / "logs" / "sleeper.log").read_text() == "up\nup\n"


async def test_a_child_whose_id_cannot_be_noted_is_kept_all_the_same(tmp_path: Path) -> None:
    lines: list[str] = []
    supervisor = Supervisor(tmp_path, lambda _, line: lines.append(line))
    (tmp_path / "run" / "sleeper.pid").mkdir()
    role = Role("sleeper", SLEEPER)
    try:
        await supervisor.start(role)
        assert role.process is not None
        await until(lambda: lines == ["up"])
        os.kill(role.process.pid, signal.SIGKILL)
        await until(lambda: lines == ["up", "up"])
        assert role.restarts == 1  # one child took its place, not one for each failed note
    finally:
        await supervisor.stop()
    assert role.process.returncode is not None


async def test_what_does_not_stop_in_its_time_is_killed(tmp_path: Path) -> None:
    lines: list[str] = []
    supervisor = Supervisor(tmp_path, lambda _, line: lines.append(line))
    role = Role("stubborn", STUBBORN, stop_s=0.2)
    await supervisor.start(role)
    await until(lambda: lines == ["up"])
    await supervisor.stop()
    assert role.process is not None
    assert role.process.returncode == -signal.SIGKILL


def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from server.supervisor import Role, Supervisor
async def main():
    supervisor = Supervisor(Path({str(tmp_path)!r}), lambda role, line: print(role, flush=True))
    await supervisor.start(Role("stubborn", {STUBBORN!r}))
    await asyncio.sleep(100)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "stubborn\n"
    child = int((tmp_path / "run" / "stubborn.pid").read_text())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline, "the child outlived its supervisor"
        time.sleep(0.02)


def test_how_a_child_ended_is_said_in_words() -> None:
    assert describe(3) == "exit status 3"
    assert describe(-9) == "SIGKILL"
