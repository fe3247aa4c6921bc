"""Samples to learn from on the tiny model, and backends that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent_rl.settings import LearnerSettings, LoraSettings
from agent_rl.teachers.own import TEACHERS
from agent_rl.training.torch_backend import TorchBackend
from agent_rl.types import Sample


def drill(name: str = "l1", **changes: Any) -> Sample:
    """`response_ids` decides what needs its length."""
    response_ids = changes.get("response_ids", (30, 41, 52, 2))
    values: dict[str, Any] = {
        "turn_id": f"turn of {name}",
        "prompt_ids": (1, 70, 71, 72),
        "response_ids": response_ids,
        "teacher_prompt_ids": (1, 70, 71, 72, 90, 91, 92),
        "response_mask": (True,) * len(response_ids),
        "behavior_logprobs": (None,) * len(response_ids),
        "temperature": 1.0,
    }
    return Sample(name, **{**values, **changes})


def drills() -> list[Sample]:
    """Four, of different lengths on every side."""
    return [
        drill("l1"),
        drill("l2", prompt_ids=(1, 80), response_ids=(31, 2)),
        drill("l3", teacher_prompt_ids=(1, 99, 98), response_ids=(60, 61, 62, 63, 64, 65, 2)),
        drill("l4", prompt_ids=(1, 75, 76, 77, 78, 79), response_ids=(45,)),
    ]


def make_backend(folder: Path, *, micro_tokens: int | None = None, **changes: Any) -> TorchBackend:
    values: dict[str, Any] = {"dtype": "float32", "lora": LoraSettings(rank=4, alpha=8), "lr": 1e-2}
    settings = LearnerSettings(**{**values, **changes})
    teacher = TEACHERS[settings.teacher](settings.ema_rate)
    return TorchBackend(folder, settings, teacher, micro_tokens=micro_tokens)
