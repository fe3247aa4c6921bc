"""Reading a JSON body field by field: a field is right, absent, or a refusal that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from server.refusal import Refusal, bad_field

Body = Mapping[str, Any]


def json_object(raw: bytes) -> dict[str, Any]:
    """Raises Refusal (400) for what is not a JSON object."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, not {kind(body)}", code="invalid_json")
    return body


def number(body: Body, name: str, low: float, high: float) -> float | None:
    """A number in [low, high]; None where the field is absent or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_field(name, f"must be a number, not {kind(value)}", "invalid_type")
    if not low <= value <= high:
        raise bad_field(name, f"must be between {low:g} and {high:g}, not {value:g}")
    return float(value)


def integer(body: Body, name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_field(name, f"must be an integer, not {kind(value)}", "invalid_type")
    if not low <= value <= high:
        raise bad_field(name, f"must be between {low} and {high}, not {value}")
    return value


def boolean(body: Body, name: str) -> bool | None:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_field(name, f"must be true or false, not {kind(value)}", "invalid_type")
    return value


def string(body: Body, name: str, longest: int | None = None) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise bad_field(name, f"must be a string, not {kind(value)}", "invalid_type")
    if longest is not None and len(value) > longest:
        raise bad_field(name, f"must have at most {longest} characters, not {len(value)}")
    return value


def kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
