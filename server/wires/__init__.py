"""The wires: each turns one protocol's requests into Conversations, and the core's events into its answers."""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import BaseRoute

from agent_rl.settings import GatewaySettings
from server.auth import Door
from server.core import Core
from server.wires import chat, messages, responses

WIRES: dict[str, Callable[[Core, Door, GatewaySettings], list[BaseRoute]]] = {
    "chat": chat.routes,
    "messages": messages.routes,
    "responses": responses.routes,
}
