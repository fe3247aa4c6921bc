"""Inside our engine: sampling, the KV slab, the prefix cache and the scheduler, without HTTP."""

from __future__ import annotations

import json
from concurrent.futures import Future
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_adapter
from tiny import make_model
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MistralConfig, Phi3Config, Qwen3Config

from agent_rl.models import ModelError, load_model, load_tokenizer
from agent_rl.types import Grammar
from server.engines import runner
from server.engines.contract import Busy, GenerateRequest, Piece, Refused, SamplingParams
from server.engines.grammar import Grammars, Matcher
from server.engines.kv import KVShape, PrefixCache, Slab
from server.engines.runner import Runner
from server.engines.sampling import Draw, Drawn, sample, score
from server.engines.scheduler import MAX_CHUNK, MAX_CHUNK_BETWEEN, Scheduler, Swap
from server.engines.stopping import Stopper
from server.engines.work import Work

# ------------------------------------------------------------------------------------------------- sampling

PROBS = [0.5, 0.25, 0.15, 0.1]


def draw(uniform: float = 0.0, **given: Any) -> Draw:
    fixed = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "ratio_free": False, "penalties": {}}
    return Draw(uniform, **(fixed | given))


def drawn(draws: list[Draw], probs: list[float] = PROBS) -> list[Drawn | None]:
    return sample(torch.tensor([[log(p) for p in probs]] * len(draws)), draws)


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.499, 0), (0.501, 1), (0.749, 1), (0.751, 2), (0.899, 2), (0.901, 3), (0.9999, 3)],
)
def test_a_uniform_number_chooses_by_the_cumulative_distribution(uniform: float, token: int) -> None:
    [got] = drawn([draw(uniform)])
    assert got is not None
    assert (got.token, got.kept_mass) == (token, None)
    assert got.logprob == pytest.approx(log(PROBS[token]), abs=1e-6)


@pytest.mark.parametrize(
    ("cut", "kept", "last"),
    [
        ({"top_p": 0.6}, 0.75, 1),
        ({"top_p": 0.01}, 0.5, 0),
        ({"top_k": 3}, 0.9, 2),
        ({"min_p": 0.29}, 0.9, 2),  # keeps what has at least 0.145
        ({"top_k": 3, "top_p": 0.6}, 0.75, 1),
        ({"top_k": 1000}, 1.0, 3),
    ],
)
def test_cuts_keep_a_mass_and_leave_the_logprob_alone(cut: dict[str, Any], kept: float, last: int) -> None:
    [got] = drawn([draw(0.9999, **cut)])
    assert got is not None
    assert got.token == last
    assert got.kept_mass == pytest.approx(kept, abs=1e-6)
    assert got.logprob == pytest.approx(log(PROBS[last]), abs=1e-6)


def test_a_wide_cut_looks_beyond_the_first_candidates() -> None:
    probs = [1 / 5000] * 5000
    [got] = drawn([draw(0.9999, top_p=0.9)], probs)
    assert got is not None
    assert got.kept_mass == pytest.approx(0.9, abs=3e-4)


def test_temperature_penalties_and_kinds_side_by_side() -> None:
    greedy, hot, plain, penalised = drawn(
        [
            draw(temperature=0.0, ratio_free=True),
            draw(0.9999, temperature=2.0),
            draw(0.6),
            draw(0.1, ratio_free=True, penalties={0: 100.0}),
        ]
    )
    assert greedy == Drawn(0, None, None)
    root = [p**0.5 for p in PROBS]
    assert hot is not None
    assert (hot.token, hot.logprob) == (3, pytest.approx(log(root[3] / sum(root)), abs=1e-6))
    assert plain is not None
    assert plain.token == 1
    assert penalised == Drawn(1, None, None)


def allowed(*tokens: int) -> Any:
    return np.isin(np.arange(4), tokens)


def test_a_grammar_masks_and_leaves_the_logprob_alone() -> None:
    plain, cut, greedy, forced, nothing, free = drawn(
        [
            draw(0.9999, allowed=allowed(1, 2)),
            draw(0.9999, top_p=0.6, allowed=allowed(1, 2)),  # 0.25 of 0.4 is more than 0.6 of it
            draw(temperature=0.0, ratio_free=True, allowed=allowed(2, 3)),
            draw(allowed=allowed(3)),
            draw(allowed=allowed()),
            draw(0.9999),
        ]
    )
    assert plain == Drawn(2, pytest.approx(log(0.15), abs=1e-6), pytest.approx(0.4, abs=1e-6))
    assert cut == Drawn(1, pytest.approx(log(0.25), abs=1e-6), pytest.approx(0.25, abs=1e-6))
    assert greedy == Drawn(2, None, None)
    assert forced == Drawn(3, None, pytest.approx(0.1, abs=1e-6))
    assert nothing is None
    assert free == Drawn(3, pytest.approx(log(0.1), abs=1e-6), None)


def test_logits_that_are_not_finite_draw_nothing() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[1, 2] = float("nan"), float("inf")
    bad, worse, good = sample(logits, [draw(), draw(top_k=2), draw()])
    assert (bad, worse) == (None, None)
    assert good is not None


def test_scores_are_log_softmax() -> None:
    assert score(torch.tensor([[0.0, log(3.0)], [0.0, 0.0]]), [1, 0]) == pytest.approx([log(0.75), log(0.5)])


# ------------------------------------------------------------------------------------------- ends of answers


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_stop_string_is_found_where_it_is_complete() -> None:
    stopper = Stopper(SamplingParams(stop=["END"], max_new_tokens=9), eos_ids=[0], decode=text)
    ids = [ord(c) for c in "ENEND"]
    assert [stopper.reason(ids[:n]) for n in range(1, 5)] == [None] * 4
    assert stopper.reason(ids) == {"type": "stop", "matched": "END"}


def test_end_tokens_count_unless_they_are_ignored() -> None:
    params = SamplingParams(stop_token_ids=[7], max_new_tokens=3)
    assert Stopper(params, [0], text).reason([7]) == {"type": "stop", "matched": 7}
    assert Stopper(params, [0], text).reason([5, 0]) == {"type": "stop", "matched": 0}
    ignoring = Stopper(params.model_copy(update={"ignore_eos": True}), [0], text)
    assert ignoring.reason([7, 0]) is None
    assert ignoring.reason([7, 0, 0]) == {"type": "length", "length": 3}


# ------------------------------------------------------------------------------------------------ KV on its own


def kv(length: int) -> torch.Tensor:
    """Of `length` positions, 8 bytes each; position i holds i."""
    return torch.arange(length, dtype=torch.float32).expand(1, 2, 1, length)[..., None].clone()


def test_the_longest_beginning_is_found_under_its_own_release() -> None:
    cache = PrefixCache(max_bytes=1000)
    cache.add(("r1", None), [1, 2, 3, 4], kv(4))
    cache.add(("r1", None), [1, 2, 9], kv(3))
    assert [
        found.shape[3]
        for found in [cache.longest(("r1", None), [1, 2, 3, 5]), cache.longest(("r1", None), [1, 2, 9, 9])]
    ] == [
        3,
        3,
    ]
    assert cache.longest(("r2", None), [1, 2, 3]) is None
    assert cache.longest(("r1", "tenant"), [1, 2, 3]) is None
    assert cache.longest(("r1", None), [7]) is None


def test_what_was_least_recently_used_goes_first() -> None:
    cache = PrefixCache(max_bytes=10 * 8)
    cache.add(("r", None), [1, 1, 1, 1], kv(4))
    cache.add(("r", None), [2, 2, 2, 2], kv(4))
    cache.longest(("r", None), [1])
    cache.add(("r", None), [3, 3, 3, 3], kv(4))
    assert cache.longest(("r", None), [2]) is None
    assert cache.longest(("r", None), [1]) is not None
    assert cache.bytes == 8 * 8
    cache.add(("r", None), [4] * 11, kv(11))  # larger than the cache
    assert cache.longest(("r", None), [4]) is None
    assert cache.bytes == 8 * 8


def test_a_longer_conversation_replaces_its_beginning() -> None:
    cache = PrefixCache(max_bytes=1000)
    cache.add(("r", None), [1, 2], kv(2))
    cache.add(("r", None), [1, 2, 3], kv(3))
    assert cache.bytes == 3 * 8
    cache.add(("other", "tenant"), [1, 2], kv(2))
    cache.forget("other")
    assert cache.bytes == 3 * 8
    cache.forget()
    assert (cache.bytes, cache.longest(("r", None), [1])) == (0, None)


def test_a_slab_moves_rows() -> None:
    slab = Slab(KVShape(layers=1, heads=1, size=1, dtype=torch.float32), rows=2, capacity=4, device="cpu")
    slab.write(0, kv(3))
    slab.copy(0, 1, 2)
    assert slab.read(1, 4).flatten().tolist() == [0, 1, 0, 0] * 2
    slab.clear(0)
    assert slab.read(0, 4).abs().sum() == 0


# ------------------------------------------------------------------------------------------------- scheduler


class Bench:
    """A scheduler stepped by hand, and what it hands out."""

    def __init__(self, model: Path, *, rows: int = 4, max_queue: int = 100, cache_bytes: int = 2**24) -> None:
        self.runner = Runner(model, dtype="float32", device="cpu", rows=rows, max_context=900, max_chunk=MAX_CHUNK)
        self.scheduler = Scheduler(self.runner, max_queue=max_queue, prefix_cache_bytes=cache_bytes)
        self.pieces: dict[str, list[Piece]] = {}

    def ask(self, rid: str, ids: list[int], tokens: int = 8, **given: Any) -> None:
        params = SamplingParams(
            max_new_tokens=tokens, **({"temperature": 0.0, "ignore_eos": True} | given.pop("params", {}))
        )
        matcher = given.pop("matcher", None)
        request = GenerateRequest(input_ids=ids, sampling_params=params, rid=rid, **given)
        pieces = self.pieces[rid] = []
        self.scheduler.submit(Work(request, Stopper(params, (), str), pieces.append, matcher))

    def run(self) -> None:
        for _ in range(1000):
            if self.scheduler.idle:
                return
            self.scheduler.step()
        raise AssertionError("the scheduler does not come to rest")

    def out(self, rid: str) -> list[int]:
        return [token for piece in self.pieces[rid] for token in piece.ids]

    def last(self, rid: str) -> Piece:
        assert self.pieces[rid][-1].finish is not None, "not finished"
        return self.pieces[rid][-1]


@pytest.fixture
def bench(tiny_model: Path) -> Bench:
    torch.set_num_threads(1)
    return Bench(tiny_model)


def greedy(model: Path, ids: list[int], tokens: int) -> list[int]:
    """transformers' own answer."""
    batch = torch.tensor([ids])
    out = load_model(model, "float32").generate(  # type: ignore[operator]
        batch, attention_mask=torch.ones_like(batch), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_whoever_joins_and_leaves_the_others_answer_as_alone(bench: Bench, tiny_model: Path) -> None:
    asked = {f"{n}": (prompt(n, 5 + 37 * n), 3 + 5 * (n % 4)) for n in range(9)}
    for n, (rid, (ids, tokens)) in enumerate(asked.items()):
        bench.ask(rid, ids, tokens)
        for _ in range(n % 3):
            bench.scheduler.step()
    bench.run()
    for rid, (ids, tokens) in asked.items():
        assert bench.out(rid) == greedy(tiny_model, ids, tokens), rid


def test_a_long_prompt_does_not_stall_others(bench: Bench) -> None:
    bench.ask("chat", prompt(1, 5), tokens=40)
    bench.scheduler.step()
    bench.ask("long", prompt(2, 4 * MAX_CHUNK_BETWEEN), tokens=1)
    before = len(bench.out("chat"))
    for _ in range(4):
        assert not bench.pieces["long"]
        bench.scheduler.step()
    assert len(bench.out("chat")) == before + 4
    assert bench.last("long").finish == {"type": "length", "length": 1}


def test_the_next_turn_reuses_the_conversation(bench: Bench, tiny_model: Path) -> None:
    first = prompt(1, 40)
    bench.ask("first", first)
    bench.run()
    second = [*first, *bench.out("first"), 9, 9, 9]
    bench.ask("second", second)
    bench.run()
    assert bench.last("first").cached_tokens == 0
    assert bench.last("second").cached_tokens == 40 + 7  # all but the last token, whose KV was never needed
    assert bench.out("second") == greedy(tiny_model, second, 8)
    bench.ask("same", first)
    bench.run()
    assert bench.last("same").cached_tokens == 39  # one must be read for its logits
    assert bench.out("same") == bench.out("first")


def test_a_user_overtakes_an_internal_reader_with_the_kv_it_has(bench: Bench, tiny_model: Path) -> None:
    bench.ask("first", prompt(1, 40))
    bench.ask("talking", prompt(2, 5), tokens=30)
    bench.scheduler.step()
    while bench.pieces["first"][-1].finish is None:
        bench.scheduler.step()
    bench.ask("internal", prompt(3, 600), priority=1)
    bench.scheduler.step()
    second = [*prompt(1, 40), *bench.out("first"), *prompt(4, 9)]
    bench.ask("second", second)
    bench.scheduler.step()
    assert bench.out("second")
    assert not bench.out("internal")
    bench.run()
    assert bench.last("second").cached_tokens == 47
    assert bench.out("second") == greedy(tiny_model, second, 8)
    assert bench.out("internal") == greedy(tiny_model, prompt(3, 600), 8)


def test_no_kv_outlives_the_weights_that_made_it(bench: Bench, tmp_path: Path) -> None:
    other = make_model(tmp_path / "model", seed=1)
    ids = prompt(1, 40)
    bench.ask("before", ids)
    bench.run()
    swap = Swap(other, "base", Future())  # under the same name
    bench.scheduler.plan_swap(swap, abort=False)
    bench.ask("after", ids)
    bench.run()
    assert (bench.last("after").cached_tokens, bench.out("after")) == (0, greedy(other, ids, 8))


def test_mixed_kv_is_not_kept(bench: Bench, tmp_path: Path) -> None:
    other = make_model(tmp_path / "model", seed=1)
    ids = prompt(1, 40)
    bench.ask("mixed", ids)
    bench.scheduler.step()
    bench.scheduler.pause("in_place")
    bench.scheduler.plan_swap(Swap(other, "w1", Future()), abort=False)
    bench.scheduler.step()
    bench.scheduler.resume()
    bench.run()
    assert [piece.kv_mixed for piece in bench.pieces["mixed"]] == [False] * 2 + [True] * 6
    bench.ask("next", ids)
    bench.run()
    assert (bench.last("next").cached_tokens, bench.out("next")) == (0, greedy(other, ids, 8))


def test_padding_never_looks_like_a_longer_context(tmp_path: Path) -> None:
    model = tiny_family(GPT2Config, tmp_path)  # fails at positions that it has not learned: 1024 and more
    bench = Bench(model)
    bench.ask("long", prompt(1, 890), tokens=1)
    bench.run()
    bench.ask("again", prompt(1, 890), tokens=1)
    bench.ask("beside", prompt(2, 250), tokens=1)
    bench.run()
    assert bench.out("again") == bench.out("long")
    assert bench.out("beside") == greedy(model, prompt(2, 250), 1)


def test_releases_share_no_kv(bench: Bench, tiny_model: Path, tmp_path: Path) -> None:
    bench.scheduler.load_adapter("r1", make_adapter(tmp_path / "r1", tiny_model, 1))
    bench.ask("base", prompt(1, 40))
    bench.run()
    bench.ask("r1", prompt(1, 40), lora_path="r1")
    bench.run()
    assert bench.last("r1").cached_tokens == 0
    assert bench.out("r1") != bench.out("base")


def test_tenants_share_no_kv(bench: Bench) -> None:
    """A prompt that another tenant has asked before is read as any new one: nothing is faster, nothing is said."""
    bench.ask("mine", prompt(1, 40), extra_key="a")
    bench.run()
    bench.ask("theirs", prompt(1, 40), extra_key="b")
    bench.ask("nobody's", prompt(1, 40))
    bench.run()
    assert [bench.last(rid).cached_tokens for rid in ("theirs", "nobody's")] == [0, 0]
    bench.ask("mine again", prompt(1, 40), extra_key="a")
    bench.run()
    assert bench.last("mine again").cached_tokens == 39
    assert bench.out("theirs") == bench.out("mine again") == bench.out("mine")


# ------------------------------------------------------------------------------------------------- grammars


@pytest.fixture(scope="module")
def grammars(tiny_model: Path) -> Grammars:
    tokenizer = load_tokenizer(tiny_model)
    return Grammars(tokenizer, len(tokenizer), (2,))


def accepts(matcher: Matcher, ids: list[int]) -> bool:
    """Whether the tokens may come one after the other."""
    for token in ids:
        if not matcher.allowed()[token]:
            return False
        matcher.append(token)
    return True


def structure(form: dict[str, Any]) -> Grammar:
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": form}))


def call(name: str, begin: str = "<tool_call>\n", end: str = "\n</tool_call>") -> dict[str, Any]:
    schema = {"type": "object", "properties": {"name": {"const": name}, "arguments": {"type": "object"}}}
    schema |= {"required": ["name", "arguments"], "additionalProperties": False}
    return {"type": "tag", "begin": begin, "content": {"type": "json_schema", "json_schema": schema}, "end": end}


def tags(**given: Any) -> Grammar:
    fixed = {"type": "tags_with_separator", "tags": [call("look"), call("say")], "separator": "\n"}
    return structure(fixed | given)


LOOK = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
SAY = '<tool_call>\n{"name": "say", "arguments": {}}\n</tool_call>'
END = 2  # <|im_end|>


@pytest.mark.parametrize(
    ("grammar", "text", "fits"),
    [
        (Grammar("regex", "[ab]+"), "abba", True),
        (Grammar("regex", "[ab]+"), "", False),  # an end only where the grammar may end
        (Grammar("regex", "[ab]+"), "abc", False),
        (Grammar("json_schema", '{"type": "array", "items": {"enum": ["é", 2]}}'), '["é", 2]', True),
        (Grammar("json_schema", '{"type": "array", "items": {"enum": ["é", 2]}}'), "[2, 3]", False),
        (Grammar("json_schema", '{"type": "array"}'), "[2, ", False),
        (tags(at_least_one=True), f"{LOOK}\n{SAY}\n{LOOK}", True),
        (tags(at_least_one=True), f"{LOOK}{SAY}", False),
        (tags(at_least_one=True), "", False),
        (tags(), "", True),
        (tags(at_least_one=True, stop_after_first=True), SAY, True),
        (tags(at_least_one=True, stop_after_first=True), f"{LOOK}\n{SAY}", False),
        (tags(at_least_one=True), SAY.replace("say", "sing"), False),
        (structure(call("say", begin="<call>", end="")), '<call>{"name": "say", "arguments": {}}', True),
    ],
)
def test_a_grammar_takes_what_fits_and_then_an_end(grammars: Grammars, grammar: Grammar, text: str, fits: bool) -> None:
    matcher = grammars.matcher(grammar, {END})
    assert accepts(matcher, [*encode(grammars, text), END]) == fits


def encode(grammars: Grammars, text: str) -> list[int]:
    ids: list[int] = grammars._tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_a_special_token_in_a_tag_is_that_token(grammars: Grammars) -> None:
    grammar = structure(call("say", begin="<|im_start|>", end=""))
    assert accepts(grammars.matcher(grammar, {END}), [1, *encode(grammars, '{"name": "say", "arguments": {}}'), END])
    spelled = [i for piece in ("<|", "im_", "start|>") for i in encode(grammars, piece)]
    assert 1 not in spelled
    assert not accepts(grammars.matcher(grammar, {END}), spelled)


def test_a_compiled_grammar_is_used_again_from_its_beginning(grammars: Grammars) -> None:
    grammar, known = Grammar("regex", "ab"), grammars._compiled.cache_info().misses
    first = grammars.matcher(grammar, {END})
    assert accepts(first, encode(grammars, "ab"))
    second = grammars.matcher(grammar, {END, 7})
    assert accepts(second, encode(grammars, "ab"))
    assert grammars._compiled.cache_info().misses == known + 1
    assert np.flatnonzero(second.allowed()).tolist() == [END, 7]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "a("), "regex cannot be enforced: .*unclosed group"),
        (Grammar("json_schema", "{"), "json_schema cannot be read: "),
        (Grammar("json_schema", '{"type": "objct"}'), "json_schema cannot be enforced: Invalid type: objct"),
        (Grammar("structural_tag", '{"structures": [], "triggers": []}'), "structural_tag cannot be read: .*format"),
        (structure({"type": "triggered_tags", "tags": []}), "structural_tag cannot be read: .*tags_with_separator"),
        (structure(call("say") | {"odd": 1}), "odd: Extra inputs"),
    ],
)
def test_what_cannot_be_enforced_is_refused(grammars: Grammars, grammar: Grammar, words: str) -> None:
    with pytest.raises(Refused, match=f"(?s){words}"):
        grammars.matcher(grammar, {END})


def test_logits_without_a_word_are_never_allowed(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    matcher = Grammars(tokenizer, len(tokenizer) + 11, (2,)).matcher(Grammar("regex", r"(.|\n)*"), {END})
    assert matcher.allowed().tolist()[-12:] == [True] + [False] * 11


def test_a_grammar_needs_an_end(grammars: Grammars) -> None:
    with pytest.raises(Refused, match="needs a token that ends the answer"):
        grammars.matcher(Grammar("regex", "a"), ())


def test_a_grammar_that_fails_ends_its_own_answer_alone(bench: Bench, grammars: Grammars) -> None:
    broken = grammars.matcher(Grammar("regex", "ab"), {END})
    broken.append(encode(grammars, "x")[0])
    bench.ask("broken", prompt(1, 9), matcher=broken, params={"temperature": 1.0})
    bench.ask("fine", prompt(2, 9))
    bench.run()
    finish = bench.last("broken").finish
    assert finish is not None
    assert (finish["type"], bench.out("broken")) == ("abort", [])
    assert finish["message"].startswith("the grammar failed: ")
    assert len(bench.out("fine")) == 8


def test_scoring_reads_in_chunks_and_from_known_beginnings(bench: Bench, tiny_model: Path) -> None:
    ids = prompt(3, 700)
    with torch.no_grad():
        logprobs = load_model(tiny_model, "float32")(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    for rid, start in (("whole", 0), ("tail", 600), ("last", 698), ("nothing", 699)):
        bench.ask(rid, ids, tokens=0, logprob_start_len=start)
    bench.run()
    for rid, start in (("whole", 0), ("tail", 600), ("last", 698), ("nothing", 699)):
        assert bench.last(rid).prompt_logprobs == pytest.approx(expected[start:], abs=1e-4), rid
    bench.ask("answered", ids[:500])
    bench.run()
    bench.ask("again", ids, tokens=0, logprob_start_len=490)
    bench.run()
    assert bench.last("again").cached_tokens == 490
    assert bench.last("again").prompt_logprobs == pytest.approx(expected[490:], abs=1e-4)


def test_users_come_first_and_internal_requests_keep_half(bench: Bench, tiny_model: Path) -> None:
    for n in range(6):
        bench.ask(f"internal{n}", prompt(n, 20), tokens=30, priority=1)
    for _ in range(3):
        bench.scheduler.step()
    assert len(bench.scheduler.rows) == 4
    for n in range(3):
        bench.ask(f"user{n}", prompt(10 + n, 20), tokens=30)
    bench.scheduler.step()
    seated = {work.request.rid for work in bench.scheduler.rows}
    assert seated == {"internal0", "internal1", "user0", "user1"}
    bench.run()
    assert bench.last("internal3").retractions == 1
    for n in range(6):
        assert bench.out(f"internal{n}") == greedy(tiny_model, prompt(n, 20), 30)


def test_a_full_queue_is_busy(tiny_model: Path) -> None:
    bench = Bench(tiny_model, rows=1, max_queue=2)
    bench.ask("a", [5])
    bench.ask("b", [5])
    with pytest.raises(Busy, match=r"2 requests wait already; engine\.max_queue is 2"):
        bench.ask("c", [5])
    bench.ask("internal", [5], priority=1)  # has a queue of its own


def test_a_failing_forward_ends_only_its_own_requests(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.ask("good", prompt(1, 5), tokens=12)
    bench.scheduler.step()
    forward = bench.runner.forward

    def failing(first: int, parts: Any) -> torch.Tensor:
        if any(66 in part.ids for part in parts):
            raise RuntimeError("out of memory")
        return forward(first, parts)

    monkeypatch.setattr(bench.runner, "forward", failing)
    bench.ask("bad", [66] * 20)
    bench.run()
    finish = bench.last("bad").finish
    assert finish is not None
    assert (finish["type"], finish["status_code"]) == ("abort", 500)
    assert "out of memory" in finish["message"]
    assert bench.last("good").finish == {"type": "length", "length": 12}


def test_logits_that_are_not_finite_end_their_request_and_leave_no_trace(bench: Bench, tiny_model: Path) -> None:
    embedding = bench.runner.model.get_input_embeddings().weight
    kept = embedding[66].clone()
    bench.ask("good", prompt(1, 5), tokens=20)
    bench.scheduler.step()
    with torch.no_grad():
        embedding[66] = float("nan")
    bench.ask("bad", [5, 66, *[5] * 9])
    bench.ask("scored", [5, 66, 5], tokens=0, logprob_start_len=0)
    bench.scheduler.step()
    with torch.no_grad():
        embedding[66] = kept  # tied to the output head: put back before the others draw again
    bench.run()
    assert bench.last("bad").finish["message"] == "the model's logits are not finite"  # type: ignore[index]
    assert bench.last("scored").prompt_logprobs == pytest.approx((float("nan"),) * 2, nan_ok=True)
    bench.ask("long", prompt(9, 30), tokens=20)
    bench.scheduler.step()
    for n in range(3):  # shorter, in the other rows: what lies behind their tokens is masked, and must be finite
        bench.ask(f"later{n}", prompt(n, 2), tokens=3)
    bench.run()
    assert [bench.out(f"later{n}") for n in range(3)] == [greedy(tiny_model, prompt(n, 2), 3) for n in range(3)]


def test_penalties_change_the_answer_and_have_no_logprob(bench: Bench) -> None:
    bench.ask("plain", prompt(1, 5), tokens=30)
    bench.ask("penalised", prompt(1, 5), tokens=30, params={"presence_penalty": 2.0, "frequency_penalty": 2.0})
    bench.run()
    distinct = {rid: len(set(bench.out(rid))) for rid in ("plain", "penalised")}
    assert distinct["penalised"] > distinct["plain"]
    assert {p for piece in bench.pieces["penalised"] for p in piece.logprobs} == {None}


def test_a_seed_draws_the_same_in_any_company(bench: Bench) -> None:
    params = {"temperature": 1.0, "sampling_seed": 3, "top_p": 0.9}
    bench.ask("alone", prompt(1, 5), params=params)
    bench.run()
    for n in range(5):
        bench.ask(f"{n}", prompt(n, 30 + n), params={"temperature": 1.0})
    bench.ask("among", prompt(1, 5), params=params)
    bench.run()
    assert bench.out("among") == bench.out("alone")


def test_an_unloaded_adapter_goes_with_its_last_answer(bench: Bench, tiny_model: Path, tmp_path: Path) -> None:
    bench.scheduler.load_adapter("r1", make_adapter(tmp_path / "r1", tiny_model, 1))
    bench.ask("a", prompt(1, 5), tokens=4, lora_path="r1")
    bench.scheduler.step()
    bench.scheduler.unload_adapter("r1")
    with pytest.raises(Refused, match="never been loaded: r1"):
        bench.ask("b", [5], lora_path="r1")
    assert bench.runner.lora.tensors("r1")
    bench.run()
    assert (bench.runner.lora.tensors("r1"), bench.scheduler.adapters) == ({}, {})
    assert bench.scheduler.prefixes.bytes == 0


def test_weights_of_another_architecture_are_refused_and_the_old_ones_serve(
    bench: Bench, tmp_path: Path, tiny_model: Path
) -> None:
    other = make_model(tmp_path / "model", vocab=300)
    swap = Swap(other, "w1", Future())
    bench.scheduler.plan_swap(swap, abort=False)
    bench.run()
    with pytest.raises(Refused, match=r"another architecture .* \['model.embed_tokens.weight'\] differ"):
        swap.done.result(0)
    bench.ask("a", prompt(1, 5))
    bench.run()
    assert bench.last("a").version == "base"
    assert bench.out("a") == greedy(tiny_model, prompt(1, 5), 8)


@pytest.mark.parametrize("config", [Qwen3Config, GPTNeoXConfig, Phi3Config])
def test_other_families_are_proven_and_served(config: Any, tmp_path: Path) -> None:
    model = tiny_family(config, tmp_path)
    bench = Bench(model)
    for n in range(3):
        bench.ask(f"{n}", prompt(n, 5 + 9 * n))
    bench.run()
    assert [bench.out(f"{n}") for n in range(3)] == [greedy(model, prompt(n, 5 + 9 * n), 8) for n in range(3)]


def test_what_cannot_be_served_right_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family(MistralConfig, tmp_path, sliding_window=4)
    with pytest.raises(ModelError, match="attention slides over 4 tokens"):
        Bench(model)
    monkeypatch.setattr(runner, "_check_attention", lambda *_: None)  # a model that does not say so is found out
    with pytest.raises(ModelError, match="its batched forward is off its own by"):
        Bench(model)


def tiny_family(config: Any, folder: Path, **given: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(config(**sizes, **heads, **tokens, max_position_embeddings=1024, **given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder / "family")
    return folder / "family"
