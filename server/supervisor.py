"""Runs the roles on one machine: each its own process, restarted with back-off, all stopped together, none left behind.

Every child is in a process group of its own (so that Ctrl-C reaches the supervisor alone) and asks the kernel to be
killed when the supervisor dies. All that a role holds is safe against that: the journal is synced, SQL and Redis
are transactional, weights are written before they are marked.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("agent_rl.supervisor")

PR_SET_PDEATHSIG = 1
FIRST_PAUSE_S, LONGEST_PAUSE_S, GOOD_RUN_S = 0.5, 30.0, 60.0


@dataclass(slots=True)
class Role:
    """One child: how to start it, how long it may take to stop, and how it is doing."""

    name: str
    command: Sequence[str]
    stop_s: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0


class Supervisor:
    """`await start(role)` for each in order, then `await stop()`, which ends them in the opposite order."""

    def __init__(self, home: Path, show: Callable[[str, str], None]) -> None:
        """`show(role, line)` is called with each line that a child writes; all of them also go to logs/<role>.log, and
        the child's process id to run/<role>.pid."""
        self.logs, self.pids, self.show = home / "logs", home / "run", show
        for folder in (self.logs, self.pids):
            folder.mkdir(parents=True, exist_ok=True)
        self.roles: list[Role] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.stopping = asyncio.Event()

    async def start(self, role: Role) -> None:
        self.roles.append(role)
        await self._spawn(role)
        self.tasks.append(asyncio.create_task(self._keep(role), name=f"keep {role.name}"))

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL to what has not ended in its time; in the order opposite to starting."""
        self.stopping.set()
        for role in reversed(self.roles):
            process = role.process
            if process is None or process.returncode is not None:
                continue
            signal_group(process.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), role.stop_s)
            except TimeoutError:
                log.warning("%s did not stop within %.0f s and is killed", role.name, role.stop_s)
                signal_group(process.pid, signal.SIGKILL)
                await process.wait()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _spawn(self, role: Role) -> None:
        role.process = await asyncio.create_subprocess_exec(
            *role.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **role.environment},
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
        if self.stopping.is_set():  # it was asked for just before
            signal_group(role.process.pid, signal.SIGKILL)
        with suppress(OSError):  # a full disk costs the note of its id, not the child: it runs already
            (self.pids / f"{role.name}.pid").write_text(str(role.process.pid))

    async def _keep(self, role: Role) -> None:
        """Copy the child's output; when it ends by itself, start it again after a pause that doubles up to a limit."""
        pause = FIRST_PAUSE_S
        while not self.stopping.is_set():
            process = role.process
            assert process is not None
            assert process.stdout is not None
            started = time.monotonic()
            await self._copy(role.name, process.stdout)
            code = await process.wait()
            if self.stopping.is_set():
                return
            signal_group(process.pid, signal.SIGKILL)  # nothing that it started may outlive it
            pause = FIRST_PAUSE_S if time.monotonic() - started > GOOD_RUN_S else min(pause * 2, LONGEST_PAUSE_S)
            log.warning("%s ended (%s); starting it again in %.1f s", role.name, describe(code), pause)
            await self._again(role, pause)

    async def _again(self, role: Role, pause: float) -> None:
        """Start a role again after `pause`, and again where the system refuses a process; not once all are to stop."""
        while not self.stopping.is_set():
            await asyncio.sleep(pause)
            if self.stopping.is_set():
                return
            try:
                await self._spawn(role)
            except OSError as error:
                log.warning("%s cannot be started: %s", role.name, error)
                pause = min(pause * 2, LONGEST_PAUSE_S)
            else:
                role.restarts += 1
                return

    async def _copy(self, name: str, stream: asyncio.StreamReader) -> None:
        """Until the child closes it. A full disk or a closed console costs lines, never the child."""
        rest = b""
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            with suppress(OSError):
                for line in lines:
                    self.show(name, line.decode(errors="replace"))
            with suppress(OSError), (self.logs / f"{name}.log").open("ab") as file:
                file.write(data)
        if rest:
            with suppress(OSError):
                self.show(name, rest.decode(errors="replace"))


def die_with_parent(parent: int) -> Callable[[], None]:
    """To run in the child before its program: the kernel kills it when `parent` dies."""
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return arrange


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the process group that `pid` leads, if there is anybody left in it."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def describe(code: int) -> str:
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name
