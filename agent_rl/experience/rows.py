"""Between the nouns and the rows of SQL. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec

from agent_rl.experience.arrays import pack_floats, pack_ids, unpack_floats, unpack_ids
from agent_rl.types import Checkpoint, Deployment, Feedback, Policy, Release, Turn

Row = dict[str, Any]
BINARY = {
    "prompt_ids": (pack_ids, unpack_ids),
    "response_ids": (pack_ids, unpack_ids),
    "behavior_logprobs": (pack_floats, unpack_floats),
    "kept_mass": (pack_floats, unpack_floats),
}


def jsonable(value: object) -> Any:
    """As JSON that both databases take: NUL, which PostgreSQL cannot hold, as U+FFFD; no number as None."""
    return _clean(msgspec.to_builtins(value))


def turn_row(turn: Turn) -> Row:
    row = {name: jsonable(value) for name, value in _values(turn) if name not in BINARY}
    for name, (pack, _) in BINARY.items():
        value = getattr(turn, name)
        row[name] = None if value is None else pack(value)
    return row


def turn_of(row: Mapping[Any, Any]) -> Turn:
    values: Row = {}
    for field in fields(Turn):
        value = row[field.name]
        if field.name in BINARY and value is not None:
            value = BINARY[field.name][1](value)
        values[field.name] = value
    return msgspec.convert(values, Turn)


def feedback_row(feedback: Feedback) -> Row:
    return {name: jsonable(value) for name, value in _values(feedback)}


def feedback_of(row: Mapping[Any, Any]) -> Feedback:
    return Feedback(**{field.name: row[field.name] for field in fields(Feedback)})


def policy_of(row: Mapping[Any, Any]) -> Policy:
    return Policy(row["policy_id"], row["tenant_id"], row["name"], row["base_hash"], row["head_checkpoint_id"])


def checkpoint_of(row: Mapping[Any, Any]) -> Checkpoint:
    return Checkpoint(**{field.name: row[field.name] for field in fields(Checkpoint)})


def release_of(row: Mapping[Any, Any]) -> Release:
    return msgspec.convert({field.name: row[field.name] for field in fields(Release)}, Release)


def deployment_of(row: Mapping[Any, Any]) -> Deployment:
    return Deployment(
        row["policy_id"], row["live_release_id"], row["generation"], row["canary_release_id"], row["canary_share"]
    )


def _values(noun: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(noun, field.name)) for field in fields(noun)]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    return value
