"""An answer as it becomes certain: ids in, text, reasoning and tool calls out."""

from __future__ import annotations

from dataclasses import dataclass


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
