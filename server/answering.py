"""A request on its way, and the events that its wire turns into an answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from agent_rl.engine import Chunk
from agent_rl.experience.stream import Head
from agent_rl.parsing import Parsed
from agent_rl.rendering import AnswerParser
from agent_rl.types import BASE_RELEASE, Conversation, Finish, Message, Policy, Span, Turn
from server.auth import Caller
from server.refusal import Refusal
from server.sessions import Place, extend_chain


@dataclass(frozen=True, slots=True)
class Started:
    """Comes first, once: the engine has begun, or has been silent for `keepalive_s`."""

    turn_id: str
    session_id: str  # as the client knows it
    rule: str
    release: str
    prompt_tokens: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Delta:
    """`parsed` is what became certain; `ids` and `logprobs` are what was sampled, which may be ahead of it."""

    parsed: Parsed
    ids: tuple[int, ...]  # [C]
    logprobs: tuple[float | None, ...]  # [C]


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing came for `keepalive_s`."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Comes last. The turn is on disk by now, unless `failure` says otherwise."""

    finish: Finish
    answer: Message  # all of it: content, reasoning, tool calls
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int  # of the prompt, those that the engine had from before
    stop: str | None = None  # the stop string that ended it, if one did
    failure: Refusal | None = None


Event = Started | Delta | Idle | Ended


@dataclass(slots=True)
class Answering:
    """One request, from its conversation to its turn; written by its own task alone."""

    conversation: Conversation
    caller: Caller
    turn_id: str
    created_at: float  # unix seconds
    began: float  # monotonic seconds
    outbox: asyncio.Queue[Event | Refusal] = field(default_factory=asyncio.Queue)
    # known when it is prepared
    policy: Policy | None = None
    place: Place | None = None
    parser: AnswerParser | None = None
    past: tuple[int, ...] = ()  # what the prompt shares with the parent
    prompt_ids: tuple[int, ...] = ()  # [P] what comes behind it
    release: str = ""
    # as it goes on
    announced: bool = False  # the client was told the release
    sampling: bool = False
    abandoned: bool = False  # by its client
    first_token_s: float | None = None
    text: list[str] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.past) + len(self.prompt_ids)

    @property
    def response_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.ids)

    def started(self) -> Started:
        assert self.place is not None
        session_id = self.conversation.session_id or self.place.session_id
        return Started(self.turn_id, session_id, self.place.rule, self.release, self.prompt_tokens, self.created_at)

    def hang_up(self, task: asyncio.Task[None]) -> None:
        """Its client has gone: stop sampling, but let what was sampled be recorded."""
        self.abandoned = True
        if self.sampling:
            task.cancel()

    def survives(self) -> bool:
        """In its own task, cancelled: True if that was its client's hang-up, which does not stop the recording."""
        task = asyncio.current_task()
        if self.abandoned and task is not None:
            task.uncancel()
        return self.abandoned

    def turn(self, finish: Finish, duration_s: float) -> Turn:
        """What is recorded."""
        assert self.place is not None
        assert self.policy is not None
        ids, parent, tenant = self.response_ids, self.place.parent, self.caller.tenant
        masses = tuple(mass for chunk in self.chunks for mass in chunk.kept_mass)
        answer, shared = Message("assistant", "".join(self.text)), parent.n_messages if parent else 0
        return Turn(
            turn_id=self.turn_id,
            session_id=self.place.session_id,
            tenant_id=tenant.tenant_id,
            policy_id=self.policy.policy_id,
            created_at=self.created_at,
            prompt_ids=self.prompt_ids,
            response_ids=ids,
            behavior_logprobs=tuple(logprob for chunk in self.chunks for logprob in chunk.logprobs),
            spans=self.chunks[-1].spans or (Span(self.release or BASE_RELEASE, 0, len(ids)),),
            messages=self.conversation.messages[shared:],
            answer=answer,
            finish=finish,
            sampling=self.conversation.sampling,
            chain=extend_chain(tenant.hmac_key, self.place.chain, answer),
            kept_mass=masses if any(mass is not None for mass in masses) else None,
            parent_id=parent.turn_id if parent else None,
            shared_len=len(self.past),
            shared_messages=shared,
            fork_reason=self.place.fork_reason,
            session_rule=self.place.rule,
            subject=self.conversation.end_user,
            api_key_id=self.caller.api_key_id,
            tools=self.conversation.tools,
            no_lesson=self._why_no_lesson(finish),
            duration_s=duration_s,
            first_token_s=self.first_token_s,
        )

    def head(self, turn: Turn) -> Head:
        """Where the conversation stands after `turn`."""
        ids, n_messages = self.past + turn.prompt_ids + turn.response_ids, len(self.conversation.messages) + 1
        return Head(turn.turn_id, turn.session_id, turn.policy_id, ids, n_messages, turn.chain)

    def _why_no_lesson(self, finish: Finish) -> str | None:
        if finish in (Finish.ABORTED, Finish.ERROR):
            return str(finish)
        if self.conversation.train is False:
            return "x-train"
        return "side" if self.conversation.side else None
