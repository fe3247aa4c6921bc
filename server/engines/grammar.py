"""Grammars for our engine: which tokens may come next, by llguidance.

    json_schema      {"type": "object", …}
    regex            \\d+, the whole answer
    structural_tag   {"type": "structural_tag", "format": FORMAT}, of xgrammar's formats those that follow; any other is
                     refused

A special token that a text spells out (`<|python_tag|>`) is that token, and no text that looks like it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from agent_rl.types import Grammar
from server.engines.contract import Body, Refused

KEPT_GRAMMARS = 256  # compiled ones, least recently used out first


class JsonSchema(Body):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] | bool


class Tag(Body):
    type: Literal["tag"]
    begin: str
    content: Format
    end: str


class TagsWithSeparator(Body):
    type: Literal["tags_with_separator"]
    tags: list[Tag] = Field(min_length=1)
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = Annotated[JsonSchema | Tag | TagsWithSeparator, Field(discriminator="type")]


class StructuralTag(Body):
    type: Literal["structural_tag"]
    format: Format


class Matcher:
    """Where one answer stands in its grammar. Belongs to one thread at a time."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int], vocab_size: int) -> None:
        self._matcher, self._ends, self._vocab_size = matcher, list(ends), vocab_size

    @property
    def error(self) -> str | None:
        """Why no token can follow, where the grammar turned out to be too much."""
        return f"the grammar failed: {self._matcher.get_error()}" if self._matcher.is_error() else None

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [V]: end tokens only where the grammar may end; none after an error."""
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        mask[self._ends] = self._matcher.is_accepting()
        return mask

    def append(self, token: int) -> None:
        """Take a token in. An end token ends the answer, and the grammar need not hear of it."""
        if token not in self._ends:
            self._matcher.consume_token(token)


class Grammars:
    """Compiles grammars for one tokenizer; safe to use from many threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """`tokenizer`: a fast Hugging Face tokenizer; `vocab_size`: that of the model's logits."""
        self._vocab_size, self._tokenizer, self._eos_ids = vocab_size, tokenizer, sorted(eos_ids)
        self._specials = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._markup = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self._compiled = lru_cache(maxsize=KEPT_GRAMMARS)(self._compile)

    def matcher(self, grammar: Grammar, ends: Collection[int]) -> Matcher:
        """A matcher at the beginning of an answer that one of `ends` ends. Raises Refused; slow the first time."""
        if not ends:
            raise Refused(f"{grammar.kind} needs a token that ends the answer: give stop_token_ids, and no ignore_eos")
        return Matcher(self._compiled(grammar).deep_copy(), ends, self._vocab_size)

    @cached_property
    def _words(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_ids or None)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            compiled = LLMatcher(self._words, self._source(grammar), log_level=0)
        except ValueError as error:
            raise Refused(f"{grammar.kind} cannot be read: {_words_of(error)}") from error
        if compiled.is_error():
            raise Refused(f"{grammar.kind} cannot be enforced: {compiled.get_error()}")
        return compiled

    def _source(self, grammar: Grammar) -> str:
        """In llguidance's own words. Raises ValueError."""
        match grammar.kind:
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(json.dumps(json.loads(grammar.text)))
            case "regex":
                return LLMatcher.grammar_from_regex(grammar.text)
            case _:
                form = StructuralTag.model_validate_json(grammar.text).format
                return LLMatcher.grammar_from_lark(f"start: {self._lark(form)}")

    def _lark(self, form: JsonSchema | Tag | TagsWithSeparator) -> str:
        if isinstance(form, JsonSchema):
            return f"%json {json.dumps(form.json_schema)}"
        if isinstance(form, Tag):
            return f"({self._literal(form.begin)} {self._lark(form.content)} {self._literal(form.end)})"
        one = "(" + " | ".join(map(self._lark, form.tags)) + ")"
        some = one if form.stop_after_first else f"({one} ({self._literal(form.separator)} {one})*)"
        return some if form.at_least_one else f"({some})?"

    def _literal(self, text: str) -> str:
        pieces = enumerate(self._markup.split(text))
        return " ".join(f"<[{self._specials[p]}]>" if at % 2 else json.dumps(p) for at, p in pieces if p)


def _words_of(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
