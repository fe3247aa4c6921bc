"""Reading a JSON body field by field: a field is right, absent, or a refusal that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from agent_rl.types import Grammar, Json
from server.refusal import Refusal, bad_field

LONGEST_NAME = 128  # of a tool
MOST_STOPS = 16
DEEPEST = 64  # lists and objects in each other
Body = Mapping[str, Any]


def json_object(raw: bytes) -> dict[str, Any]:
    """Raises Refusal (400) for what is not a JSON object."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, not {kind(body)}", code="invalid_json")
    if raw.count(b"{") + raw.count(b"[") > DEEPEST and depth(body) > DEEPEST:
        raise Refusal(400, f"the body is nested more than {DEEPEST} deep, the limit here", code="too_deep")
    return body


def depth(value: object) -> int:
    """How deep lists and objects stand in each other; 1 for one with none inside."""
    level, deep = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        deep += 1
    return deep


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


def mapping(body: Body, name: str, where: str = "") -> dict[str, Any]:
    """An object; an empty one where the field is absent or null. `where` is the path before its name."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise bad_field(f"{where}{name}", f"must be an object, not {kind(value)}", "invalid_type")
    return value or {}


def items(body: Body, name: str, where: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(its path, the object) for each object of a list; none where the field is absent or null. `where` is the path
    before its name."""
    path, value = f"{where}{name}", body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad_field(path, f"must be a list, not {kind(value)}", "invalid_type")
    for at, item in enumerate(value):
        if not isinstance(item, dict):
            raise bad_field(f"{path}[{at}]", f"must be an object, not {kind(item)}", "invalid_type")
    return [(f"{path}[{at}]", item) for at, item in enumerate(value)]


def text(item: Body, name: str, where: str) -> str:
    """A string that must be there; `where` is the path of `item`."""
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_field(f"{where}.{name}", f"must be a string, not {kind(value)}", "invalid_type")
    return value


def stop_strings(value: object, name: str) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_field(name, "must be a string or a list of strings, none of them empty", "invalid_type")
    if len(stops) > MOST_STOPS:
        raise bad_field(name, f"at most {MOST_STOPS} strings, not {len(stops)}")
    return tuple(stops)


def function_tool(item: Body, where: str, parameters: str) -> Json:
    """A tool as Conversations have it, from a function's `name`, `description` and JSON schema, which the wire calls
    `parameters`. So the same tool gives the same prompt over any wire."""
    name, description, schema = item.get("name"), item.get("description"), item.get(parameters)
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise bad_field(f"{where}.name", f"must be a string of 1 to {LONGEST_NAME} characters, not {name!r:.80}")
    if description is not None and not isinstance(description, str):
        raise bad_field(f"{where}.description", f"must be a string, not {kind(description)}", "invalid_type")
    if schema is not None and not isinstance(schema, dict):
        raise bad_field(f"{where}.{parameters}", f"must be a JSON schema, not {kind(schema)}", "invalid_type")
    said = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **said, "parameters": schema or {"type": "object"}}}


def schema_grammar(schema: object, where: str) -> Grammar:
    if not isinstance(schema, dict):
        raise bad_field(where, f"must be a JSON schema, not {kind(schema)}", "invalid_type")
    return Grammar("json_schema", orjson.dumps(schema).decode())


def format_grammar(form: Body, schema: object, path: str, schema_path: str) -> Grammar | None:
    """Of a `response_format` or a `text.format`, which keep their schema in different places. A schema is held to,
    whether or not the client calls it strict."""
    wanted = form.get("type", "text")
    if wanted == "text":
        return None
    if wanted == "json_object":
        return schema_grammar({"type": "object"}, path)
    if wanted == "json_schema":
        return schema_grammar(schema, schema_path)
    raise bad_field(f"{path}.type", f"must be text, json_object or json_schema, not {wanted!r:.80}")


def kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
