"""Agents as people run them, unchanged: a question, a tool that really runs, an answer; then what was recorded."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway import OWNER, Gateway, running_gateway
from sqlalchemy import select
from tiny import AGENT, make_model

from agent_rl.experience.tables import turns

HERE = Path(__file__).parent
COMMAND = "echo tea-$((4700+11))"


def call(tool: str, **arguments: str) -> str:
    return f"Let me see.\n<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


SCRIPT = {
    "rules": [
        {"user": "tea-4711", "text": "It says tea."},
        {"user": "run it", "prompt": '"exec_command"', "text": call("exec_command", cmd=COMMAND)},
        {"user": "run it", "prompt": '"name": "Bash"', "text": call("Bash", command=COMMAND, description="Says tea")},
        {"user": "run it", "prompt": '"name": "bash"', "text": call("bash", command=COMMAND)},
        {"user": "run it", "prompt": '"name": "look_up"', "text": call("look_up", word="tea")},
    ]
}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the agents' programs: those of package-lock.json, installed once in this checkout."""
    if shutil.which("npm") is None:
        pytest.skip("these agents come from npm, which is not here")
    folder = HERE / "node_modules"
    if not is_newer(folder / ".package-lock.json", HERE / "package-lock.json"):
        install("npm", "ci", "--no-audit", "--no-fund", "--prefix", str(HERE))
    return folder / ".bin"


@pytest.fixture(scope="module")
def sdks() -> Path:
    """A Python of its own with the agents' libraries: those of requirements.txt, installed once in this checkout."""
    folder, wanted = HERE / ".venv", HERE / "requirements.txt"
    if not is_newer(folder / "installed", wanted):
        install(sys.executable, "-m", "venv", "--clear", str(folder))
        install(str(folder / "bin" / "pip"), "install", "--quiet", "--requirement", str(wanted))
        (folder / "installed").touch()
    return folder / "bin" / "python"


def is_newer(mark: Path, wanted: Path) -> bool:
    return mark.exists() and mark.stat().st_mtime >= wanted.stat().st_mtime


def install(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    model = make_model(tmp_path / "model", template=AGENT)
    options = {"max_context": 400_000, "max_prompt_tokens": 390_000}
    async with running_gateway(model, redis_url, tmp_path / "home", script=SCRIPT, **options) as running:  # type: ignore[arg-type]
        yield running


async def run(program: Path, *arguments: str, home: Path, **environment: str) -> str:
    """What it prints. Its home is empty, its folder too."""
    folder = home / "work"
    folder.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")}
    process = await asyncio.create_subprocess_exec(
        str(program),
        *arguments,
        cwd=folder,
        env=kept | {"HOME": str(home)} | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def recorded(gateway: Gateway) -> list[dict[str, Any]]:
    """The conversation's own turns, oldest first; side requests left out."""
    for _ in range(100):
        async with gateway.store.read() as connection:
            rows = (await connection.execute(select(turns).order_by(turns.c.created_at))).mappings().all()
        found = [dict(row) for row in rows if row["no_lesson"] != "side"]
        if len(found) >= 2:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"only {len(found)} turns were recorded")


async def one_exact_round_trip(gateway: Gateway, rule: str) -> None:
    """The answer after the tool goes on behind the ids of the call, as they were sampled."""
    first, second = (await recorded(gateway))[-2:]
    assert (second["parent_id"], second["fork_reason"]) == (first["turn_id"], None)
    assert first["session_id"] == second["session_id"]
    assert second["session_rule"] == rule
    assert second["answer"]["content"] == "It says tea."
    before, after = await gateway.transcript(first["turn_id"]), await gateway.transcript(second["turn_id"])
    sampled = before.prompt_ids + before.turn.response_ids
    assert after.prompt_ids[: len(sampled)] == sampled
    assert after.turn.messages[0].role == "tool"


@pytest.mark.parametrize("websockets", [False, True])
async def test_codex(
    gateway: Gateway, programs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, websockets: bool
) -> None:
    caplog.set_level(logging.INFO, "uvicorn.error")
    home = tmp_path / "codex"
    home.mkdir()
    (home / "config.toml").write_text(f"""
        model = "default"
        model_provider = "arl"
        approval_policy = "never"
        sandbox_mode = "danger-full-access"
        [model_providers.arl]
        name = "arl"
        base_url = "{gateway.url}/v1"
        wire_api = "responses"
        env_key = "ARL_KEY"
        supports_websockets = {str(websockets).lower()}
    """)
    said = await run(
        programs / "codex",
        *("exec", "--skip-git-repo-check", "--json", "run it please"),
        home=home / "home",
        CODEX_HOME=str(home),
        ARL_KEY=OWNER,
    )
    assert "tea-4711" in said
    assert "It says tea." in said
    await one_exact_round_trip(gateway, "session-id")
    assert ('"WebSocket /v1/responses" [accepted]' in caplog.text) is websockets


async def test_claude_code(gateway: Gateway, programs: Path, tmp_path: Path) -> None:
    said = await run(
        programs / "claude",
        *("-p", "run it please", "--model", "sonnet", "--allowedTools", "Bash"),
        home=tmp_path / "claude",
        ANTHROPIC_BASE_URL=gateway.url,
        ANTHROPIC_AUTH_TOKEN=OWNER,
        ANTHROPIC_DEFAULT_SONNET_MODEL="default",
        ANTHROPIC_DEFAULT_HAIKU_MODEL="default",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )
    assert "It says tea." in said
    await one_exact_round_trip(gateway, "x-claude-code-session-id")


async def test_pi(gateway: Gateway, programs: Path, tmp_path: Path) -> None:
    home = tmp_path / "pi"
    models = home / ".pi" / "agent" / "models.json"
    models.parent.mkdir(parents=True)
    provider = {"baseUrl": f"{gateway.url}/v1", "api": "openai-completions", "apiKey": OWNER}
    models.write_text(json.dumps({"providers": {"arl": provider | {"models": [{"id": "default"}]}}}))
    said = await run(programs / "pi", *("-p", "--provider", "arl", "--model", "default", "run it please"), home=home)
    assert "It says tea." in said
    await one_exact_round_trip(gateway, "prefix")


@pytest.mark.parametrize(("api", "rule"), [("responses", "conversation"), ("chat_completions", "prefix")])
async def test_openai_agents(gateway: Gateway, sdks: Path, tmp_path: Path, api: str, rule: str) -> None:
    ours = {"OPENAI_BASE_URL": f"{gateway.url}/v1", "OPENAI_API_KEY": OWNER}
    said = await run(sdks, str(HERE / "agents_sdk.py"), api, home=tmp_path / "agents", **ours)
    assert said == "It says tea.\n"
    await one_exact_round_trip(gateway, rule)


async def test_langgraph(gateway: Gateway, sdks: Path, tmp_path: Path) -> None:
    ours = {"OPENAI_BASE_URL": f"{gateway.url}/v1", "OPENAI_API_KEY": OWNER}
    said = await run(sdks, str(HERE / "langgraph_agent.py"), home=tmp_path / "langgraph", **ours)
    assert said == "It says tea.\n"
    await one_exact_round_trip(gateway, "prefix")
