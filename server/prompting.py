"""From a conversation to what the engine is given: its session, its prompt, its grammar, its release."""

from __future__ import annotations

from dataclasses import replace

from agent_rl.rendering import Renderer, RenderError, common_prefix
from agent_rl.settings import GatewaySettings
from agent_rl.types import Conversation, Grammar
from server.answering import Answering
from server.auth import Caller
from server.directory import Directory
from server.refusal import Refusal
from server.sessions import Place, Sessions


class Prompter:
    def __init__(self, settings: GatewaySettings, renderer: Renderer, directory: Directory, sessions: Sessions) -> None:
        self._settings, self._renderer, self._directory, self._sessions = settings, renderer, directory, sessions

    async def prepare(self, answering: Answering, max_context: int) -> None:
        """Everything that sampling needs. Raises Refusal."""
        conversation, caller = _offered(answering.conversation), answering.caller
        answering.conversation = conversation
        subject = conversation.end_user or caller.api_key_id
        policy = await self._directory.policy(caller.tenant, conversation.policy, subject)
        place = await self._sessions.place(conversation, caller.tenant, caller.api_key_id, policy.policy_id)
        try:
            self._prompt(answering, place)
            grammar = self._grammar(conversation)
        except RenderError as error:
            raise Refusal(400, str(error), code="invalid_value", param="messages") from error
        room = self._room(answering.prompt_tokens, max_context)
        most = min(conversation.sampling.max_tokens, room)
        sampling = replace(conversation.sampling, max_tokens=most, grammar=grammar)
        answering.conversation = replace(conversation, sampling=sampling)
        answering.policy = policy
        answering.parser = self._renderer.parser(
            sampling.stop, tools=conversation.tools, prompt_ids=answering.past + answering.prompt_ids
        )
        answering.release = await self._directory.release(policy.policy_id, place.session_id)

    def _prompt(self, answering: Answering, place: Place) -> None:
        """Place and prompt: the sampled ids of the parent, extended; else everything rendered, sharing with the parent,
        or with the session's newest turn, what happens to be equal. A parent that was not recorded is shared with
        nobody: the turn then holds all of its prompt."""
        conversation, parent = answering.conversation, place.parent
        like, tail = parent or place.relative, None
        if parent and place.extends:
            tail = self._renderer.bridge(parent.ids, conversation.messages[parent.n_messages :], conversation.tools)
        if parent and tail is not None:
            past, new = parent.ids, tail
        else:
            ids = self._rendered(conversation)
            shared = common_prefix(like.ids, ids) if like else 0
            past, new = ids[:shared], ids[shared:]
            if parent:
                place = replace(place, fork_reason=place.fork_reason or "no_bridge")
        if like and not like.recorded:
            past, new, like, parent = (), past + new, None, None
            place = replace(place, fork_reason=place.fork_reason or "unrecorded")
        answering.place, answering.past, answering.prompt_ids = place, past, new
        answering.parent_id = like.turn_id if like else None
        answering.shared_messages = parent.n_messages if parent else 0

    async def count(self, conversation: Conversation, caller: Caller) -> int:
        """Length of the whole prompt, rendered anew. Raises Refusal."""
        await self._directory.policy(caller.tenant, conversation.policy, None)
        try:
            return len(self._rendered(_offered(conversation)))
        except RenderError as error:
            raise Refusal(400, str(error), code="invalid_value", param="messages") from error

    def _rendered(self, conversation: Conversation) -> tuple[int, ...]:
        return self._renderer.render(conversation.messages, conversation.tools)

    def _grammar(self, conversation: Conversation) -> Grammar | None:
        """What the answer must look like: the schema that was asked for, or calls of the tools that must be called."""
        offered, choice, asked = conversation.tools, conversation.tool_choice, conversation.sampling.grammar
        if asked and offered:
            complaint = "a response format and tools that may be called exclude each other; set tool_choice to 'none'"
            raise Refusal(400, complaint, code="unsupported_value", param="tool_choice")
        if asked or choice in ("auto", "none"):
            return asked
        if not offered:
            raise Refusal(400, f"tool_choice {choice!r} needs tools", code="invalid_value", param="tool_choice")
        return self._renderer.tool_grammar(offered, choice, conversation.parallel_tool_calls)

    def _room(self, prompt_tokens: int, max_context: int) -> int:
        """Tokens left for the answer. Raises Refusal where the prompt is too long."""
        limit = min(self._settings.max_prompt_tokens, max_context - 1)
        if prompt_tokens > limit:
            raise Refusal(
                400,
                f"the prompt is too long: {prompt_tokens} tokens > {limit}, the limit here (context: {max_context})",
                code="context_length_exceeded",
                param="messages",
            )
        return max_context - prompt_tokens


def _offered(conversation: Conversation) -> Conversation:
    """With the tools that the model sees: none where it may call none."""
    return replace(conversation, tools=()) if conversation.tool_choice == "none" else conversation
