"""Messages to token ids and back: the one door to chat templates.

A conversation that continues a turn of ours is never rendered again: `bridge` extends the ids that were sampled. The
bridge of a template is proven when the renderer is made, by probing; where none can be proven, `bridge` says so and
the turn becomes a fork with that reason.

Special tokens come from the template alone. Where a message spells one out (`<|im_end|>`), it stays plain text: a
guard character keeps the spelling apart while the template runs, then markup and text are encoded piece by piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from agent_rl.dialects import DIALECTS, HERMES, Dialect, spell_out, tool_grammar
from agent_rl.parsing import THINK, THOUGHT, AnswerParser, Reader
from agent_rl.types import Grammar, Json, Message, ToolCall

Ids = tuple[int, ...]
ANSWER = "0d5c2e61"  # stands for an answer while the template shows what it puts behind one


class RenderError(ValueError):
    """These messages cannot be rendered by this model's template; the message says which and why."""


class Renderer:
    """The chat format of one model. Thread-safe, made once."""

    stop_ids: Ids  # ids that end an answer, e.g. <|im_end|>
    bridge_proven: bool
    bridge_refusal: str | None  # why not, in words

    def __init__(self, folder: Path) -> None:
        """Raises RenderError where the folder has no tokenizer.json or no usable chat template."""
        if not (folder / "tokenizer.json").is_file():
            raise RenderError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        template: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if not template.chat_template:
            raise RenderError(f"the tokenizer in {folder} has no chat template, so no conversation can be rendered")
        self._template = template
        self._tokenizer = template.backend_tokenizer
        self._thinks = THINK in template.chat_template
        self._specials = {t.content: i for i, t in template.added_tokens_decoder.items() if t.special}
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._markup = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        native = self._native_dialect()
        self._knows_tools, self._dialect = native is not None, native or HERMES
        probes = [PROBES[0], *(probe for probe in PROBES[1:] if self._accepts(probe))]
        wholes = [self.encode(text) for text in map(self._text, probes)]  # special tokens are taken for such, still
        self._tokenizer.encode_special_tokens = True  # from here on the tokenizer takes text for text
        if wholes != [self._pieces(text) for text in map(self._text, probes)]:
            raise RenderError(
                f"the tokenizer in {folder} encodes text differently beside special tokens: not supported"
            )
        closing = self._text(_PAST, opening=False).rpartition(ANSWER)[2]
        first = self._markup.match(closing)
        self._end = first[0] if first else ""  # the special token that the template puts behind an answer, if it does
        self.stop_ids = _stop_ids(folder, template.eos_token_id, self._specials.get(self._end))
        refusal = f"the chat template puts no special token behind an answer but {closing!r}"
        self.bridge_refusal = refusal if closing and not first else self._why_unproven(probes)
        self.bridge_proven = self.bridge_refusal is None

    def render(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> Ids:
        """Prompt ids up to and including the opening of the assistant's answer. Raises RenderError."""
        return self._pieces(self._text(messages, tools))

    def bridge(
        self, past_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[Json] = ()
    ) -> Ids | None:
        """The ids to append to `past_ids` (a prompt and the response sampled from it, finished or truncated) so that
        the conversation goes on with `new_messages` and the opening of the next answer; None if it cannot be proven.
        """
        return self._extend(past_ids, new_messages, tools) if self.bridge_proven else None

    def answer(self, response_ids: Sequence[int]) -> Message:
        """The assistant message in a whole response, its end marker left out."""
        parser = self.parser()
        parser.push(response_ids)
        parser.finish()
        return parser.answer()

    def parser(
        self, stop: Sequence[str] = (), *, tools: Sequence[Json] = (), prompt_ids: Sequence[int] = ()
    ) -> AnswerParser:
        """An incremental parser for one answer to a prompt that ends with `prompt_ids`; calls are parsed where `tools`
        were offered."""
        thinking = self._thinks and self.decode(prompt_ids[-8:]).rstrip().endswith(THINK)
        dialect = self._dialect if tools else None
        reader = Reader(stop, dialect, thinks=self._thinks, thinking=thinking, tools=tools)
        unseen = set(self._specials.values()) - {self._specials[m] for m in MARKUP if m in self._specials}
        return AnswerParser(self._tokenizer, self.stop_ids, unseen, reader)

    def tool_grammar(self, tools: Sequence[Json], choice: str, parallel: bool) -> Grammar:
        """Calls of these tools and nothing else; `choice` is "required" or "=NAME". Raises RenderError."""
        try:
            return tool_grammar(self._dialect, tools, choice, parallel)
        except ValueError as error:
            raise RenderError(str(error)) from error

    def encode(self, text: str) -> Ids:
        """Plain text to ids, no markup, no special tokens: for perplexity and scoring, never for training data."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """All of it, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    # ------------------------------------------------------------------------------------------- text and pieces

    def _text(self, messages: Sequence[Message], tools: Sequence[Json] = (), *, opening: bool = True) -> str:
        """What the template writes; special tokens that messages spell out carry a guard behind their first letter."""
        if not self._knows_tools:
            messages, tools = spell_out(messages, tools), ()
        return self._templated(messages, tools, opening=opening)

    def _templated(self, messages: Sequence[Message], tools: Sequence[Json], *, opening: bool) -> str:
        """Raises RenderError."""
        chat: Any = [_template_message(m) for m in messages]
        if self._spelled_out(chat):
            chat = self._guarded(chat)
        try:
            text = self._template.apply_chat_template(
                chat, tools=list(tools) or None, tokenize=False, add_generation_prompt=opening
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(m.role for m in messages)
            raise RenderError(f"the model's chat template refuses messages with the roles {roles}: {error}") from error
        return str(text)

    def _pieces(self, text: str) -> Ids:
        ids: list[int] = []
        for at, piece in enumerate(self._markup.split(text)):
            if at % 2:
                ids.append(self._specials[piece])
            elif piece:
                ids.extend(self._tokenizer.encode(piece.replace(GUARD, ""), add_special_tokens=False).ids)
        return tuple(ids)

    def _spelled_out(self, value: object) -> bool:
        if isinstance(value, str):
            return GUARD in value or self._markup.search(value) is not None
        if isinstance(value, dict):
            return any(map(self._spelled_out, value.values()))
        return isinstance(value, list) and any(map(self._spelled_out, value))

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._markup.sub(lambda m: m[0][0] + GUARD + m[0][1:], value.replace(GUARD, "\ufffd"))
        if isinstance(value, dict):
            return {name: self._guarded(item) for name, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list) else value

    # --------------------------------------------------------------------------------------------------- bridging

    def _native_dialect(self) -> Dialect | None:
        """The dialect in which the template writes a call, proven by reading it; None where that is none of ours, or
        where the template leaves out tools, calls or results."""
        try:
            prompt, call, whole = (self._templated(_TOOLS[:n], [_TOOL], opening=n == 1) for n in (1, 2, 3))
        except RenderError:
            return None
        if _TOOLS[2].content not in whole or "look_up" not in prompt:
            return None
        said = self._markup.sub(lambda m: m[0] if m[0] in MARKUP else "", call[common_prefix(prompt, call) :])
        return next((dialect for dialect in DIALECTS if self._reads(dialect, said)), None)

    def _reads(self, dialect: Dialect, said: str) -> bool:
        reader = Reader((), dialect, thinks=self._thinks, thinking=False, tools=[_TOOL])
        reader.push(said, last=True)
        calls = [(call.name, _arguments(call.arguments)) for call in reader.answer().tool_calls]
        return calls == [(_CALL.name, _arguments(_CALL.arguments))]

    def _accepts(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> bool:
        try:
            self._text(messages, tools)
        except RenderError:
            return False
        return True

    def _extend(self, past_ids: Sequence[int], new: Sequence[Message], tools: Sequence[Json] = ()) -> Ids | None:
        """What the template writes behind an answer that `new` follows, without what `past_ids` has of it already.
        Where nothing ends an answer but the next speaker's token, that is its end.
        """
        past = _CALLING if new and new[0].role == "tool" else _PAST
        tail = self._text([*past, *new], tools).rpartition(ANSWER)[2]
        first = self._markup.search(tail)
        at = tail.find(self._end) if self._end or first is None else first.start()
        if first is None or at < 0 or (at > 0 and past is _PAST):
            return None
        closing = self._pieces(tail[at:])
        if past_ids[-1] == closing[0]:
            return closing[1:]
        return None if past_ids[-1] in self.stop_ids else closing

    def _why_unproven(self, probes: Sequence[Sequence[Message]]) -> str | None:
        """Bridges the probes in every way that an answer may end, and compares with rendering everything."""
        for probe in probes:
            for at in (i for i, m in enumerate(probe) if m.role == "assistant" and i + 1 < len(probe)):
                prompt, said = self._pieces(self._text(probe[:at])), self.encode(probe[at].content)
                everything = self._pieces(self._text(probe))
                cut = self._extend((*prompt, *said), probe[at + 1 :]) or ()
                ended = (*said, *cut[:1])
                tail = self._extend((*prompt, *ended), probe[at + 1 :])
                if tail != cut[1:] or not cut or not self._same(prompt, (*said, *cut), everything):
                    return f"extending an answer does not give what the chat template gives for {probe!r}"
        for probe in (probe for probe in (_TOOLS, _TWO_TOOLS) if self._accepts(probe, [_TOOL])):
            asked, everything = (self._pieces(self._text(m, [_TOOL])) for m in (probe[:1], probe))
            behind = self._extend(asked, probe[2:], [_TOOL])
            if not behind or everything[-len(behind) :] != behind:
                return "extending a tool call by its results does not give what the chat template gives"
        return None

    def _same(self, prompt: Ids, behind: Ids, everything: Ids) -> bool:
        """Whether `prompt` and what comes `behind` it are `everything`. One thing may differ: templates of models that
        think leave out of the past the thought that their own opening of an answer begins, and what was sampled stays.
        """
        past = everything[: len(everything) - len(behind)]
        if everything[len(past) :] != behind:
            return False
        shared = common_prefix(prompt, past)
        rests = [self.decode(ids[shared:]) for ids in (prompt, past)]
        return prompt == past or (self._thinks and all(map(NO_THOUGHT.fullmatch, rests)))


GUARD = "\ue0d5"  # a private-use character, which no tokenizer's markup contains
_SYSTEM = Message("system", "You are terse.\nAnswer in French.")
_FIRST = (Message("user", "What is tea?"), Message("assistant", "A drink. Déjà vu: 日本 🙂"))
_SECOND = (Message("user", "Two lines:\n\n  and spaces  "), Message("assistant", "One.\n\n* two\n* three"))
_LAST = Message("user", "naïve café?\t")
_PAST = (Message("user", "Hi"), Message("assistant", ANSWER))
_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_CALL = ToolCall("call_0001", "look_up", '{"word": "teapot"}')
_OTHER = ToolCall("call_0002", "look_up", '{"word": "kettle"}')
_RESULTS = tuple(
    Message("tool", said, tool_call_id=c.id, name=c.name) for c, said in ((_CALL, "It is hot."), (_OTHER, "Cold"))
)
_TOOLS = (Message("user", "What is in it?"), Message("assistant", "", tool_calls=(_CALL,)), _RESULTS[0])
_TWO_TOOLS = (_TOOLS[0], Message("assistant", "", tool_calls=(_CALL, _OTHER)), *_RESULTS)
_CALLING = (_PAST[0], Message("assistant", "", tool_calls=(replace(_CALL, arguments=json.dumps({"word": ANSWER})),)))
MARKUP = (THINK, THOUGHT, HERMES.opening, HERMES.closing)  # seen, even where a tokenizer calls them special
NO_THOUGHT = re.compile(f"\\s*({THINK}\\s*)?({THOUGHT}\\s*)?")
PROBES: tuple[tuple[Message, ...], ...] = (
    (*_FIRST, _LAST),
    (_SYSTEM, *_FIRST, _LAST),
    (_SYSTEM, *_FIRST, *_SECOND, _LAST),
    (*_FIRST, *_SECOND, _LAST, Message("assistant", "7"), Message("user", "x")),
)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of what both begin with."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _template_message(message: Message) -> Json:
    """As chat templates know messages; absent fields are absent."""
    chat: Json = {"role": message.role, "content": message.content}
    if message.name is not None:
        chat["name"] = message.name
    if message.reasoning is not None:
        chat["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        chat["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        chat["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _arguments(c.arguments)}}
            for c in message.tool_calls
        ]
    return chat


def _arguments(text: str) -> object:
    """Templates print arguments with `tojson`, so they take the object; what is no JSON stays the text it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _stop_ids(folder: Path, eos: int | None, end: int | None) -> Ids:
    """The end-of-answer ids that the tokenizer, the generation configuration and the template name."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    found = [eos, end, *(named if isinstance(named, list) else [named])]
    return tuple(sorted({token for token in found if token is not None}))
