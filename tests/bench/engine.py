"""Our engine over HTTP against transformers' `generate`: same model, same threads, same run, same greedy answers.

    python tests/bench/engine.py MODEL_FOLDER [--dtype bfloat16] [--threads 1] [--tokens 64]

Prints tokens per second of both and their ratio, at 1 and 8 streams.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from serving import serving

from agent_rl.engine import Engine, _events, sampling_body
from agent_rl.engine_answers import AnswerReader, needed
from agent_rl.models import load_model, load_tokenizer
from agent_rl.settings import load
from agent_rl.types import Sampling
from server.engines import torch_engine

QUESTIONS = Path(__file__).parent.parent.parent / "server" / "data" / "questions.txt"
PROMPT = 40
ROUNDS = 3  # the best of them counts: the machine has other work


def prompts(count: int, model: Path) -> list[list[int]]:
    """Ordinary text, each prompt another piece of it: how flat the next token's distribution is costs time."""
    ids = load_tokenizer(model).encode(QUESTIONS.read_text())
    return [ids[n * PROMPT : (n + 1) * PROMPT] for n in range(count)]


def theirs(model: Any, ids: list[list[int]], tokens: int) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        batch = torch.tensor(ids)
        model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
        )
    return time.perf_counter() - start


async def ours(engine: Engine, ids: list[list[int]], sampling: Sampling) -> float:
    start = time.perf_counter()

    async def one(prompt: list[int]) -> int:
        params = sampling_body(sampling, ()) | {"ignore_eos": True}  # as min_new_tokens makes theirs
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, "stream": True}
        reader = AnswerReader(None, sampling)
        async with engine._call("POST", "/generate", body) as response:
            return sum([len(reader.read(event).ids) async for texts in _events(response) for event in needed(texts)])

    got = await asyncio.gather(*(one(prompt) for prompt in ids))
    assert set(got) == {sampling.max_tokens}
    await engine.flush_cache()
    return time.perf_counter() - start


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model: Any = load_model(given.model, given.dtype)
    names = {"model": str(given.model), "dtype": given.dtype, "threads": given.threads}
    settings = load(overrides={f"engine.{name}": value for name, value in names.items()})
    sampled = Sampling(given.tokens, temperature=0.8, top_p=0.95, seed=0)
    async with serving(torch_engine.create_app(settings)) as url:
        engine = Engine(url)
        for count in (1, 8):
            ids = prompts(count, given.model)
            times: dict[str, list[float]] = {"generate": [], "ours": [], "ours, T=0.8 top-p": []}
            for _ in range(ROUNDS):
                times["generate"].append(await asyncio.to_thread(theirs, model, ids, given.tokens))
                times["ours"].append(await ours(engine, ids, Sampling(given.tokens, temperature=0.0)))
                times["ours, T=0.8 top-p"].append(await ours(engine, ids, sampled))
            base = min(times["generate"])
            for name, seconds in times.items():
                speed, ratio = count * given.tokens / min(seconds), base / min(seconds)
                print(f"{count} streams  {name:<20} {speed:7.1f} tok/s   {ratio:5.2f} x generate")
        await engine.close()


asyncio.run(main())
