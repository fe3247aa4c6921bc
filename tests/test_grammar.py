"""Grammars: what fits, where an answer may end, and what cannot be enforced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scheduling import Bench, prompt

from agent_rl.models import load_tokenizer
from agent_rl.types import Grammar
from server.engines.contract import Refused
from server.engines.grammar import Grammars, Matcher


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
