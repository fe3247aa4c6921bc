"""What every server of the engine protocol does, over real HTTP with the real client.

A third server is one more name in ENGINES and one more branch in `engines.running`. What a server cannot have by
nature is said by `Server.samples`: a script has no weights, so nothing can be computed again beside it.
"""

from __future__ import annotations

import asyncio
import json
import re
from math import exp, log
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engines import (
    GREEDY,
    KEY,
    LONG,
    LONG_ANSWER,
    Server,
    begun,
    gather,
    needs_weights,
    running_becomes,
)

from agent_rl.engine import (
    Engine,
    EngineError,
    EngineRejected,
    EngineUnavailable,
    ReleaseNotLoaded,
)
from agent_rl.models import load_model
from agent_rl.types import BASE_RELEASE, Finish, Grammar, Sampling, Span

# ------------------------------------------------------------------------------------------------- sampling


async def test_info(server: Server) -> None:
    info = await server.engine.info()
    assert (info.model_path, info.weight_version, info.adapters) == (str(server.folder), BASE_RELEASE, {})
    assert info.vocab_size == len(server.tokenizer)
    assert info.max_context == 1024 if server.samples else 2048  # the model's own limit is the smaller one
    assert await server.engine.healthy()


async def test_greedy_is_deterministic_and_has_no_logprobs(server: Server) -> None:
    first, second = [await server.engine.complete(server.prompt("tea"), GREEDY) for _ in range(2)]
    assert first == second
    assert first.logprobs == (None,) * len(first.ids)
    assert first.spans == (Span(BASE_RELEASE, 0, len(first.ids)),)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24, temperature=1.0),
        Sampling(24, temperature=0.7),
        Sampling(24, temperature=0.7, top_p=0.9),
        Sampling(24, temperature=1.3, top_k=5),
        Sampling(24, temperature=0.7, top_p=0.95, top_k=40, min_p=0.02),
    ],
)
async def test_logprobs_are_of_the_full_tempered_distribution(server: Server, sampling: Sampling) -> None:
    needs_weights(server)
    prompt = server.prompt("What is tea?")
    answer = await server.engine.complete(prompt, sampling)
    with torch.no_grad():
        logits = load_model(server.folder, "float32")(torch.tensor([prompt + list(answer.ids)])).logits
    logprobs = (logits[0, len(prompt) - 1 : -1] / sampling.temperature).log_softmax(-1)
    for step, (token, got, kept) in enumerate(zip(answer.ids, answer.logprobs, answer.kept_mass, strict=True)):
        assert got == pytest.approx(logprobs[step, token].item(), abs=1e-4)
        expected = kept_tokens(logprobs[step].exp(), sampling)
        assert token in expected
        assert kept == (pytest.approx(sum(expected.values()), abs=1e-4) if sampling.truncates else None)


def kept_tokens(probs: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """What top-p, top-k and min-p leave, token by token."""
    kept: dict[int, float] = {}
    ranked = sorted(enumerate(probs.tolist()), key=lambda pair: -pair[1])
    for token, p in ranked:
        full = sum(kept.values()) > sampling.top_p or len(kept) == sampling.top_k
        if full or p < sampling.min_p * ranked[0][1]:
            break
        kept[token] = p
    return kept


async def test_scores_are_the_logprobs_of_sampling(server: Server) -> None:
    prompt = server.prompt("What is tea?")
    answer = await server.engine.complete(prompt, Sampling(16, temperature=1.0, seed=1))
    scores = await server.engine.score(prompt, answer.ids)
    assert scores == pytest.approx(answer.logprobs, abs=1e-4)


async def test_many_scores_at_once(server: Server) -> None:
    pairs = [(server.prompt("tea" * n), list(range(5, 5 + n))) for n in (1, 2, 30, 4, 50, 6)]
    alone = [await server.engine.score(p, r) for p, r in pairs]
    together = await asyncio.gather(*(server.engine.score(p, r) for p, r in pairs))
    assert [len(scores) for scores in together] == [1, 2, 30, 4, 50, 6]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


async def test_a_stream_is_the_same_answer_in_pieces(server: Server) -> None:
    prompt, sampling = server.prompt("tea"), Sampling(12, temperature=0.8, top_p=0.9, seed=7)
    whole = await server.engine.complete(prompt, sampling)
    streamed = await gather(server.engine.stream(prompt, sampling, rid="a"))
    assert (streamed.ids, streamed.finish, streamed.spans) == (whole.ids, whole.finish, whole.spans)
    assert streamed.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert streamed.kept_mass == pytest.approx(whole.kept_mass, abs=1e-4)


async def test_a_grammar_is_followed_and_its_tokens_are_weighed_honestly(server: Server) -> None:
    """Logprobs are of the full distribution; where the grammar leaves one token alone, there is none."""
    needs_weights(server)
    prompt = server.prompt("What is tea?")
    sampling = Sampling(40, temperature=0.7, grammar=Grammar("regex", "Tea is (hot|cold|[0-9]{6})!"))
    answer = await server.engine.complete(prompt, sampling, stop_ids=(2,))
    assert answer.finish is Finish.STOP
    assert re.fullmatch("Tea is (hot|cold|[0-9]{6})!", server.tokenizer.decode(answer.ids[:-1]))
    with torch.no_grad():
        logits = load_model(server.folder, "float32")(torch.tensor([prompt + list(answer.ids)])).logits
    logprobs = (logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
    weighed = 0
    for step, (token, got, kept) in enumerate(zip(answer.ids, answer.logprobs, answer.kept_mass, strict=True)):
        full = logprobs[step, token].item()
        assert kept is not None
        assert full <= log(kept) + 1e-4
        assert got == pytest.approx(full, abs=1e-4) if got is not None else kept == pytest.approx(exp(full), rel=1e-3)
        weighed += got is not None
    assert 0 < weighed < len(answer.ids)
    assert answer.logprobs[-1] is None  # behind the mark nothing can follow but the end


CITY = {
    "type": "object",
    "properties": {"city": {"const": "Paris"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = {
    "type": "tag",
    "begin": "<call>",
    "content": {"type": "json_schema", "json_schema": {"const": 7}},
    "end": "</call>",
}
CALLS = {
    "type": "tags_with_separator",
    "tags": [CALL],
    "separator": "\n",
    "at_least_one": True,
    "stop_after_first": True,
}


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("json_schema", CITY, r'\s*{\s*"city"\s*:\s*"Paris"\s*}\s*'),
        ("structural_tag", {"type": "structural_tag", "format": CALLS}, r"<call>\s*7\s*</call>"),
    ],
)
async def test_schemas_and_tags(server: Server, kind: str, body: dict[str, Any], text: str) -> None:
    sampling = Sampling(200, seed=1, grammar=Grammar(kind, json.dumps(body)))
    answer = await server.engine.complete(server.prompt("tea"), sampling, stop_ids=(2,))
    assert answer.finish is Finish.STOP
    if server.samples:
        assert re.fullmatch(text, server.tokenizer.decode(answer.ids[:-1]))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "a("), r"(?s)regex cannot be enforced: .*unclosed group"),
        (Grammar("json_schema", '{"format": "odd"}'), "json_schema cannot be enforced: Unknown format: odd"),
    ],
)
async def test_a_bad_grammar_is_rejected(server: Server, grammar: Grammar, words: str) -> None:
    needs_weights(server)
    with pytest.raises(EngineRejected, match=words):
        await server.engine.complete(server.prompt("tea"), Sampling(4, grammar=grammar))
    with pytest.raises(EngineRejected, match=words):
        await anext(server.engine.stream(server.prompt("tea"), Sampling(4, grammar=grammar), rid="a"))


async def test_what_was_cached_is_said_and_stays_within_its_key(server: Server) -> None:
    needs_weights(server)
    cached = []
    for key in ("a", "b", "a", None, None):
        chunks = [
            c async for c in server.engine.stream(server.prompt("tea"), GREEDY, rid=f"{len(cached)}", extra_key=key)
        ]
        assert [chunk.cached_tokens for chunk in chunks[:-1]] == [0] * (len(chunks) - 1)
        cached.append(chunks[-1].cached_tokens)
    known = len(server.prompt("tea")) - 1
    assert cached == [0, 0, known, 0, known]


async def test_seeds(server: Server) -> None:
    prompt = server.prompt("tea")
    drawn = [Sampling(12, seed=seed) for seed in (1, 1, 2)]
    alone, again, other = [await server.engine.complete(prompt, sampling) for sampling in drawn]
    company = [server.engine.complete(server.prompt("tea" * n), Sampling(12)) for n in range(1, 6)]
    among, *_ = await asyncio.gather(server.engine.complete(prompt, drawn[0]), *company)
    assert alone.ids == again.ids == among.ids
    assert (other.ids != alone.ids) == server.samples


async def test_limits_end_tokens_and_stop_strings(server: Server) -> None:
    prompt = server.prompt("tea")
    whole = await server.engine.complete(prompt, GREEDY)
    cut = await server.engine.complete(prompt, Sampling(3, temperature=0.0))
    assert (cut.ids, cut.finish) == (whole.ids[:3], Finish.LENGTH)
    end = whole.ids[4]
    ended = await server.engine.complete(prompt, GREEDY, stop_ids=(end,))
    assert (ended.ids, ended.finish) == (whole.ids[: whole.ids.index(end) + 1], Finish.STOP)
    assert ended.matched_stop is None
    stop = "drink" if not server.samples else server.tokenizer.decode(list(whole.ids[2:4]))
    stopped = await server.engine.complete(prompt, Sampling(12, temperature=0.0, stop=("never", stop)))
    assert (stopped.finish, stopped.matched_stop) == (Finish.STOP, stop)
    assert stopped.ids == whole.ids[: len(stopped.ids)]
    assert stop in server.tokenizer.decode(list(stopped.ids))
    assert stop not in server.tokenizer.decode(list(stopped.ids[:-1]))


async def test_many_at_once_are_answered_as_each_alone(server: Server) -> None:
    prompts = [server.prompt("tea " + "x" * n) for n in range(0, 120, 8)]
    alone = [await server.engine.complete(prompt, GREEDY) for prompt in prompts]
    together = await asyncio.gather(*(server.engine.complete(prompt, GREEDY) for prompt in prompts))
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]


# ------------------------------------------------------------------------------------------ abort and hang-up


async def test_abort_ends_an_answer_with_what_it_has(server: Server) -> None:
    whole = await server.engine.complete(server.prompt("long"), LONG_ANSWER)
    running = await begun(server, "a")
    await server.engine.abort("a")
    answer = await running
    assert answer.finish is Finish.ABORTED
    assert 0 < len(answer.ids) < LONG
    assert answer.ids == whole.ids[: len(answer.ids)]
    await server.engine.abort("nobody")


async def test_closing_a_stream_aborts_it(server: Server) -> None:
    stream = server.engine.stream(server.prompt("long"), LONG_ANSWER, rid="a")
    await anext(stream)
    await server.engine.pause("in_place")  # it cannot just end by itself
    assert await server.load("running") == 1
    await stream.aclose()
    await running_becomes(server, 0)


async def test_hanging_up_on_a_whole_answer_aborts_it(server: Server) -> None:
    task = asyncio.create_task(server.engine.complete(server.prompt("long"), LONG_ANSWER))
    await running_becomes(server, 1)
    await server.engine.pause("in_place")
    task.cancel()
    await asyncio.wait({task})
    await running_becomes(server, 0)


async def test_hanging_up_at_any_moment_harms_nobody(server: Server) -> None:
    whole = await server.engine.complete(server.prompt("tea"), GREEDY)
    for n in range(40):
        task = asyncio.create_task(server.engine.complete(server.prompt(f"long {n}"), LONG_ANSWER))
        await asyncio.sleep(n * 0.0002)
        task.cancel()
        await asyncio.wait({task})
    await running_becomes(server, 0)
    assert await server.engine.complete(server.prompt("tea"), GREEDY) == whole


async def test_one_id_is_answered_once_at_a_time(server: Server) -> None:
    task = await begun(server, "a")
    with pytest.raises(EngineRejected, match="a request a is being answered already"):
        await server.engine.complete(server.prompt("tea"), GREEDY, rid="a")
    await server.engine.abort("a")
    await task


# --------------------------------------------------------------------------------------------------- refusals


async def test_what_the_client_refuses_and_what_it_makes_of_refusals(server: Server, tmp_path: Path) -> None:
    vocab = len(server.tokenizer)
    with pytest.raises(EngineRejected, match=f"{vocab}.*outside the vocabulary of {vocab}"):
        await server.engine.complete([5, vocab], GREEDY)
    with pytest.raises(EngineRejected, match="0 ids"):
        await server.engine.complete([], GREEDY)
    with pytest.raises(EngineRejected, match=r"5000 make 5003; the longest context is \d+"):
        await server.engine.complete([5, 6, 7], Sampling(5000))
    with pytest.raises(ReleaseNotLoaded, match="r9"):
        await server.engine.complete([5], GREEDY, release="r9")
    with pytest.raises(ReleaseNotLoaded, match="r9"):
        await anext(server.engine.stream([5], GREEDY, rid="a", release="r9"))
    with pytest.raises(ReleaseNotLoaded, match="r9"):
        await server.engine.score([5], [6], release="r9")
    with pytest.raises(ValueError, match="nothing to score"):
        await server.engine.score([5], [])


async def test_nobody_there(server: Server) -> None:
    engine = Engine("http://127.0.0.1:9")
    with pytest.raises(EngineUnavailable):
        await engine.info()
    assert not await engine.healthy()
    await engine.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"input_ids": [5], "sampling_params": {"beams": 3}}, "sampling_params.beams"),
        ({"input_ids": [5], "top_logprobs_num": 3}, "top_logprobs_num"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [5], "sampling_params": {"regex": "a", "json_schema": "{}"}}, "json_schema and regex"),
        ({"text": "hello"}, "input_ids"),
        ({"input_ids": [5, 10**9]}, "outside the vocabulary"),
        ({"input_ids": [5], "lora_path": "r9"}, "never been loaded: r9"),
        ({"input_ids": [5], "sampling_params": {"max_new_tokens": 10**6}}, "1000001; the longest context is"),
        ({"input_ids": [5, 6], "logprob_start_len": 0}, "needs max_new_tokens 0"),
        ({"input_ids": [5], "sampling_params": {"max_new_tokens": 0}, "logprob_start_len": 1}, "behind the prompt"),
    ],
)
async def test_a_bad_request_is_a_400_in_words(server: Server, body: dict[str, object], words: str) -> None:
    async with httpx.AsyncClient(base_url=server.engine.url) as client:
        answer = await client.post("/generate", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


async def test_administration_needs_the_key(server: Server) -> None:
    stranger = Engine(server.engine.url, admin_key="guess")
    with pytest.raises(EngineError, match=r"401.*admin key"):
        await stranger.pause("abort")
    assert (await stranger.complete(server.prompt("tea"), GREEDY)).ids  # sampling is not administration
    await stranger.close()
    async with httpx.AsyncClient(base_url=server.engine.url) as client:
        assert (await client.post("/flush_cache")).status_code == 401
        assert (await client.post("/flush_cache", headers={"Authorization": f"Bearer {KEY}"})).status_code == 200
        assert (await client.post("/generate", content=b"no json")).status_code == 400
        refused = await client.post(
            "/unload_lora_adapter", json={"lora_name": "r9"}, headers={"Authorization": f"Bearer {KEY}"}
        )
    assert (refused.status_code, refused.json()["success"]) == (400, False)


async def test_answers_have_sglangs_shape(server: Server) -> None:
    body = {"input_ids": server.prompt("tea"), "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}
    async with httpx.AsyncClient(base_url=server.engine.url) as client:
        answer = (await client.post("/generate", json=body | {"rid": "a"})).json()
        streamed = (await client.post("/generate", json=body | {"stream": True})).text
    meta = answer["meta_info"]
    assert (meta["id"], meta["completion_tokens"], meta["finish_reason"]) == ("a", 2, {"type": "length", "length": 2})
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[i, None] for i in answer["output_ids"]]
    assert (meta["prompt_tokens"], meta["weight_version"]) == (len(body["input_ids"]), BASE_RELEASE)
    assert [(v["version"], v["start"], v["end"]) for v in meta["weight_versions"]] == [(BASE_RELEASE, 0, 2)]
    *events, done, rest = streamed.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert ['"completion_tokens":2' in event for event in events][-1]
