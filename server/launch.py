"""`agent-rl serve`: the whole of agent-rl on one machine, from settings to a printed URL.

Redis first (unless one is given), then the database, the model and the first key, then the roles; the gateway last, so
that whoever reads the URL is answered.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from pydantic import SecretStr, ValidationError

from agent_rl.settings import Settings
from server.private_redis import redis_command
from server.supervisor import Role, Supervisor, die_with_parent

ROLES = ("engine", "recorder", "judge", "publisher", "learner", "gateway")  # in the order of starting
Show = Callable[[str], None]


class LaunchError(RuntimeError):
    """Something that `serve` needs is not there; the message says what to do."""


async def serve(settings: Settings, show: Show, show_line: Callable[[str, str], None]) -> None:
    """Run until SIGINT or SIGTERM; `show` gets what the user should read, `show_line` what the roles log.

    Raises LaunchError or ValueError if it cannot start; whatever was started is stopped before this returns or raises.
    """
    stop = asyncio.Event()
    this = asyncio.current_task()
    assert this is not None

    def asked_to_stop() -> None:
        if not stop.is_set():
            stop.set()
            this.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop)
    try:
        async with served(settings, show, show_line) as complete_settings:
            show(banner(complete_settings))
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    show("everything has stopped")


@asynccontextmanager
async def served(settings: Settings, show: Show, show_line: Callable[[str, str], None]) -> AsyncIterator[Settings]:
    """Everything runs and answers inside the block, which gets the complete settings; nothing is left after it."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_one(settings.home):
        settings = complete(settings)
        supervisor = Supervisor(settings.home, show_line)
        try:
            await _start(supervisor, settings, write_settings(settings), show)
            yield settings
        finally:
            await supervisor.stop()


async def _start(supervisor: Supervisor, settings: Settings, file: Path, show: Show) -> None:
    if settings.store.redis is None:
        folder = settings.home.resolve() / "redis"
        await supervisor.start(Role("redis", redis_command(folder)))
        await _wait_for(lambda: _connects(folder / "redis.sock"), 10, "the private Redis does not start", settings)
    prepare = await asyncio.create_subprocess_exec(
        *_command("prepare", file), start_new_session=True, preexec_fn=die_with_parent(os.getpid())
    )
    try:
        if await prepare.wait() != 0:
            raise LaunchError("the database or the model could not be prepared; see the message above")
    finally:
        if prepare.returncode is None:
            prepare.kill()
    for name in wanted_roles(settings):
        show(f"starting {name}")
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if name != "engine":
            environment["OMP_NUM_THREADS"] = "1"
        stop_s = 30.0 if name == "learner" else 10.0  # it ends the update that it is in, and commits it
        await supervisor.start(Role(name, _command(f"role {name}", file), stop_s, environment))
    url = f"{base_url(settings)}/readyz"
    await _wait_for(lambda: _answers(url), 120, "the gateway does not become ready", settings)


def wanted_roles(settings: Settings) -> list[str]:
    """Our engine is left out where another is named, the learner where it is switched off."""
    absent = {"engine"} if settings.engine.port == 0 else set()
    if not settings.learner.enabled:
        absent.add("learner")
    return [name for name in ROLES if name not in absent]


def complete(settings: Settings) -> Settings:
    """Settings with everything decided that the roles must agree on: ports, the engine's URL and key, the model."""
    home = settings.home.resolve()
    engine, gateway = settings.engine, settings.gateway
    if gateway.host not in ("127.0.0.1", "::1", "localhost") and not gateway.require_key:
        raise LaunchError(f"gateway.host {gateway.host} is not loopback: leave gateway.require_key on")
    if engine.url and not engine.model:
        raise LaunchError("engine.url needs engine.model too: the folder of the model it serves, for its tokenizer")
    own = engine.url is None
    port = (engine.port or free_port()) if own else 0
    engine = engine.model_copy(
        update={
            "port": port,
            "url": f"http://127.0.0.1:{port}" if own else engine.url,
            "admin_key": engine.admin_key or (SecretStr(secrets.token_urlsafe(24)) if own else None),
            "model": (engine.model or settings.smollm2_dir).resolve(),
        }
    )
    gateway = gateway.model_copy(update={"port": gateway.port or free_port()})
    try:
        socket.create_server((gateway.host, gateway.port)).close()
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {gateway.host}:{gateway.port}: {error.strerror}; choose another --port or --host"
        ) from error
    return settings.model_copy(update={"home": home, "engine": engine, "gateway": gateway})


def write_settings(settings: Settings) -> Path:
    """The complete settings, secrets included, in a file that only this user can read."""
    tree = settings.model_dump(mode="json")
    if settings.engine.admin_key:
        tree["engine"]["admin_key"] = settings.engine.admin_key.get_secret_value()
    path = settings.home / "run" / "settings.json"
    path.parent.mkdir(exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_text(json.dumps(tree, indent=1))
    return path


def read_settings(path: Path) -> Settings:
    """What `write_settings` wrote. Raises LaunchError where nothing was served from this home yet."""
    if not path.is_file():
        raise LaunchError(f"{path} is not there: start `agent-rl serve` with this home folder first")
    try:
        return Settings(**json.loads(path.read_text()))
    except ValidationError as error:
        raise LaunchError(f"{path} was written by another version: start `agent-rl serve` anew") from error


def base_url(settings: Settings) -> str:
    host = f"[{settings.gateway.host}]" if ":" in settings.gateway.host else settings.gateway.host
    return f"http://{host}:{settings.gateway.port}"


def banner(settings: Settings) -> str:
    key = (settings.home / "key").read_text().strip()
    url = base_url(settings)
    return (
        f"\n  agent-rl listens on {url}   (OpenAI base URL: {url}/v1)\n"
        f"  API key   {key}   (also in {settings.home / 'key'})\n"
        f"  data      {settings.home}\n"
        f"  try       curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\\n"
        f"              -H 'Content-Type: application/json' \\\n"
        f"""              -d '{{"model": "default", "messages": [{{"role": "user", "content": "What is tea?"}}]}}'\n"""
        "  Ctrl-C stops everything.\n"
    )


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """One supervisor per home folder."""
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"{home} is served by another agent-rl already; stop it or choose another --home"
            ) from None
        yield


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _command(what: str, settings_file: Path) -> list[str]:
    return [sys.executable, "-m", "server.cli", *what.split(), "--settings", str(settings_file)]


async def _wait_for(ready: Callable[[], bool], seconds: float, complaint: str, settings: Settings) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not await asyncio.to_thread(ready):
        if asyncio.get_running_loop().time() > deadline:
            raise LaunchError(f"{complaint} within {seconds:.0f} s; its log is in {settings.home / 'logs'}")
        await asyncio.sleep(0.1)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        return os.path.exists(path) and s.connect_ex(str(path)) == 0


def _answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2) as answer:  # never through a proxy
            return bool(answer.status == 200)
    except OSError:
        return False
