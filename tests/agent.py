"""What the scripted engine says to an agent: the rules that the tests of every wire share."""

from __future__ import annotations

from typing import Any

CALLS = (  # text, then two calls; the second spells its JSON in its own way
    "Let me look.\n"
    '<tool_call>\n{"name": "look_up", "arguments": {"word": "tea"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look_up", "arguments": {"word":  "cup"}}\n</tool_call>'
)
RULES: list[dict[str, Any]] = [
    {"user": "A hot drink", "text": "Tea is a hot drink, from a cup."},
    {"user": "look tea up", "text": CALLS},
    {"user": "think", "text": "<think>\nTea is wet.\n</think>\n\nIt is wet."},
    {"user": "give up", "text": "one two three", "abort_after": 2},
]


def script(default: str, *rules: dict[str, Any]) -> dict[str, Any]:
    """`rules` first, then the shared ones."""
    return {"token_s": 0.001, "rules": [*rules, *RULES], "default": {"text": default}}
