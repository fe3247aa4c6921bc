"""agent-rl: the command line and the composition root. Heavy imports stand inside the commands that need them."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_rl.settings import Settings, SettingsError, explain, load
from server import cli_tenants
from server.launch import LaunchError, read_settings
from server.redaction import Redacting

app = typer.Typer(
    help="An online learning server for live agents.", no_args_is_help=True, pretty_exceptions_enable=False
)
config_app = typer.Typer(help="What is in force, and why.", no_args_is_help=True)
releases_app = typer.Typer(help="What serves, what served, what was turned down.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(releases_app, name="releases")

ENGINES = {"torch": "torch_engine", "scripted": "scripted"}
LOOPS = {
    "recorder": "agent_rl.experience.recorder",
    "judge": "agent_rl.judge",
    "publisher": "server.publisher",
    "learner": "agent_rl.learner",
}
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; agent-rl.toml here if there is one.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="An option by its name: learner.lr=5e-4. Repeatable.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of everything that is kept.")]
SettingsFile = Annotated[Path, typer.Option("--settings", help="Complete settings, as serve writes them.")]


def options(config: Path | None, sets: list[str] | None, **named: object) -> tuple[Path | None, dict[str, object]]:
    """The file and the dotted overrides of a command line; `home` and the like are overrides by their usual names."""
    overrides: dict[str, object] = {name.replace("__", "."): v for name, v in named.items() if v is not None}
    for item in sets or []:
        name, sign, value = item.partition("=")
        if not sign:
            raise SettingsError(f"--set takes name=value, got {item!r}")
        overrides[name.strip()] = value
    return config, overrides


@app.command()
def serve(
    config: ConfigFile = None,
    sets: Sets = None,
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face causal language model.")] = None,
) -> None:
    """Run everything on this machine until Ctrl-C."""
    from server import launch

    settings = load(*options(config, sets, home=home, gateway__host=host, gateway__port=port, engine__model=model))
    asyncio.run(launch.serve(settings, say, show_line))


def say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def show_line(role: str, line: str) -> None:
    """On the console: what learner and publisher announce, and what any role complains of; the logs have it all."""
    if role == "redis":
        return
    if role in ("learner", "publisher") or any(word in line for word in (" WARNING ", " ERROR ", " CRITICAL ")):
        console.print(f"[dim]{role:>10}[/dim]  {escape(line)}", soft_wrap=True)


@app.command()
def demo(
    home: Home = None,
    start: Annotated[bool, typer.Option(help="Start a server of its own in a fresh home folder first.")] = False,
    interactions: Annotated[
        int | None, typer.Option(help="Conversations of a scenario; each has its own number.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Held-out questions.")] = 64,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these scenarios. Repeatable.")] = None,
    sets: Sets = None,
) -> None:
    """A simulated user with a preference talks to the server; watch the model take it up."""
    from server.demo import command

    if start:
        settings = load(*options(None, sets, home=home))
        play: Any = command.with_server
    else:
        settings = read_settings(run_file(home))
        play = command.run
    view = partial(teacher_messages, settings.learner.method.hindsight)
    asyncio.run(play(settings, interactions, questions, scenario, view, console))


def teacher_messages(template: str, question: str, complaint: str) -> Any:
    """The teacher's view of a question and what was said about its answer, as messages of the OpenAI wire."""
    from agent_rl.hindsight import TEMPLATES
    from agent_rl.types import Message

    messages = TEMPLATES[template]((Message("user", question),), complaint, None) or ()
    return [{"role": message.role, "content": message.content} for message in messages]


@app.command()
def chat(home: Home = None, policy: Annotated[str, typer.Option(help="Which policy to talk to.")] = "default") -> None:
    """Talk to the server in this terminal; it says when the model behind it changes."""
    from server import chat as terminal

    terminal.run(read_settings(run_file(home)), policy, console)


@app.command()
def connect(
    url: Annotated[str, typer.Option(help="The server: wss://HOST or https://HOST.")],
    key_file: Annotated[
        Path | None, typer.Option(help="File with the API key; none where the server needs none.")
    ] = None,
    host: Annotated[str, typer.Option(help="Loopback address of the local endpoint.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the local endpoint.")] = 8800,
) -> None:
    """An endpoint on this machine that speaks through one socket with a server elsewhere."""
    from server import connect as tunnel

    logging.basicConfig(level="WARNING", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise LaunchError(f"--host {host} is not loopback: whoever reaches the local endpoint speaks with your key")
    key = None if key_file is None else key_file.read_text().strip()
    say(f"http://{host}:{port}/v1 goes to {url}; Ctrl-C stops it")
    asyncio.run(tunnel.run(url, key, host, port))


def run_file(home: Path | None) -> Path:
    return (home or load().home) / "run" / "settings.json"


@config_app.command("show")
def config_show(config: ConfigFile = None, sets: Sets = None, home: Home = None) -> None:
    """Every option, its value, and where the value came from."""
    table = Table("option", "value", "from", box=None, pad_edge=False)
    for name, value, where in explain(*options(config, sets, home=home)):
        style = None if where == "default" else "bold"
        table.add_row(name, escape(str(value)), where, style=style)
    console.print(table)


# ---------------------------------------------------------------------------------------------------- releases


def with_store(home: Path | None, work: Callable[[Any, Settings], Awaitable[None]]) -> None:
    """Run `work(store, settings)` on the database of a served home."""
    from agent_rl.experience.store import Store

    async def connected() -> None:
        settings = read_settings(run_file(home))
        store = await Store.open(settings.database_url)
        try:
            await work(store, settings)
        finally:
            await store.close()

    asyncio.run(connected())


cli_tenants.add_commands(app, with_store, console)


@releases_app.command("list")
def releases_list(home: Home = None, limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20) -> None:
    """Releases, newest first."""
    from agent_rl.experience import lineage

    async def work(store: Any, settings: Settings) -> None:
        table = Table("release", "policy", "state", "step", "made", "why", box=None, pad_edge=False)
        for release in await lineage.releases(store, limit=limit):
            table.add_row(
                release.release_id,
                release.policy_id,
                release.state,
                str(release.step),
                moment(release.created_at),
                "; ".join(release.reasons),
            )
        console.print(table)
        for policy in await store.policies():
            deployment = await store.deployment(policy.policy_id)
            console.print(f"{policy.policy_id}: {deployment.live} serves (generation {deployment.generation})")

    with_store(home, work)


@releases_app.command("show")
def releases_show(release: str, home: Home = None) -> None:
    """One release: where it comes from, and what its exam found."""
    from agent_rl.experience import lineage

    async def work(store: Any, settings: Settings) -> None:
        found = await lineage.find_release(store, release)
        if found is None:
            raise LaunchError(f"there is no release {release!r}; `agent-rl releases list` shows what there is")
        for name in found.__dataclass_fields__:
            value = getattr(found, name)
            console.print(f"{name:15} {escape(moment(value) if name == 'created_at' else str(value))}")
        report = await lineage.last_exam(store, found.release_id)
        if report is None:
            console.print("not examined yet")
            return
        console.print(f"\nexam: {'passed' if report.passed else 'failed'} in {report.seconds:.1f} s")
        for reason in report.reasons:
            console.print(f"  - {escape(reason)}")
        for name, value in sorted(report.values.items()):
            console.print(f"  {name:32} {value:.4g}")
        for probe, answer in report.samples[:4]:
            console.print(f"  [dim]{escape(probe)}[/dim] {escape(answer)}")

    with_store(home, work)


@releases_app.command("promote")
def releases_promote(release: str, reason: str = "by hand", home: Home = None) -> None:
    """Let a release serve, whatever its exam said."""
    from agent_rl.experience import lineage

    async def work(store: Any, settings: Settings) -> None:
        found = await lineage.find_release(store, release)
        if found is None:
            raise LaunchError(f"there is no release {release!r}; `agent-rl releases list` shows what there is")
        attempts = settings.learner.max_attempts
        deployment = await lineage.promote(store, found.release_id, actor=actor(), reason=reason, max_attempts=attempts)
        console.print(f"{deployment.live} serves {deployment.policy_id} (generation {deployment.generation})")

    with_store(home, work)


@releases_app.command("rollback")
def releases_rollback(
    to: Annotated[str | None, typer.Argument(help="Release to go back to, or 'base'; none: the one before.")] = None,
    policy: str = "default",
    reason: str = "by hand",
    home: Home = None,
) -> None:
    """Let an earlier release serve again; what was learned after it is cut off."""
    from agent_rl.experience import lineage

    async def work(store: Any, settings: Settings) -> None:
        attempts = settings.learner.max_attempts
        deployment = await lineage.rollback(store, policy, to, actor=actor(), reason=reason, max_attempts=attempts)
        console.print(f"{deployment.live} serves {policy} (generation {deployment.generation})")

    with_store(home, work)


def actor() -> str:
    import getpass

    return f"cli:{getpass.getuser()}"


def moment(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


# ------------------------------------------------------------------------------ what serve starts, one process each


@app.command(hidden=True)
def prepare(settings: SettingsFile) -> None:
    """Bring database, model, policy and first key into being."""
    from server.preparation import prepare as run

    asyncio.run(run(read_settings(settings), say))


@app.command(hidden=True)
def role(name: str, settings: SettingsFile) -> None:
    """Run one role until SIGTERM."""
    chosen = read_settings(settings)
    logging.basicConfig(
        level="WARNING",
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.getLogger("agent_rl").setLevel(chosen.log_level.upper())
    try:
        asyncio.run(run_loop(name, chosen)) if name in LOOPS else run_app(name, chosen)
    except Exception:  # the boundary of a process: the supervisor starts another
        logging.getLogger(f"agent_rl.{name}").exception("this role has ended")
        raise SystemExit(1) from None


def run_app(name: str, settings: Settings) -> None:
    """Serve a FastAPI app until SIGTERM; running answers get a few seconds to end."""
    import uvicorn

    engine, gateway = settings.engine, settings.gateway
    options: dict[str, Any] = {"http": "httptools"}
    if name == "gateway":
        from server.http_protocol import uvicorn_options

        options = uvicorn_options(gateway)
    module = "server.app" if name == "gateway" else f"server.engines.{ENGINES[engine.kind]}"
    host, port = (gateway.host, gateway.port) if name == "gateway" else ("127.0.0.1", engine.port)
    config = uvicorn.Config(
        import_module(module).create_app(settings),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        loop="uvloop",
        server_header=False,
        timeout_graceful_shutdown=8,
        **options,
    )
    uvicorn.Server(config).run()


async def run_loop(name: str, settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await import_module(LOOPS[name]).run(settings, stop)


def main() -> None:
    """The console script: errors of ours in one line, without a stack trace."""
    try:
        app()
    except (RuntimeError, LookupError, ValueError) as error:
        complaints.print(f"agent-rl: {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
