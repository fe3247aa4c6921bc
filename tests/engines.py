"""Engine servers for tests, and adapters for them to load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import serving

from agent_rl.engine import Chunk, Completion, Engine
from agent_rl.models import Lora, LoraConfig, load_model, load_tokenizer, save_adapter
from agent_rl.settings import Settings, load
from agent_rl.types import BASE_RELEASE, Sampling
from server.engines import scripted, torch_engine

ENGINES = ("torch", "scripted")
KEY = "engine-key"
LONG = 300  # tokens of a long answer
GREEDY = Sampling(max_tokens=12, temperature=0.0)
LONG_ANSWER = Sampling(max_tokens=LONG, temperature=0.0)
SCRIPT: dict[str, Any] = {
    "rules": [
        {"user": "long", "text": "a " * LONG, "token_s": 0.002},
        {"user": "tea", "release": "r1", "text": "Tea, says the first."},
        {"user": "tea", "release": "r2", "text": "Tea, says the second."},
        {"user": "tea", "text": "Tea is a hot drink made from leaves.", "logprob": [-0.5, -0.25]},
    ]
}


@dataclass(frozen=True)
class Server:
    """A running engine and its client. `samples`: answers come from weights, so that they can be computed again."""

    engine: Engine
    folder: Path
    samples: bool

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    def prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    async def load(self, state: str) -> int:
        """SGLang's num_running_reqs or num_waiting_reqs."""
        info = await self.engine._json("GET", "/server_info")
        return int(info["internal_states"][0][f"num_{state}_reqs"])


def engine_settings(model: Path, **options: object) -> Settings:
    fixed = {"model": str(model), "admin_key": KEY, "dtype": "float32", "threads": 1, "max_batch": 4}
    return load(overrides={f"engine.{name}": value for name, value in (fixed | options).items()})


@asynccontextmanager
async def running(kind: str, model: Path, folder: Path, **options: object) -> AsyncIterator[Server]:
    """A server of the engine protocol: ours over torch, or ours from a script."""
    script = folder / "script.json"
    script.write_text(json.dumps(SCRIPT))
    settings = engine_settings(model, script=str(script), **options)
    app = {"torch": torch_engine, "scripted": scripted}[kind].create_app(settings)
    async with serving(app) as url:
        engine = Engine(url, admin_key=KEY, timeout_s=30)
        try:
            yield Server(engine, model, samples=kind == "torch")
        finally:
            await engine.close()


def make_adapter(folder: Path, model: Path, seed: int, *, strength: float = 0.5) -> Path:
    """An adapter of rank 4 that changes what the model says."""
    config = LoraConfig(4, 8, ("q_proj", "v_proj", "down_proj"))
    tensors = Lora(load_model(model, "float32")).new_adapter(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.normal_(0.0, strength, generator=generator)
    save_adapter(folder, config, tensors)
    return folder


def needs_weights(server: Server) -> None:
    if not server.samples:
        pytest.skip("a script has no weights to compute with")


async def gather(stream: AsyncIterator[Chunk]) -> Completion:
    chunks = [chunk async for chunk in stream]
    last = chunks[-1]
    assert last.finish is not None
    assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return Completion(
        ids=tuple(i for chunk in chunks for i in chunk.ids),
        logprobs=tuple(p for chunk in chunks for p in chunk.logprobs),
        kept_mass=tuple(m for chunk in chunks for m in chunk.kept_mass),
        finish=last.finish,
        spans=last.spans,
        matched_stop=last.matched_stop,
    )


async def begun(server: Server, rid: str, release: str = BASE_RELEASE) -> asyncio.Task[Completion]:
    """A long answer whose first token is there."""
    started = asyncio.Event()

    async def answer() -> AsyncIterator[Chunk]:
        async for chunk in server.engine.stream(server.prompt("long"), LONG_ANSWER, rid=rid, release=release):
            started.set()
            yield chunk

    task = asyncio.create_task(gather(answer()))
    await asyncio.wait({task, asyncio.create_task(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert not task.done(), "the long answer was over at once"
    return task


async def running_becomes(server: Server, count: int) -> None:
    async with asyncio.timeout(5):
        while await server.load("running") != count:  # noqa: ASYNC110 — a server's state is asked for
            await asyncio.sleep(0.005)
