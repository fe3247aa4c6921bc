"""Messages to token ids and back: the one door to chat templates and the `renderers` library.

A conversation that continues a turn of ours is never rendered again: `bridge` extends the ids that were sampled. The
bridge of a template is proven when the renderer is made, by probing; where none can be proven, `bridge` says so and
the turn becomes a fork with that reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent_rl.types import Json, Message


class RenderError(ValueError):
    """These messages cannot be rendered by this model's template; the message says which and why."""


class Renderer:
    """The chat format of one model. Thread-safe, made once."""

    stop_ids: tuple[int, ...]  # ids that end an answer, e.g. <|im_end|>
    bridge_proven: bool
    bridge_refusal: str | None  # why not, as a fork reason

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    def render(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> tuple[int, ...]:
        """Prompt ids up to and including the opening of the assistant's answer. Raises RenderError."""
        raise NotImplementedError

    def bridge(
        self, past_ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[Json] = ()
    ) -> tuple[int, ...] | None:
        """The ids to append to `past_ids` (a prompt and the response sampled from it, finished or truncated) so that
        the conversation goes on with `new_messages` and the opening of the next answer; None if it cannot be proven.
        """
        raise NotImplementedError

    def answer(self, response_ids: Sequence[int]) -> Message:
        """The assistant message in a whole response, its end marker left out."""
        raise NotImplementedError

    def parser(self, stop: Sequence[str] = ()) -> AnswerParser:
        """An incremental parser for one answer."""
        raise NotImplementedError

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text to ids, no markup, no special tokens: for perplexity and scoring, never for training data."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


class AnswerParser:
    """Ids in as they are sampled, text out as soon as it is certain: split UTF-8 and the start of a possible stop
    string are held back, end markers never come out."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids make certain."""
        raise NotImplementedError

    def finish(self) -> str:
        """What was held back and turned out to be text; nothing after a stop string."""
        raise NotImplementedError

    @property
    def stopped(self) -> bool:
        """True once a stop string was seen: the rest of the answer is not wanted."""
        raise NotImplementedError
