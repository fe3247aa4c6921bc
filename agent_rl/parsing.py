"""An answer as it becomes certain: ids in as they are sampled; text, reasoning and tool calls out, without markup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from agent_rl.calls import CallReader
from agent_rl.dialects import Dialect
from agent_rl.types import Json, Message, ToolCall

THINK, THOUGHT = "<think>", "</think>"
UNFINISHED = 3  # tokens that can be the beginning of one character: UTF-8 has four bytes at most
CONTEXT = 4  # tokens before, for tokenizers that write a first word otherwise than a later one


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one tool call; the first has its id and its name."""

    index: int  # 0, 1 … within the answer
    arguments: str  # a piece of the JSON text
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """What one push made certain, in this order: reasoning, then text, then calls. Markup never shows."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)


class Reader:
    """What an answer's text says. `dialect` None: nobody offered `tools`, so that calls are plain text; `thinks`:
    whether the model marks reasoning; `thinking`: whether the prompt has opened it already.

    A call that cannot be read is text in the end; one that is cut off before its name is nothing.
    """

    def __init__(
        self,
        stop: Sequence[str],
        dialect: Dialect | None,
        *,
        thinks: bool,
        thinking: bool,
        tools: Sequence[Json] = (),
    ) -> None:
        self._stop, self._dialect, self._thinks = tuple(filter(None, stop)), dialect, thinks
        self._tools = tools
        self._mode = "reasoning" if thinking else "text"
        self._held = ""  # may be the beginning of something else than text
        self._call: CallReader | None = None
        self._calls: list[tuple[str, str, CallReader]] = []  # (id, name, its reader)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._began = False  # something other than white space was said
        self._skip = ""  # characters that are no text right here
        self._gap = ""  # white space before the call that is being read
        self._spilled = ""  # what looked like a call and was none
        self.stop_string: str | None = None

    def push(self, text: str, *, last: bool = False) -> Parsed:
        """What is certain now; all of it if this is the `last`."""
        said, thought, calls = "", "", []
        self._held += text
        while self.stop_string is None:
            mode, held = self._mode, self._held
            if mode == "reasoning":
                thought += self._think(last)
            elif mode == "call":
                calls += self._read_call(last)
            else:
                said += self._say(last)
            said, self._spilled = said + self._spilled, ""
            if (self._mode, self._held) == (mode, held):
                break
        if self.stop_string is not None:
            self._held = ""
        self._text.append(said)
        self._reasoning.append(thought)
        return Parsed(said, thought, tuple(calls))

    def answer(self) -> Message:
        """All that was certain so far."""
        calls = tuple(ToolCall(call_id, name, reader.arguments) for call_id, name, reader in self._calls)
        reasoning = "".join(self._reasoning).strip()
        return Message("assistant", "".join(self._text), tool_calls=calls, reasoning=reasoning or None)

    # ----------------------------------------------------------------------------------------------- the modes

    def _say(self, last: bool) -> str:
        """Text up to whatever ends it: a stop string, a thought, a call."""
        held = self._held = self._held.lstrip(self._skip) if self._skip else self._held
        if not held:
            return ""
        dialect = self._dialect
        if dialect and not dialect.opening and (not self._began or self._skip) and held.lstrip()[:1] == "{":
            self._mode, self._call = "call", dialect.reader(self._tools)
            return ""
        at_start = not self._began and THINK.startswith(held.lstrip()[: len(THINK)])
        openings = [o for o in (THINK if self._thinks and at_start else "", self._opening()) if o]
        marks = [(at, m) for m in (*self._stop, *openings) if (at := held.find(m)) >= 0]
        at, mark = min(marks, default=(len(held), ""))
        if mark:
            said, self._held = held[:at], held[at + len(mark) :]
            if mark in self._stop:
                self.stop_string = mark
                return said
            self._mode = "reasoning" if mark == THINK else "call"
            self._call = dialect.reader(self._tools) if dialect and self._mode == "call" else None
            shown = said.rstrip() if said.strip() or self._mode == "call" else ""
            self._gap = said[len(shown) :]
            return shown
        keep = 0 if last else self._uncertain(held, (*self._stop, *openings))
        said, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self._skip = ""
        if self._calls and not said.strip():
            return ""  # white space between calls
        self._began = self._began or bool(said.strip())
        return said

    def _think(self, last: bool) -> str:
        """Reasoning up to its end, or to a call that is made without ending it."""
        marks = [mark for mark in (THOUGHT, self._opening()) if mark]
        at, mark = min(((at, m) for m in marks if (at := self._held.find(m)) >= 0), default=(len(self._held), ""))
        if not mark and not last:
            at -= _overlap(self._held, marks)
        thought, self._held = self._held[:at], self._held[at + len(mark) :]
        if mark == THOUGHT:
            self._mode, self._began, self._skip = "text", True, "\n"
        elif mark and self._dialect:
            self._mode, self._call = "call", self._dialect.reader(self._tools)
        return thought

    def _read_call(self, last: bool) -> list[CallDelta]:
        assert self._dialect is not None
        assert self._call is not None
        call, closing = self._call, self._dialect.closing
        body, found, rest = self._held.partition(closing) if closing else (self._held, "", "")
        keep = 0 if found or last or not closing else _overlap(body, (closing,))
        deltas = self._feed(call, body[: len(body) - keep])
        self._held = body[len(body) - keep :]
        if found or (last and not self._held) or (not closing and call.done):
            self._mode, self._call, self._began = "text", None, True
            self._held = rest or call.rest
            self._skip = "" if closing else "; \n"
            if call.name is None:
                deltas += self._late(call, found, last)
        return deltas

    def _feed(self, call: CallReader, text: str) -> list[CallDelta]:
        known = call.name
        piece = call.push(text)
        if known is None and call.name is not None:
            return [self._begin(call, call.name, piece)]
        return [CallDelta(len(self._calls) - 1, piece)] if piece else []

    def _begin(self, call: CallReader, name: str, arguments: str) -> CallDelta:
        call_id = f"call_{uuid4().hex[:24]}"
        self._calls.append((call_id, name, call))
        return CallDelta(len(self._calls) - 1, arguments, call_id, name)

    def _late(self, call: CallReader, found: str, last: bool) -> list[CallDelta]:
        """A call that ended without showing its name in the usual place: in another order, or no call at all."""
        if whole := call.whole():
            call.name, call.arguments = whole
            return [self._begin(call, *whole)]
        assert self._dialect is not None
        if found or not self._dialect.opening:
            self._spilled = f"{self._gap}{self._dialect.opening}{call.raw}{found}"
        return []

    # -------------------------------------------------------------------------------------------------- holding back

    def _opening(self) -> str:
        return self._dialect.opening if self._dialect else ""

    def _uncertain(self, text: str, marks: Sequence[str]) -> int:
        """Characters at the end that may turn out to be no text: a mark's beginning, and white space before a call."""
        keep = _overlap(text, marks)
        if self._dialect and self._dialect.opening:
            shown = text[: len(text) - keep]
            keep += len(shown) - len(shown.rstrip())
        return keep


class AnswerParser:
    """Ids in as they are sampled, what they say out as soon as it is certain: split UTF-8 and what may become markup or
    a stop string are held back, end markers never come out. The work per token does not grow with the answer."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], unseen: Collection[int], reader: Reader) -> None:
        self._tokenizer, self._stop_ids, self._unseen = tokenizer, frozenset(stop_ids), frozenset(unseen)
        self._reader = reader
        self._shown: list[int] = []  # the ids that came out last: what the next ones are decoded behind
        self._fresh: list[int] = []  # ids that do not end on a whole character yet
        self._ended = False  # by an end marker

    def push(self, ids: Sequence[int]) -> Parsed:
        """What these ids make certain."""
        for token in ids:
            if self._ended or self.stopped:
                break
            if token in self._stop_ids:
                self._ended = True
            elif token not in self._unseen:
                self._fresh.append(token)
        return self._reader.push(self._decoded(last=self._ended))

    def finish(self) -> Parsed:
        """What was held back and turned out to be text; nothing after a stop string."""
        return self._reader.push(self._decoded(last=True), last=True)

    def answer(self) -> Message:
        """Everything so far."""
        return self._reader.answer()

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met."""
        return self._reader.stop_string

    @property
    def stopped(self) -> bool:
        """True once a stop string was seen: the rest of the answer is not wanted."""
        return self._reader.stop_string is not None

    def _decoded(self, *, last: bool) -> str:
        """The text of the fresh ids, without those at the end that are the beginning of a character. Bytes that can
        never be one come out as U+FFFD."""
        if not self._fresh:
            return ""
        behind = len(self._text(self._shown)) if self._shown else 0
        ready = len(self._fresh)
        text = self._text(self._shown + self._fresh)
        if text.endswith("\ufffd") and not last:
            for n in range(len(self._fresh) - 1, max(-1, len(self._fresh) - UNFINISHED - 1), -1):
                shorter = self._text(self._shown + self._fresh[:n])
                if not shorter.endswith("\ufffd"):
                    ready, text = n, shorter
                    break
        if ready:
            self._shown, self._fresh = self._fresh[:ready][-CONTEXT:], self._fresh[ready:]
        return text[behind:]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def _overlap(text: str, marks: Sequence[str]) -> int:
    """Length of the longest ending of `text` with which one of `marks` begins."""
    longest = 0
    for mark in marks:
        at = text.find(mark[0], max(0, len(text) - len(mark) + 1)) if mark else -1
        while at >= 0 and len(text) - at > longest:
            if mark.startswith(text[at:]):
                longest = len(text) - at
            at = text.find(mark[0], at + 1)
    return longest
