"""A request on its way, and the events that its wire turns into an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent_rl.engine import Chunk
from agent_rl.experience.stream import Head
from agent_rl.parsing import AnswerParser, Parsed
from agent_rl.types import BASE_RELEASE, Conversation, Finish, Message, Policy, Span, Turn
from server.auth import Caller
from server.refusal import Refusal
from server.sessions import Place, extend_chain, thoughts_of


@dataclass(frozen=True, slots=True)
class Started:
    """Comes first, once: the engine has begun, or has been silent for `keepalive_s`."""

    turn_id: str
    session_id: str  # as the client knows it
    rule: str
    release: str
    prompt_tokens: int
    created_at: float
    allowance: Mapping[str, str] = field(default_factory=dict)  # headers: what the key has left


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
    reasoning_tokens: int  # those that came while nothing but reasoning was said
    cached_tokens: int  # of the prompt, those that the engine had from before
    stop: str | None = None  # the stop string that ended it, if one did
    failure: Refusal | None = None


Event = Started | Delta | Idle | Ended


class Log:
    """Events in their order, read from the beginning by as many as like."""

    def __init__(self) -> None:
        self._events: list[Event | Refusal] = []
        self._waiting: set[asyncio.Future[None]] = set()

    def put(self, event: Event | Refusal) -> None:
        self._events.append(event)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def get(self, at: int, patience_s: float) -> Event | Refusal | None:
        """The event with this number, as soon as it is there; None if that takes longer than `patience_s`."""
        if at >= len(self._events):
            loop = asyncio.get_running_loop()
            waiting: asyncio.Future[None] = loop.create_future()
            timer = loop.call_later(patience_s, _give_up, waiting)  # half the price of asyncio.timeout, for each token
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)
                timer.cancel()
        return self._events[at] if at < len(self._events) else None


def _give_up(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


@dataclass(slots=True)
class Answering:
    """One request, from its conversation to its turn; written by its own task alone."""

    conversation: Conversation
    caller: Caller
    turn_id: str
    created_at: float  # unix seconds
    began: float  # monotonic seconds
    allowance: Mapping[str, str] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    readers: int = 0
    # known when it is prepared
    policy: Policy | None = None
    place: Place | None = None
    parser: AnswerParser | None = None
    past: tuple[int, ...] = ()  # what the prompt shares with the parent
    prompt_ids: tuple[int, ...] = ()  # [P] what comes behind it
    parent_id: str | None = None
    shared_messages: int = 0
    release: str = ""
    # as it goes on
    announced: bool = False  # somebody was told the release
    sampling: bool = False
    abandoned: bool = False  # by its client
    over: bool = False
    failed: bool = False
    first_token_s: float | None = None
    reasoning_tokens: int = 0
    stop: str | None = None  # the stop string that ended it
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.past) + len(self.prompt_ids)

    @property
    def response_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.ids)

    @property
    def kept(self) -> bool:
        """Whether it becomes a recorded turn: the tenant may want `store: false` to leave nothing behind."""
        return self.conversation.store is not False or self.caller.tenant.unstored != "discard"

    def started(self) -> Started:
        assert self.place is not None
        session_id = self.conversation.session_id or self.place.session_id
        return Started(
            *(self.turn_id, session_id, self.place.rule, self.release),
            *(self.prompt_tokens, self.created_at, self.allowance),
        )

    def ended(self, finish: Finish, failure: Refusal | None = None) -> Ended:
        cached = self.chunks[-1].cached_tokens if self.chunks else 0
        return Ended(
            finish=finish,
            answer=self.parser.answer() if self.parser else Message("assistant", ""),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.response_ids),
            reasoning_tokens=self.reasoning_tokens,
            cached_tokens=cached,
            stop=self.stop,
            failure=failure,
        )

    def hang_up(self, task: asyncio.Task[None]) -> None:
        """Its last client has gone: stop sampling, but let what was sampled be recorded."""
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
        assert self.parser is not None
        ids, tenant = self.response_ids, self.caller.tenant
        masses = tuple(mass for chunk in self.chunks for mass in chunk.kept_mass)
        answer = self.parser.answer()
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
            messages=self.conversation.messages[self.shared_messages :],
            answer=answer,
            finish=finish,
            sampling=self.conversation.sampling,
            chain=extend_chain(tenant.hmac_key, self.place.chain, answer),
            kept_mass=masses if any(mass is not None for mass in masses) else None,
            parent_id=self.parent_id,
            shared_len=len(self.past),
            shared_messages=self.shared_messages,
            fork_reason=self.place.fork_reason,
            session_rule=self.place.rule,
            client_session_id=self.conversation.session_id,
            subject=self.conversation.end_user,
            api_key_id=self.caller.api_key_id,
            tools=self.conversation.tools,
            no_lesson=self._why_no_lesson(finish),
            retrievable=self.conversation.store is not False,
            duration_s=duration_s,
            first_token_s=self.first_token_s,
        )

    def head(self, turn: Turn) -> Head:
        """Where the conversation stands after `turn`."""
        assert self.place is not None
        key, messages = self.caller.tenant.hmac_key, (*self.conversation.messages, turn.answer)
        return Head(
            turn_id=turn.turn_id,
            session_id=turn.session_id,
            policy_id=turn.policy_id,
            ids=self.past + turn.prompt_ids + turn.response_ids,
            n_messages=len(messages),
            chain=turn.chain,
            thoughts=thoughts_of(key, messages) if turn.answer.reasoning else self.place.thoughts,
            tools=self.place.tools,
            recorded=self.kept,
        )

    def _why_no_lesson(self, finish: Finish) -> str | None:
        if finish in (Finish.ABORTED, Finish.ERROR):
            return str(finish)
        if self.conversation.train is False:
            return "x-train"
        if self.conversation.store is False and self.caller.tenant.unstored != "learn":
            return "store"
        return "side" if self.conversation.side else None
