"""Our gateway, recording every turn, beside the LiteLLM proxy and direct access: equal answers, equal timing.

    python tests/bench/gateway.py [--litellm VENV/bin/litellm] [--streams 1 16 64 256] [--memory 10000] [--write]

Each gateway runs as one process on a core of its own; whatever stands behind it, and the load, share the others. Behind
LiteLLM stands a small OpenAI endpoint, behind ours the scripted engine; both answer TOKENS tokens with the same timing.
What a gateway adds is what its clients see less what clients of the thing behind it see at the same load. CPU is the
gateway process's own; what recording costs elsewhere (recorder, Redis) is said beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from load import Load, Target, run

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import redis_server
from tiny import make_model

from agent_rl.settings import Settings, load
from server.launch import write_settings
from server.preparation import prepare

ROOT = Path(__file__).parents[2]
TOKENS = 32
FIRST_S, TOKEN_S = 0.05, 0.01
REQUESTS = {1: 40, 16: 480, 64: 960, 256: 2048}
WARM_UP = 32
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
QUESTION = {
    "role": "user",
    "content": "Question {n}: how do birds fly, and why is the sky blue? Please answer shortly.",
}
CHAT = {"model": "default", "messages": [QUESTION], "max_tokens": TOKENS, "stream": True}
RESULTS = ROOT / "docs" / "results" / "gateway.md"


@dataclass(frozen=True)
class Contestant:
    """Something with an address, the thing behind it, and the processes that it costs."""

    target: Target
    behind: str | None = None  # name of the target behind it
    process: int | None = None
    recording: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    name: str
    streams: int
    load: Load
    cpu_ms: float  # of its process, per request; 0 where there is none
    recording_ms: float  # of the processes beside it

    @property
    def rate(self) -> float:
        return len(self.load.answers) / self.load.seconds


# --------------------------------------------------------------------------------------------------- processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def process(command: list[str], cores: set[int], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on these cores until the block ends."""
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        os.sched_setaffinity(child.pid, cores)
        yield child
    finally:
        child.terminate()
        child.wait(20)


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    """Until the child answers there, whatever it says."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and child.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"nobody answers at {url}: {log.read_text()[-1000:]}")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20


# -------------------------------------------------------------------------------------------------- contestants


def start_upstream(stack: ExitStack, folder: Path, cores: set[int]) -> Contestant:
    port, log = free_port(), folder / "upstream.log"
    script = str(Path(__file__).with_name("upstream.py"))
    command = [sys.executable, script, str(port), str(TOKENS), str(FIRST_S), str(TOKEN_S)]
    stack.enter_context(process(command, cores, log))
    time.sleep(1)
    return Contestant(Target("direct", f"http://127.0.0.1:{port}/v1/chat/completions", {}, CHAT))


def start_litellm(stack: ExitStack, folder: Path, cores: set[int], program: Path, upstream: str) -> Contestant:
    port, log, config = free_port(), folder / "litellm.log", folder / "litellm.json"
    params = {"model": "openai/default", "api_base": upstream.removesuffix("/chat/completions"), "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "default", "litellm_params": params}]}))
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    key = "sk-bench"
    environment = {
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
    }
    child = stack.enter_context(process(command, cores, log, **environment))
    wait_for(f"http://127.0.0.1:{port}/health/liveliness", child, log)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return Contestant(Target("LiteLLM", url, {"authorization": f"Bearer {key}"}, CHAT), "direct", child.pid)


def start_ours(stack: ExitStack, folder: Path, own: set[int], others: set[int]) -> list[Contestant]:
    """The scripted engine, the recorder and the gateway, each as `agent-rl serve` starts it."""
    redis = stack.enter_context(redis_server())
    assert redis._process is not None
    os.sched_setaffinity(redis._process.pid, others)
    settings = settings_of(folder, redis.url)
    asyncio.run(prepare(settings, print))
    written = str(write_settings(settings))
    roles = {}
    for name in ("engine", "recorder", "gateway"):
        command = [sys.executable, "-m", "server.cli", "role", name, "--settings", written]
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        where, log = own if name == "gateway" else others, folder / f"{name}.log"
        roles[name] = stack.enter_context(process(command, where, log, **quiet))
        if name != "recorder":
            port = settings.engine.port if name == "engine" else settings.gateway.port
            wait_for(f"http://127.0.0.1:{port}/health", roles[name], log)
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0}
    generate = {"input_ids": list(range(3, 63)), "sampling_params": sampling, "return_logprob": True, "stream": True}
    key = {"authorization": f"Bearer {(settings.home / 'key').read_text().strip()}"}
    url = f"http://127.0.0.1:{settings.gateway.port}/v1/chat/completions"
    return [
        Contestant(Target("scripted engine", f"{settings.engine.url}/generate", {}, generate)),
        Contestant(
            Target("agent-rl", url, key, CHAT),
            "scripted engine",
            roles["gateway"].pid,
            (roles["recorder"].pid, redis._process.pid),
        ),
    ]


def settings_of(folder: Path, redis_url: str) -> Settings:
    script = folder / "script.json"
    answer = {"text": "a " * (TOKENS + 8)}
    script.write_text(json.dumps({"first_token_s": FIRST_S, "token_s": TOKEN_S, "default": answer}))
    engine_port = free_port()
    options = {
        "home": str(folder / "home"),
        "store.redis": redis_url,
        "engine.kind": "scripted",
        "engine.model": str(make_model(folder / "model")),
        "engine.script": str(script),
        "engine.port": engine_port,
        "engine.url": f"http://127.0.0.1:{engine_port}",
        "gateway.port": free_port(),
        "gateway.max_concurrency": 512,
    }
    return load(overrides=options)


# ------------------------------------------------------------------------------------------------- measurement


async def measure(contestant: Contestant, streams: int, requests: int, first: int) -> Row:
    pids = [pid for pid in (contestant.process, *contestant.recording) if pid]
    before = [cpu_s(pid) for pid in pids]
    load = await run(contestant.target, streams=streams, requests=requests, tokens=TOKENS, first=first)
    if contestant.recording:
        await asyncio.sleep(2)  # the recorder is behind by a batch
    own_ms, *others_ms = [(cpu_s(pid) - was) / requests * 1e3 for pid, was in zip(pids, before, strict=True)] or [0.0]
    return Row(contestant.target.name, streams, load, own_ms, sum(others_ms))


async def race(contestants: list[Contestant], streams: list[int]) -> list[Row]:
    rows, asked = [], 0
    for contestant in contestants:
        await run(contestant.target, streams=16, requests=WARM_UP, tokens=TOKENS, first=-WARM_UP)
        for count in streams:
            row = await measure(contestant, count, REQUESTS[count], asked)
            asked += REQUESTS[count]
            rows.append(row)
            print(line(row, rows, contestant.behind), flush=True)
    return rows


async def memory(contestant: Contestant, requests: int, samples: int = 10) -> list[float]:
    """MB resident at the start and after each tenth of `requests`."""
    assert contestant.process is not None
    sizes = [resident_mb(contestant.process)]
    for n in range(samples):
        each = requests // samples
        await run(contestant.target, streams=128, requests=each, tokens=TOKENS, first=10**6 + n * each)
        sizes.append(resident_mb(contestant.process))
    return sizes


# ------------------------------------------------------------------------------------------------------ report

COLUMNS = [
    *("", "streams", "requests/s"),
    *("first token ms, p50", "p99", "added, p50", "p99"),
    *("ms per token, p50", "p99", "added, p50", "p99"),
    *("CPU ms per request", "requests per core-second"),
]
HEADER = f"| {' | '.join(COLUMNS)} |\n|---|{'--:|' * (len(COLUMNS) - 1)}"


def line(row: Row, rows: list[Row], behind: str | None) -> str:
    base = next((r for r in rows if (r.name, r.streams) == (behind, row.streams)), None)
    cells: list[str] = [row.name, str(row.streams), f"{row.rate:.1f}"]
    for what in ("first_s", "token_s"):
        seen = [row.load.percentile(what, percent) * 1e3 for percent in (50, 99)]
        cells += [f"{ms:.2f}" for ms in seen]
        own = base and [base.load.percentile(what, percent) * 1e3 for percent in (50, 99)]
        cells += [f"{ms - was:.2f}" for ms, was in zip(seen, own, strict=True)] if own else ["", ""]
    cpu = [f"{row.cpu_ms:.2f}", f"{1e3 / row.cpu_ms:.0f}"] if row.cpu_ms else ["", ""]
    return "| " + " | ".join(cells + cpu) + " |"


def processor() -> str:
    """As Linux names it, else the architecture."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return names[0] if names else platform.machine()


def report(rows: list[Row], contestants: list[Contestant], sizes: list[float], litellm: str | None) -> str:
    behind = {c.target.name: c.behind for c in contestants}
    lines = [
        "# The gateway beside LiteLLM and direct access",
        "",
        f"Made by `make bench-gateway` on {date.today()}, {processor()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
        + (f", LiteLLM {litellm}" if litellm else "")
        + f". Answers of {TOKENS} tokens, the first after {FIRST_S * 1e3:.0f} ms, then one per {TOKEN_S * 1e3:.0f} ms. "
        "Each gateway has one core; load and what stands behind share the rest. *Added*: less what the same load sees "
        "directly at what stands behind it (LiteLLM: `direct`, ours: `scripted engine`).",
        "",
        HEADER,
        *(line(row, rows, behind[row.name]) for row in rows),
        "",
        *ratios(rows),
    ]
    if sizes:
        words = ", ".join(f"{size:.0f}" for size in sizes)
        lines += ["", f"Memory of our gateway over the requests of the last run, MB at each tenth: {words}."]
    return "\n".join(lines) + "\n"


def ratios(rows: list[Row]) -> list[str]:
    ours = {row.streams: row for row in rows if row.name == "agent-rl"}
    theirs = {row.streams: row for row in rows if row.name == "LiteLLM"}
    said = []
    for n in sorted(ours.keys() & theirs.keys()):
        cheaper, faster = theirs[n].cpu_ms / ours[n].cpu_ms, ours[n].rate / theirs[n].rate
        said.append(
            f"- {n} streams: {cheaper:.1f} × LiteLLM's answers per core-second, {faster:.1f} × its answers per second"
        )
    beside = ", ".join(f"{row.recording_ms:.2f} ms at {n}" for n, row in ours.items())
    return [*said, f"- recorder and Redis beside our gateway, CPU per request: {beside} streams"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--litellm", type=Path, help="the program of its proxy")
    parser.add_argument("--streams", type=int, nargs="+", default=list(REQUESTS), choices=list(REQUESTS))
    parser.add_argument("--memory", type=int, default=10_000, help="requests of the memory run; 0: none")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS.relative_to(ROOT)}")
    given = parser.parse_args()
    cores = os.sched_getaffinity(0)
    own = {min(cores)}
    others = cores - own or cores
    os.sched_setaffinity(0, others)
    folder = Path(tempfile.mkdtemp(prefix="bench-gateway-"))
    print(HEADER)
    with ExitStack() as stack:
        upstream = start_upstream(stack, folder, others)
        contestants = [upstream]
        if given.litellm:
            contestants.append(start_litellm(stack, folder, own, given.litellm, upstream.target.url))
        contestants += start_ours(stack, folder, own, others)
        rows = asyncio.run(race(contestants, given.streams))
        sizes = asyncio.run(memory(contestants[-1], given.memory)) if given.memory else []
    text = report(rows, contestants, sizes, version_of(given.litellm) if given.litellm else None)
    print(text)
    if given.write:
        RESULTS.write_text(text)


def version_of(program: Path) -> str:
    words: Any = subprocess.run(
        [program.with_name("pip"), "show", "litellm"], capture_output=True, text=True, check=True
    )
    return str(next(line.split(": ")[1] for line in words.stdout.splitlines() if line.startswith("Version")))


if __name__ == "__main__":
    main()
