"""The methods: their options are the settings', their losses the objectives'."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from nouns import make_turn, make_verdict, user

from agent_rl.methods import METHODS
from agent_rl.methods.user_hindsight import UserHindsight
from agent_rl.objectives.rows import Rows
from agent_rl.settings import MethodSettings
from agent_rl.types import DropReason, Evidence, Lesson, TeacherView, Transcript

STUDENT = torch.tensor([[2, 1, 0.3, -0.4, -1.1]]).log_softmax(-1)
TEACHER = torch.tensor([[0.5, 2.2, -0.3, 0.9, -1.5]]).log_softmax(-1)


def rows(behavior: float = math.nan, by_teacher: bool = False) -> Rows:
    return Rows(STUDENT, TEACHER, torch.tensor([1]), torch.tensor([behavior]), torch.tensor([by_teacher]))


def test_the_settings_of_a_method_are_its_fields() -> None:
    chosen = MethodSettings().model_dump()
    assert asdict(METHODS[chosen.pop("type")](**chosen)) == chosen


@pytest.mark.parametrize(
    ("divergence", "top_k", "loss"),
    [
        ("reverse_kl", 0, 0.756899),
        ("forward_kl", 0, 0.658331),
        ("jsd", 0, 0.163856),
        ("reverse_kl", 2, 0.680339),
        ("forward_kl", 2, 0.560438),
        ("jsd", 2, 0.143118),
        ("sampled", 0, 1.076572 * 1.522555),  # −A(1) · log p_S(1): 1.076572, −1.522555
    ],
)
def test_each_objective_on_five_tokens(divergence: str, top_k: int, loss: float) -> None:
    method = UserHindsight(divergence=divergence, top_k=top_k, beta=0.5)
    assert method.loss(rows()).tolist() == pytest.approx([loss], abs=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "sampled"])
def test_the_teachers_own_answers_are_learned_by_forward_kl(divergence: str) -> None:
    method = UserHindsight(divergence=divergence, top_k=2)
    assert method.loss(rows(by_teacher=True)).tolist() == pytest.approx([0.658331], abs=1e-5)


def test_the_sampled_objective_clips_its_advantage_and_caps_its_ratio() -> None:
    method = UserHindsight(divergence="sampled", advantage_clip=0.5, ratio_cap=2.0)
    assert method.loss(rows()).item() == pytest.approx(0.5 * 1.522555, abs=1e-5)  # ratio-free
    half = 1.522555 * 0.5 * math.exp(-0.5)  # behaviour was half a nat likelier
    assert method.loss(rows(-1.022555)).item() == pytest.approx(half, abs=1e-5)
    assert method.loss(rows(-4.522555)).item() == pytest.approx(2 * 0.5 * 1.522555, abs=1e-5)  # e³ → 2


def test_the_view_is_that_of_the_chosen_template() -> None:
    turn = make_turn("t1")
    evidence = Evidence(Transcript(turn, turn.prompt_ids, (user("What is tea?"),)), 1, (), (), ())
    lesson = Lesson("l1", "p1", "t1", 1, "user_hindsight", make_verdict(evidence), evidence)
    assert UserHindsight(hindsight="plain").view(lesson) == TeacherView(
        (user("What is tea?"), user("be short")), "plain/2"
    )
    nothing = Lesson("l1", "p1", "t1", 1, "user_hindsight", make_verdict(evidence, hint=None), evidence)
    assert UserHindsight().view(nothing) is DropReason.NO_HINDSIGHT
