"""The torch backend on the tiny model: what it scores, what it moves, and what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drills import drill, drills, make_backend
from torch import Tensor

from agent_rl.methods import METHODS
from agent_rl.models import load_model, tensors_checksum
from agent_rl.objectives.divergences import reverse_kl
from agent_rl.objectives.rows import Rows
from agent_rl.training import torch_backend
from agent_rl.training.backend import NotFinite, Score, means
from agent_rl.training.torch_backend import TorchBackend
from agent_rl.types import Sample


def towards(rows: Rows) -> Tensor:
    return reverse_kl(rows.student_NV, rows.teacher_NV)


def away(rows: Rows) -> Tensor:
    return -towards(rows)


def gap(backend: TorchBackend, samples: Sequence[Sample]) -> float:
    return means(backend.score(samples))["reverse_kl"]


def train(backend: TorchBackend, loss: Any, steps: int = 6, lr: float = 5e-3) -> list[float]:
    """Reverse KL to the teacher before, and after each step."""
    gaps = [gap(backend, drills())]
    for _ in range(steps):
        backend.forward_backward(drills(), loss)
        backend.step(lr)
        gaps.append(gap(backend, drills()))
    return gaps


def gradients(backend: TorchBackend) -> dict[str, Tensor]:
    return {n: t.grad.clone() for n, t in backend.weights.student.items() if t.grad is not None}


def logprobs(folder: Path, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> Tensor:
    """[R, V], by one plain forward pass of one unpadded sequence."""
    with torch.no_grad():
        logits = load_model(folder, "float32")(torch.tensor([[*prompt, *response]])).logits[0]
    rows: Tensor = logits[len(prompt) - 1 : len(prompt) + len(response) - 1] / temperature
    return rows.log_softmax(-1)


# ---------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_those_of_a_plain_forward_pass(tiny_model: Path, temperature: float) -> None:
    samples = [replace(s, temperature=temperature) for s in drills()]
    for sample, score in zip(samples, make_backend(tiny_model).score(samples), strict=True):
        student = logprobs(tiny_model, sample.prompt_ids, sample.response_ids, temperature)
        teacher = logprobs(tiny_model, sample.teacher_prompt_ids, sample.response_ids, temperature)
        token = torch.tensor(sample.response_ids)[:, None]
        assert score.tokens == len(sample.response_ids)
        assert score.reverse_kl == pytest.approx(reverse_kl(student, teacher).mean().item(), rel=1e-4)
        assert score.advantage == pytest.approx((teacher - student).gather(1, token).mean().item(), rel=1e-3)
        assert score.student_entropy == pytest.approx(-(student.exp() * student).sum(1).mean().item(), rel=1e-4)
        assert score.teacher_entropy == pytest.approx(-(teacher.exp() * teacher).sum(1).mean().item(), rel=1e-4)
        assert score.loss is None


def test_a_greedy_response_is_scored_at_temperature_one(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    assert backend.score([drill(temperature=0.0)]) == backend.score([drill(temperature=1.0)])


def test_masked_tokens_are_context_without_loss(tiny_model: Path) -> None:
    whole = drill(response_ids=(30, 41, 52, 2))
    masked = replace(whole, response_mask=(False, False, True, True))
    as_prompt = replace(
        whole,
        prompt_ids=(*whole.prompt_ids, 30, 41),
        teacher_prompt_ids=(*whole.teacher_prompt_ids, 30, 41),
        response_ids=(52, 2),
        response_mask=(True, True),
        behavior_logprobs=(None, None),
    )
    backend = make_backend(tiny_model)
    (left,), (right,) = backend.score([masked]), backend.score([as_prompt])
    assert left.tokens == right.tokens == 2
    assert left.reverse_kl == pytest.approx(right.reverse_kl, rel=1e-5)


def test_mismatch_between_behaviour_and_student(tiny_model: Path) -> None:
    sample = drill(response_ids=(30, 41, 2))
    true = logprobs(tiny_model, sample.prompt_ids, sample.response_ids)
    exact = [true[i, token].item() for i, token in enumerate(sample.response_ids)]
    backend = make_backend(tiny_model)

    (same,) = backend.score([replace(sample, behavior_logprobs=tuple(exact))])
    assert same.mismatch is not None
    assert same.mismatch.tokens == 3
    assert max(abs(same.mismatch.k1), same.mismatch.k3, same.mismatch.max_dp) < 1e-5

    (off,) = backend.score([replace(sample, behavior_logprobs=(exact[0] + 0.5, None, exact[2]))])
    assert off.mismatch is not None
    assert off.mismatch.tokens == 2
    assert off.mismatch.k1 == pytest.approx(0.25, abs=1e-5)  # (.5 + 0) / 2
    assert off.mismatch.k3 == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 2, abs=1e-5)
    assert off.mismatch.max_dp == pytest.approx(math.exp(exact[0] + 0.5) - math.exp(exact[0]), rel=1e-3)

    (none,) = backend.score([sample])
    assert none.mismatch is None


def test_means_are_over_tokens_not_over_samples() -> None:
    one, two = Score(1, 1.0, -1.0, 2.0, 3.0, None), Score(3, 2.0, -2.0, 2.0, 3.0, None)
    assert means([one, two]) == {
        "reverse_kl": 1.75,  # (1·1 + 3·2) / 4
        "advantage": -1.75,
        "student_entropy": 2.0,
        "teacher_entropy": 3.0,
    }


# --------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_student_moves_towards_the_teacher(tiny_model: Path, tuning: str) -> None:
    gaps = train(make_backend(tiny_model, tuning=tuning), towards, lr=5e-3 if tuning == "lora" else 5e-4)
    assert gaps[-1] < 0.7 * gaps[0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "sampled"])
@pytest.mark.parametrize("top_k", [0, 8])
def test_every_objective_of_the_method_does(tiny_model: Path, divergence: str, top_k: int) -> None:
    method = METHODS["user_hindsight"](divergence=divergence, top_k=top_k)
    gaps = train(make_backend(tiny_model), method.loss, steps=4)
    assert gaps[-1] < gaps[0]


def test_with_the_sign_turned_it_moves_away(tiny_model: Path) -> None:
    gaps = train(make_backend(tiny_model), away, steps=3)
    assert gaps[-1] > gaps[0]


def test_an_adapter_is_fp32_and_its_base_is_never_touched(tiny_model: Path) -> None:
    backend = make_backend(tiny_model, dtype="bfloat16")
    model = backend.weights.model  # type: ignore[attr-defined]
    before = tensors_checksum(dict(model.named_parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    train(backend, towards, steps=1)
    assert tensors_checksum(dict(model.named_parameters())) == before
    assert {t.dtype for t in backend.weights.student.values()} == {torch.float32}
    assert any(t.abs().max() > 0 for n, t in backend.weights.student.items() if "lora_B" in n)


def test_full_tuning_keeps_fp32_masters_beside_a_working_copy(tiny_model: Path) -> None:
    backend = make_backend(tiny_model, tuning="full", dtype="bfloat16")
    working = dict(backend.weights.model.named_parameters())  # type: ignore[attr-defined]
    before = {name: tensor.detach().clone() for name, tensor in backend.weights.student.items()}
    train(backend, towards, steps=1, lr=1e-6)
    moved = [(n, t) for n, t in backend.weights.student.items() if not torch.equal(t, before[n])]
    assert moved  # a millionth is below what bf16 can add to a weight, and is kept all the same
    for name, master in moved:
        assert master.dtype == torch.float32
        assert torch.equal(working[name], master.bfloat16())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_however_the_batch_is_cut_the_gradient_is_the_same(
    tiny_model: Path, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for micro_tokens, chunk in [(10_000, 128), (1, 128), (25, 3)]:
        monkeypatch.setattr(torch_backend, "CHUNK", chunk)
        backend = make_backend(tiny_model, tuning=tuning, micro_tokens=micro_tokens)
        backend.forward_backward(drills(), towards)
        assert backend.tokens == 4 + 2 + 7 + 1
        made.append(gradients(backend))
    for other in made[1:]:
        for name, gradient in made[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_all_tokens(tiny_model: Path) -> None:
    backend = make_backend(tiny_model, tuning="full", grad_clip=1e9)
    backend.forward_backward(drills(), towards)
    model: Any = load_model(tiny_model, "float32")
    losses = []
    for s in drills():
        logits = model(torch.tensor([[*s.prompt_ids, *s.response_ids]])).logits[0, len(s.prompt_ids) - 1 : -1]
        teacher = logprobs(tiny_model, s.teacher_prompt_ids, s.response_ids)
        losses.append(reverse_kl(logits.log_softmax(-1), teacher))
    torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert backend.step(1e-3) == pytest.approx(norm.item(), rel=1e-4)


def test_a_weak_sample_is_left_out_and_says_so(tiny_model: Path) -> None:
    agreed = drill("weak", teacher_prompt_ids=(1, 70, 71, 72))  # the same prompt on both sides: no difference
    backend, alone = make_backend(tiny_model), make_backend(tiny_model)
    weak, strong = backend.forward_backward([agreed, drill("l1")], towards, min_gap=1e-3)
    assert weak.loss is None
    assert weak.reverse_kl == pytest.approx(0, abs=1e-6)
    assert strong.loss == pytest.approx(strong.reverse_kl * strong.tokens, rel=1e-4)
    alone.forward_backward([drill("l1")], towards)
    assert backend.tokens == alone.tokens == 4
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(gradients(backend)[name], gradient, rtol=1e-4, atol=1e-6)


def test_weights_of_samples_scale_their_loss(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    (half,) = backend.forward_backward([drill(weight=0.5)], towards)
    assert half.loss == pytest.approx(0.5 * half.reverse_kl * half.tokens, rel=1e-4)


def test_a_loss_that_is_not_finite_changes_nothing(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    train(backend, towards, steps=1)
    before = tensors_checksum(backend.weights.student)
    backend.forward_backward(drills(), lambda rows: towards(rows) * math.nan)
    with pytest.raises(NotFinite, match="nan at step 2"):
        backend.step(1e-2)
    assert (backend.steps, tensors_checksum(backend.weights.student)) == (1, before)
    train(backend, towards, steps=1)  # and the next one is clean
    assert backend.steps == 2
    assert all(t.isfinite().all() for t in backend.weights.student.values())


def test_a_step_needs_something_to_learn_from(tiny_model: Path) -> None:
    with pytest.raises(AssertionError, match="needs a `forward_backward`"):
        make_backend(tiny_model).step(1e-3)


# -------------------------------------------------------------------------------------------------- teachers


def same_prompt() -> list[Sample]:
    """No hindsight: student and teacher differ by their weights alone."""
    return [replace(s, teacher_prompt_ids=s.prompt_ids) for s in drills()]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_frozen_teacher_stays_the_live_one_goes_along_and_ema_is_between(tiny_model: Path, tuning: str) -> None:
    distance = {}
    for teacher in ("frozen", "ema", "live"):
        backend = make_backend(tiny_model, tuning=tuning, teacher=teacher, ema_rate=0.5)
        assert gap(backend, same_prompt()) == pytest.approx(0, abs=1e-6)  # before any update they are the same
        for _ in range(3):
            backend.forward_backward(drills(), towards)
            backend.step(3e-3 if tuning == "lora" else 3e-4)
        distance[teacher] = gap(backend, same_prompt())
    assert distance["live"] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < distance["ema"] < distance["frozen"]


def test_the_average_follows_at_its_rate(tiny_model: Path) -> None:
    backend = make_backend(tiny_model, teacher="ema", ema_rate=0.25)
    assert backend.weights.ema is not None
    start = {name: tensor.clone() for name, tensor in backend.weights.ema.items()}
    backend.forward_backward(drills(), towards)
    backend.step(1e-2)
    for name, tensor in backend.weights.ema.items():
        expected = 0.75 * start[name] + 0.25 * backend.weights.student[name].detach()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
