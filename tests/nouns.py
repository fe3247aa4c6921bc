"""Builders of the nouns, with values that do not matter filled in."""

from __future__ import annotations

from typing import Any

from agent_rl.types import (
    Checkpoint,
    Evidence,
    Feedback,
    Finish,
    Message,
    Release,
    ReleaseState,
    Sampling,
    Span,
    StepMetrics,
    Turn,
    Verdict,
)


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str) -> Message:
    return Message("assistant", text)


def make_turn(turn_id: str = "t1", **changes: Any) -> Turn:
    """`response_ids` decides what needs its length."""
    response_ids = changes.get("response_ids", (5, 2))
    values: dict[str, Any] = {
        "turn_id": turn_id,
        "session_id": "s1",
        "tenant_id": "acme",
        "policy_id": "p1",
        "created_at": 100.0,
        "prompt_ids": (1, 9, 2),
        "response_ids": response_ids,
        "behavior_logprobs": (-0.5,) * len(response_ids),
        "spans": (Span("base", 0, len(response_ids)),),
        "messages": (user(f"question of {turn_id}"),),
        "answer": answer(f"answer of {turn_id}"),
        "finish": Finish.STOP,
        "sampling": Sampling(max_tokens=16),
        "chain": f"chain-{turn_id}",
    }
    return Turn(**{**values, **changes})


def make_child(parent: Turn, turn_id: str, says: str, **changes: Any) -> Turn:
    """The turn after a parent that itself has none: it shares everything and adds one message."""
    values: dict[str, Any] = {
        "created_at": parent.created_at + 1,
        "parent_id": parent.turn_id,
        "session_id": parent.session_id,
        "shared_len": len(parent.prompt_ids) + len(parent.response_ids),
        "shared_messages": len(parent.messages) + 1,
        "prompt_ids": (7, 7),
        "messages": (user(says),),
    }
    return make_turn(turn_id, **{**values, **changes})


def make_feedback(feedback_id: str = "f1", **changes: Any) -> Feedback:
    values: dict[str, Any] = {"tenant_id": "acme", "created_at": 200.0, "turn_id": "t1", "comment": "too long"}
    return Feedback(feedback_id, **{**values, **changes})


def make_verdict(evidence: Evidence, **changes: Any) -> Verdict:
    values: dict[str, Any] = {"source": "rules", "score": -1, "hint": "be short"}
    return Verdict(evidence.transcript.turn.turn_id, evidence.revision, **{**values, **changes})


def make_checkpoint(checkpoint_id: str, parent_id: str | None = None, **changes: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "policy_id": "p1",
        "step": 1,
        "path": f"checkpoints/{checkpoint_id}",
        "method": "user_hindsight",
        "created_at": 300.0,
    }
    return Checkpoint(checkpoint_id, parent_id=parent_id, **{**values, **changes})


def make_step(step: int = 1, lesson_ids: tuple[str, ...] = (), replay_ids: tuple[str, ...] = ()) -> StepMetrics:
    return StepMetrics(step, "user_hindsight", lesson_ids, replay_ids, 12, 0.5, 1.0, 1e-3, 2.0, {"kl": 0.25})


def make_release(release_id: str, checkpoint_id: str, **changes: Any) -> Release:
    values: dict[str, Any] = {
        "policy_id": "p1",
        "kind": "adapter",
        "path": f"releases/{release_id}",
        "base_hash": "b" * 64,
        "checksum": "c" * 64,
        "tokenizer_hash": "d" * 64,
        "state": ReleaseState.STAGED,
        "created_at": 300.0,
        "step": 1,
    }
    return Release(release_id, checkpoint_id=checkpoint_id, **{**values, **changes})
