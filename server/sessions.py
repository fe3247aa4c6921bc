"""Which conversation a request belongs to, and which turn of ours it continues.

A conversation is known by its *chain*: a keyed hash over a scope and all messages so far, one link per message. The
scope is the client's own session where it names one, else (API key, end user), and the policy and tools in both cases;
so nothing is ever found across them. A request is matched at its longest beginning that ends with an answer of ours.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from agent_rl.experience.store import Store, StoreUnavailable, Tenant
from agent_rl.experience.stream import Head, Stream, StreamUnavailable
from agent_rl.types import Conversation, Message

LOOKUP_S = 0.25  # for Redis and SQL together; an answer is worth more than its past
DEEPEST_IN_REDIS = 64  # beginnings of a request that are looked for
DEEPEST_IN_SQL = 4
log = logging.getLogger("agent_rl.gateway")
OURS = "ses_"  # how the ids of sessions begin that no client named


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands.

    `fork_reason`: None (it continues `parent`) · first (it holds no earlier answer) · altered (it holds answers, none
    of them ours in this scope) · ambiguous (several conversations of ours begin so) · lost (what knows could not be
    asked) · no_bridge (set by the core: the parent is known, its ids could not be extended).
    """

    session_id: str
    rule: str
    scope: str
    chain: str  # of all the request's messages
    parent: Head | None
    fork_reason: str | None


class Sessions:
    def __init__(self, store: Store, stream: Stream, capacity: int) -> None:
        self._store, self._stream, self._capacity = store, stream, capacity
        self._heads: OrderedDict[str, tuple[Head, ...]] = OrderedDict()  # by chain, oldest first

    async def place(self, conversation: Conversation, tenant: Tenant, api_key_id: str | None, policy_id: str) -> Place:
        """Never fails: what cannot be found is a fork with its reason."""
        own_id = conversation.session_id
        session_id = derive_session_id(tenant.tenant_id, api_key_id, conversation.end_user, own_id) if own_id else None
        scope = scope_of(conversation, tenant, api_key_id, policy_id, session_id)
        chains = chains_of(tenant.hmac_key, scope, conversation.messages)
        answered = [c for c, m in zip(chains, conversation.messages, strict=True) if m.role == "assistant"][::-1]
        heads, lost = await self._find(tenant.tenant_id, scope, answered) if answered else ((), False)
        parent = heads[-1] if len({(head.session_id, head.ids) for head in heads}) == 1 else None
        if parent:
            reason = None
        elif heads:
            reason = "ambiguous"
        else:
            reason = "lost" if lost else "altered" if answered else "first"
        if session_id:
            rule = conversation.session_rule or "x-session-id"
        else:
            session_id, rule = (parent.session_id, "prefix") if parent else (OURS + secrets.token_hex(16), "new")
        return Place(session_id, rule, scope, chains[-1], parent, reason)

    def remember(self, head: Head) -> None:
        """The newest turn of a conversation; the oldest one known is forgotten."""
        self._heads[head.chain] = (*self._heads.pop(head.chain, ()), head)[-4:]
        while len(self._heads) > self._capacity:
            self._heads.popitem(last=False)

    async def _find(self, tenant_id: str, scope: str, chains: Sequence[str]) -> tuple[tuple[Head, ...], bool]:
        """Heads at the first chain that anybody knows; whether somebody who might know could not be asked."""
        here = next((at for at, chain in enumerate(chains) if chain in self._heads), len(chains))
        lost = False
        if here > 0:
            try:
                async with asyncio.timeout(LOOKUP_S):
                    if elsewhere := await self._elsewhere(tenant_id, scope, chains[:here]):
                        return elsewhere, False
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("a conversation's past could not be looked up: %r", error)
                lost = True
        return (self._heads[chains[here]] if here < len(chains) else ()), lost

    async def _elsewhere(self, tenant_id: str, scope: str, chains: Sequence[str]) -> tuple[Head, ...]:
        try:
            if heads := await self._stream.heads(scope, chains[:DEEPEST_IN_REDIS]):
                return tuple(heads)
        except StreamUnavailable as error:  # SQL has everything that Redis has, a little later
            log.warning("Redis could not be asked for a conversation's past: %r", error)
        for chain in chains[:DEEPEST_IN_SQL]:
            if found := await self._store.find_chain(tenant_id, chain):
                return await self._recorded([turn_id for turn_id, _ in found], chain)
        return ()

    async def _recorded(self, turn_ids: Iterable[str], chain: str) -> tuple[Head, ...]:
        transcripts = [await self._store.transcript(turn_id) for turn_id in turn_ids]
        return tuple(
            Head(
                turn_id=t.turn.turn_id,
                session_id=t.turn.session_id,
                policy_id=t.turn.policy_id,
                ids=t.prompt_ids + t.turn.response_ids,
                n_messages=len(t.messages) + 1,
                chain=chain,
            )
            for t in sorted(filter(None, transcripts), key=lambda t: t.turn.created_at)
        )


def derive_session_id(tenant_id: str, api_key_id: str | None, end_user: str | None, own_id: str) -> str:
    """Ours, from the client's: two keys that send the same id have two sessions."""
    return hashlib.sha256(orjson.dumps([tenant_id, api_key_id, end_user, own_id])).hexdigest()[:32]


def scope_of(
    conversation: Conversation, tenant: Tenant, api_key_id: str | None, policy_id: str, session_id: str | None
) -> str:
    """Within what a conversation is looked for, hashed under the tenant's key."""
    where = [session_id] if session_id else [api_key_id, conversation.end_user]
    parts = [tenant.tenant_id, *where, policy_id, list(conversation.tools)]
    return hmac.digest(tenant.hmac_key, orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), "sha256").hex()


def chains_of(key: bytes, scope: str, messages: Iterable[Message]) -> list[str]:
    """The chain after each message."""
    chains, chain = [], scope
    for message in messages:
        chain = extend_chain(key, chain, message)
        chains.append(chain)
    return chains


def extend_chain(key: bytes, chain: str, message: Message) -> str:
    """One link. White space around a content and the reasoning do not count: clients trim both."""
    calls = [[call.name, call.arguments] for call in message.tool_calls]
    parts = [message.role, message.content.strip(), message.name, message.tool_call_id, calls]
    return hmac.digest(key, chain.encode() + orjson.dumps(parts), "sha256").hex()
