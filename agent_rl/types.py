"""The nouns: what happened, what it teaches, when the lesson ships.

Everything here is frozen and made of the standard library alone. An array field says its length in a comment;
the letters mean:

    P   prompt tokens that this turn adds beyond what it shares with its parent
    R   response tokens, exactly as they were sampled
    M   messages that this turn adds beyond what it shares with its parent

`None` is never `0`: a missing logprob, score or reward is None, and whoever needs it drops the sample by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

Json = dict[str, object]


# ---------------------------------------------------------------------------------------------- conversations


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant made; `arguments` is the JSON text exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One neutral message, whatever wire it came over.

    >>> Message("user", "What is tea?")
    Message(role='user', content='What is tea?', name=None, tool_calls=(), tool_call_id=None, reasoning=None)
    """

    role: str  # system | user | assistant | tool
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, in the words of the engine protocol."""

    kind: str  # json_schema | structural_tag | regex
    text: str  # a JSON schema, a structural tag as xgrammar has them, a regular expression


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is sampled; recorded as it was used, never as it was asked."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: no cut
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Grammar | None = None

    @property
    def truncates(self) -> bool:
        """True where top-p, top-k or min-p cut the distribution, so that tokens carry a kept mass below 1."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def ratio_free(self) -> bool:
        """True where the sampled tokens have no behaviour logprob: greedy or penalised sampling."""
        return self.temperature == 0.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request after its wire has parsed it: what is asked, of which policy, by whom, in which session."""

    policy: str
    messages: tuple[Message, ...]
    sampling: Sampling
    tools: tuple[Json, ...] = ()  # as OpenAI's chat completions: {"type": "function", "function": {name, parameters …}}
    tool_choice: str = "auto"  # auto | none | required | =NAME: this tool and no other
    parallel_tool_calls: bool = True
    session_id: str | None = None  # the client's own id, if it sent one
    session_rule: str | None = None  # which rule found that id, e.g. "x-session-id"
    end_user: str | None = None  # `user` or `safety_identifier`: narrows prefix matching, names the subject
    train: bool | None = None  # X-Train / metadata.train; None: the tenant's policy decides
    store: bool | None = None  # the wire's own `store`; what False means is the tenant's policy
    side: bool = False  # a title, a summary, a warm-up: recorded and marked, no lesson by itself
    retry_key: str | None = None  # equal for a request and its retries
    retry: bool = False  # said to be one: what its first try is answered is answered again, never sampled twice


# ------------------------------------------------------------------------------------------------------ turns


class Finish(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORTED = "aborted"  # the client hung up, or the engine gave the request up
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start:end` of a response were sampled by `release`; `kv_mixed` if an in-place swap fell inside."""

    release: str
    start: int
    end: int
    kv_mixed: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered request, exactly as it was sampled. Each token of a conversation is stored once.

    The full prompt is `parent.prompt + parent.response`, cut at `shared_len`, then `prompt_ids`. Likewise the
    full list of messages is the parent's (its answer included), cut at `shared_messages`, then `messages`.

    >>> first = turn(prompt_ids=(1, 9, 2), response_ids=(5, 2))                     # parent_id None, shared_len 0
    >>> second = turn(parent_id=first.turn_id, shared_len=5, prompt_ids=(1, 7, 2))  # 1 9 2 5 2 | 1 7 2
    """

    turn_id: str
    session_id: str
    tenant_id: str
    policy_id: str
    created_at: float  # unix seconds
    prompt_ids: tuple[int, ...]  # [P]
    response_ids: tuple[int, ...]  # [R]
    behavior_logprobs: tuple[float | None, ...]  # [R] log softmax(logits / T)[token], full vocabulary; None: ratio-free
    spans: tuple[Span, ...]  # cover 0:R without gaps
    messages: tuple[Message, ...]  # [M]
    answer: Message
    finish: Finish
    sampling: Sampling
    chain: str  # keyed hash of all messages, answer included: what a continuation of this turn is found by
    kept_mass: tuple[float | None, ...] | None = None  # [R] mass kept by top-p/top-k/min-p; None where nothing was cut
    parent_id: str | None = None
    shared_len: int = 0
    shared_messages: int = 0
    fork_reason: str | None = (
        None  # why this turn shares less than everything with its session's past; None: it extends
    )
    session_rule: str = "new"
    client_session_id: str | None = None  # as the client calls its session
    subject: str | None = None  # tenant-scoped end user; None: the key stands for one
    api_key_id: str | None = None
    tools: tuple[Json, ...] = ()
    no_lesson: str | None = None  # why this turn can never be one: "aborted", "x-train", "side", …
    retrievable: bool = True  # False: its content is never given back by id (`store: false`)
    duration_s: float | None = None
    first_token_s: float | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody says of an answer outside the conversation. An upsert by id; `retracted` takes it back."""

    feedback_id: str
    tenant_id: str
    created_at: float
    turn_id: str | None = None
    session_id: str | None = None
    name: str = "feedback"
    value: float | None = None  # in [-1, 1]
    label: str | None = None
    comment: str | None = None  # privileged context for the teacher view
    correction: str | None = None  # a demonstration
    source: str = "user"
    retracted: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """One journal record on its way to SQL."""

    journal_id: str
    seq: int  # 1, 2, 3 … within its journal, without gaps
    body: Turn | Feedback


@dataclass(frozen=True, slots=True)
class Transcript:
    """A turn with its past put together again: full ids and messages of the whole conversation."""

    turn: Turn
    prompt_ids: tuple[int, ...]  # all of them, from the first
    messages: tuple[Message, ...]  # all of the request's, without `turn.answer`


# ---------------------------------------------------------------------------------------------------- lessons


@dataclass(frozen=True, slots=True)
class Evidence:
    """A turn and everything that followed it up to `revision`."""

    transcript: Transcript
    revision: int
    followed_by: tuple[Message, ...]  # what the next turn added: the user's reply, tool results; () if none yet
    feedback: tuple[Feedback, ...]
    standing: tuple[str, ...]  # what this subject asked before and has not taken back, oldest first


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the follow-up says about the answer. `score` None: it does not say."""

    turn_id: str
    revision: int
    source: str  # rules | model | feedback | environment
    score: int | None  # -1, 0, +1
    hint: str | None = None  # the part of the follow-up that tells how to do better
    related: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Lesson:
    """The unit of exactly-once: one fresh use per policy lineage, any number of counted replays."""

    lesson_id: str
    policy_id: str
    turn_id: str
    revision: int
    method: str
    verdict: Verdict
    evidence: Evidence
    attempts: int = 0


class DropReason(StrEnum):
    """Why a lesson is not trained on; every drop is counted under one of these."""

    NO_HINDSIGHT = "no_hindsight"  # nothing that followed tells how to do better
    TEACHER_CANNOT = "teacher_cannot"  # the teacher's own re-answer does not do what was asked
    WEAK_SIGNAL = "weak_signal"  # teacher and student agree
    TOO_LONG = "too_long"
    EMPTY_RESPONSE = "empty_response"
    STALE = "stale"  # sampled by a release too far behind the head
    NO_LOGPROBS = "no_logprobs"  # the method needs behaviour logprobs and the turn has none
    NOT_FINITE = "not_finite"
    SUPERSEDED = "superseded"  # newer evidence made another revision of the same lesson
    RETRACTED = "retracted"
    CUT_OFF = "cut_off"  # every branch that used it was cut off, as often as is allowed


# --------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class TeacherView:
    """The privileged prompt under which the same response ids are scored again. Never holds the scored answer."""

    messages: tuple[Message, ...]
    template: str  # which hindsight template made it, and its version: "hint/2"


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to learn on, under the prompt it was sampled with and under the teacher's.

    >>> s = sample(prompt_ids=(1, 2), teacher_prompt_ids=(1, 8, 2), response_ids=(4, 5))
    >>> s.response_mask
    (True, True)
    """

    lesson_id: str
    turn_id: str
    prompt_ids: tuple[int, ...]  # [P]
    response_ids: tuple[int, ...]  # [R]
    teacher_prompt_ids: tuple[int, ...]  # [Q]
    response_mask: tuple[bool, ...]  # [R] False: context only, no loss
    behavior_logprobs: tuple[float | None, ...]  # [R]
    temperature: float
    score: int | None = None
    weight: float = 1.0
    replay: bool = False
    by_teacher: bool = False  # the response is the teacher's own answer under its view, and no turn of the student's


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step did; one row in `steps`."""

    step: int  # counted from the policy's birth
    method: str
    lesson_ids: tuple[str, ...]
    replay_ids: tuple[str, ...]
    tokens: int  # response tokens with a loss
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    values: dict[str, float] = field(default_factory=dict)  # everything else, by name


# --------------------------------------------------------------------------------------------------- releases


@dataclass(frozen=True, slots=True)
class Policy:
    """A base plus a lineage of checkpoints. `head` None: the base itself."""

    policy_id: str
    tenant_id: str
    name: str
    base_hash: str
    head: str | None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to move a policy's head, fenced: a commit under an older epoch changes nothing."""

    policy_id: str
    owner: str
    epoch: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A resumable state of training; `checkpoint_id` is the hash of its folder's content."""

    checkpoint_id: str
    policy_id: str
    parent_id: str | None
    step: int  # optimizer steps since the policy's birth
    path: str
    method: str
    created_at: float


class ReleaseState(StrEnum):
    STAGED = "staged"
    EXAMINING = "examining"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"
    ROLLED_BACK = "rolled_back"


BASE_RELEASE = "base"  # the policy's untouched base: what serves before the first release, and after the last rollback


@dataclass(frozen=True, slots=True)
class Release:
    """The serving artefact of a checkpoint: an adapter (served by versioned name) or full weights."""

    release_id: str
    policy_id: str
    checkpoint_id: str
    kind: str  # adapter | full
    path: str
    base_hash: str
    checksum: str
    tokenizer_hash: str
    state: ReleaseState
    created_at: float
    step: int
    reasons: tuple[str, ...] = ()  # why it was rejected or rolled back


@dataclass(frozen=True, slots=True)
class Deployment:
    """Desired state of serving for one policy; promotion is one row."""

    policy_id: str
    live: str  # release id, or BASE_RELEASE
    generation: int
    canary: str | None = None
    canary_share: float = 0.0


@dataclass(frozen=True, slots=True)
class ExamReport:
    """What an exam measured and what it decided, with the reasons in words."""

    release_id: str
    passed: bool
    reasons: tuple[str, ...]
    values: dict[str, float]
    samples: tuple[tuple[str, str], ...]  # (probe, answer)
    seconds: float
