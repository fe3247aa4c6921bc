"""Which conversation a request belongs to, and which turn of ours it continues.

A conversation is known by its *chain*: a keyed hash over a scope and all messages so far, one link per message. The
scope is the client's own session where it names one, else (API key, end user), and the policy in both cases; so nothing
is ever found across them. A request is matched at its longest beginning that ends with an answer of ours.

What counts as the same message: white space around a content, the spelling of a tool call's JSON and the ids of calls
do not matter, since the ids that were sampled stay as they are. Anything else is an alteration, and so a fork. Many
clients never send reasoning back, so it is no part of the chain but has a hash of its own: an answer that comes back
with other reasoning than was sampled is a fork too.

Two requests on one session at once are both answered. If they continue the same turn, both are its children. One that
repeats an answer which is still running cannot know that turn yet: it is a fork.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import orjson

from agent_rl.experience.store import Store, StoreUnavailable, Tenant
from agent_rl.experience.stream import Head, Stream, StreamUnavailable
from agent_rl.types import Conversation, Json, Message, ToolCall

LOOKUP_S = 0.25  # for Redis and SQL together; an answer is worth more than its past
DEEPEST_IN_REDIS = 64  # beginnings of a request that are looked for
DEEPEST_IN_SQL = 4
log = logging.getLogger("agent_rl.gateway")
OURS = "ses_"  # how the ids of sessions begin that no client named


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands.

    `fork_reason`: None (it goes on behind `parent`'s answer) · first (it holds no earlier answer) · altered (it holds
    answers that are none of ours, behind `parent` if there is one) · thinking_stripped, tools_changed (of `parent`'s) ·
    ambiguous (several conversations of ours begin so) · lost (what knows could not be asked) · set when the prompt is
    made: no_bridge (the parent is known, its ids could not be extended), unrecorded (they were, but nobody keeps them).

    `relative` is the session's newest turn, where there is no parent: their prompts may begin alike.
    """

    session_id: str
    rule: str
    scope: str
    chain: str  # of all the request's messages
    thoughts: str  # of their reasoning
    tools: str
    parent: Head | None
    fork_reason: str | None
    relative: Head | None = None

    @property
    def extends(self) -> bool:
        """Whether the ids of `parent` are to be extended as they are."""
        return self.parent is not None and self.fork_reason in (None, "altered")


class Sessions:
    def __init__(self, store: Store, stream: Stream, capacity: int) -> None:
        self._store, self._stream, self._capacity = store, stream, capacity
        self._heads: OrderedDict[str, tuple[Head, ...]] = OrderedDict()  # by chain, oldest first
        self._newest: OrderedDict[str, Head] = OrderedDict()  # by session

    async def place(self, conversation: Conversation, tenant: Tenant, api_key_id: str | None, policy_id: str) -> Place:
        """Never fails: what cannot be found is a fork with its reason."""
        own_id, messages = conversation.session_id, conversation.messages
        ours = own_id if own_id and own_id.startswith(OURS) else None  # given back: it is where it is found again
        own_id = None if ours else own_id
        session_id = derive_session_id(tenant.tenant_id, api_key_id, conversation.end_user, own_id) if own_id else None
        scope = scope_of(conversation, tenant, api_key_id, policy_id, session_id)
        key = tenant.hmac_key
        chains = chains_of(key, scope, messages)
        answered = [c for c, m in zip(chains, messages, strict=True) if m.role == "assistant"][::-1]
        heads, lost = await self._find(tenant, scope, answered, own_id is None) if answered else ((), False)
        heads = tuple(head for head in heads if head.session_id == ours) if ours else heads
        parent = heads[-1] if len({(head.session_id, head.ids) for head in heads}) == 1 else None
        thoughts, tools = thoughts_of(key, messages), tools_mark(key, conversation.tools)
        if session_id:
            rule = conversation.session_rule or "x-session-id"
        else:
            rule = conversation.session_rule if ours and conversation.session_rule else "prefix"
            session_id, rule = (parent.session_id, rule) if parent else (OURS + secrets.token_hex(16), "new")
        if parent:
            reason = _changed(parent, messages, thoughts_of(key, messages[: parent.n_messages]), tools)
        elif heads:
            reason = "ambiguous"
        else:
            reason = "lost" if lost else "altered" if answered else "first"
        relative = None if parent else self._newest.get(session_id)
        return Place(session_id, rule, scope, chains[-1], thoughts, tools, parent, reason, relative)

    def remember(self, head: Head) -> None:
        """The newest turn of a conversation; the oldest one known is forgotten."""
        self._heads[head.chain] = (*self._heads.pop(head.chain, ()), head)[-4:]
        self._newest.pop(head.session_id, None)
        self._newest[head.session_id] = head
        for known in (self._heads, self._newest):
            while len(known) > self._capacity:
                known.popitem(last=False)

    def forget(self, session_ids: Collection[str]) -> None:
        """Nothing of these sessions is found here any more."""
        for chain, heads in list(self._heads.items()):
            kept = tuple(head for head in heads if head.session_id not in session_ids)
            if kept:
                self._heads[chain] = kept
            else:
                del self._heads[chain]
        for session_id in session_ids:
            self._newest.pop(session_id, None)

    async def _find(
        self, tenant: Tenant, scope: str, chains: Sequence[str], shared: bool
    ) -> tuple[tuple[Head, ...], bool]:
        """Heads at the first chain that anybody knows; whether somebody who might know could not be asked.

        `shared`: strangers may hold conversations in this scope, so that what another gateway knows of the same chain
        decides whether a match is unique.
        """
        here = next((at for at, chain in enumerate(chains) if chain in self._heads), len(chains))
        ours = self._heads[chains[here]] if here < len(chains) else ()
        unsure = chains[: here + 1] if shared else chains[:here]
        if unsure:
            try:
                async with asyncio.timeout(LOOKUP_S):
                    elsewhere = await self._elsewhere(tenant, scope, unsure)
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("a conversation's past could not be looked up: %r", error)
                return ours, True
            if elsewhere and ours and elsewhere[0].chain == ours[0].chain:
                return (*(head for head in elsewhere if head not in ours), *ours), False
            return elsewhere or ours, False
        return ours, False

    async def _elsewhere(self, tenant: Tenant, scope: str, chains: Sequence[str]) -> tuple[Head, ...]:
        try:
            if heads := await self._stream.heads(scope, chains[:DEEPEST_IN_REDIS]):
                return tuple(heads)
        except StreamUnavailable as error:  # SQL has everything that Redis has, a little later
            log.warning("Redis could not be asked for a conversation's past: %r", error)
        for chain in chains[:DEEPEST_IN_SQL]:
            if found := await self._store.find_chain(tenant.tenant_id, chain):
                return await self._recorded([turn_id for turn_id, _ in found], chain, tenant.hmac_key)
        return ()

    async def _recorded(self, turn_ids: Iterable[str], chain: str, key: bytes) -> tuple[Head, ...]:
        transcripts = [await self._store.transcript(turn_id) for turn_id in turn_ids]
        return tuple(
            Head(
                turn_id=t.turn.turn_id,
                session_id=t.turn.session_id,
                policy_id=t.turn.policy_id,
                ids=t.prompt_ids + t.turn.response_ids,
                n_messages=len(t.messages) + 1,
                chain=chain,
                thoughts=thoughts_of(key, (*t.messages, t.turn.answer)),
                tools=tools_mark(key, t.turn.tools),
            )
            for t in sorted(filter(None, transcripts), key=lambda t: t.turn.created_at)
        )


def _changed(parent: Head, messages: Sequence[Message], thoughts: str, tools: str) -> str | None:
    """Why a request that holds all of `parent`'s messages does not simply go on behind them."""
    if tools != parent.tools:
        return "tools_changed"
    if thoughts != parent.thoughts:
        return "thinking_stripped"
    return "altered" if any(m.role == "assistant" for m in messages[parent.n_messages :]) else None


def derive_session_id(tenant_id: str, api_key_id: str | None, end_user: str | None, own_id: str) -> str:
    """Ours, from the client's: two keys that send the same id have two sessions."""
    return hashlib.sha256(orjson.dumps([tenant_id, api_key_id, end_user, own_id])).hexdigest()[:32]


def scope_of(
    conversation: Conversation, tenant: Tenant, api_key_id: str | None, policy_id: str, session_id: str | None
) -> str:
    """Within what a conversation is looked for, hashed under the tenant's key."""
    where = [session_id] if session_id else [api_key_id, conversation.end_user]
    parts = [tenant.tenant_id, *where, policy_id]
    return hmac.digest(tenant.hmac_key, orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), "sha256").hex()


def chains_of(key: bytes, scope: str, messages: Iterable[Message]) -> list[str]:
    """The chain after each message."""
    chains, chain = [], scope
    for message in messages:
        chain = extend_chain(key, chain, message)
        chains.append(chain)
    return chains


def extend_chain(key: bytes, chain: str, message: Message) -> str:
    """One link."""
    calls = [[call.name, _spelled(call)] for call in message.tool_calls]
    parts = [message.role, message.content.strip(), message.name, message.tool_call_id is not None, calls]
    return hmac.digest(key, chain.encode() + orjson.dumps(parts), "sha256").hex()


def _spelled(call: ToolCall) -> str:
    """The arguments in one spelling of their JSON, or as they are where they are none."""
    try:
        return orjson.dumps(orjson.loads(call.arguments), option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONDecodeError:
        return call.arguments


def thoughts_of(key: bytes, messages: Iterable[Message]) -> str:
    """Of all reasoning, by message; messages without any count as none."""
    thoughts = [[at, m.reasoning.strip()] for at, m in enumerate(messages) if m.reasoning and m.reasoning.strip()]
    return hmac.digest(key, orjson.dumps(thoughts), "sha256").hex() if thoughts else ""


def tools_mark(key: bytes, tools: Sequence[Json]) -> str:
    return hmac.digest(key, orjson.dumps(list(tools), option=orjson.OPT_SORT_KEYS), "sha256").hex() if tools else ""
