"""Inside our engine: the scheduler and its batches, without HTTP."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_adapter
from scheduling import Bench, prompt
from tiny import make_model
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MistralConfig, Phi3Config, Qwen3Config

from agent_rl.models import ModelError, load_model
from server.engines import runner
from server.engines.contract import Busy, Refused
from server.engines.scheduler import MAX_CHUNK_BETWEEN, Swap


def greedy(model: Path, ids: list[int], tokens: int) -> list[int]:
    """transformers' own answer."""
    batch = torch.tensor([ids])
    out = load_model(model, "float32").generate(  # type: ignore[operator]
        batch, attention_mask=torch.ones_like(batch), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


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
