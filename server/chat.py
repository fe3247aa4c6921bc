"""A terminal chat that is an ordinary client of the server, and says when the model behind it changes.

/good, /bad [what was wrong]   feedback on the last answer
/new                           a new conversation
/quit                          or Ctrl-D
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from openai import APIError, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.markup import escape

from agent_rl.settings import Settings
from server.launch import base_url

POLL_S = 2.0


@dataclass(slots=True)
class Talk:
    """One terminal's conversation: what was said, the last answer's id, the release that gave it."""

    client: OpenAI
    policy: str
    console: Console
    messages: list[ChatCompletionMessageParam] = field(default_factory=list)
    turn_id: str | None = None
    release: str | None = None

    def ask(self, text: str) -> None:
        """Send a message, print the answer as it comes; a failed request leaves the conversation as it was."""
        messages: list[ChatCompletionMessageParam] = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        response = self.client.chat.completions.with_raw_response.create(
            model=self.policy, messages=messages, stream=True
        )
        self.notice(response.headers["x-policy-version"])
        self.turn_id = response.headers["x-turn-id"]
        for chunk in response.parse():
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                answer += piece
                self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        self.console.print()
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def notice(self, release: str) -> None:
        if self.release not in (None, release):
            self.console.print(f"[bold green]the model has changed: {escape(release)}[/bold green]")
        self.release = release

    def watch(self) -> None:
        """Say when a new release serves, as it lands; asked of the server by its list of models."""
        while True:
            time.sleep(POLL_S)
            try:
                model = self.client.models.retrieve(self.policy)
            except APIError:
                continue  # what is wrong with the server, the next message will say
            self.notice(str((model.model_extra or {}).get("release", self.release)))

    def rate(self, value: float, comment: str) -> None:
        if self.turn_id is None:
            self.console.print("there is no answer to rate yet")
            return
        body = {"turn_id": self.turn_id, "value": value, "comment": comment or None}
        self.client.post("/feedback", body=body, cast_to=object)
        self.console.print("[dim]noted[/dim]")


def run(settings: Settings, policy: str, console: Console) -> None:
    """Read lines until Ctrl-D."""
    key = (settings.home / "key").read_text().strip()
    talk = Talk(OpenAI(base_url=f"{base_url(settings)}/v1", api_key=key), policy, console)
    console.print(f"[dim]talking to {policy} at {base_url(settings)}; /good, /bad \\[why], /new, /quit[/dim]")
    threading.Thread(target=talk.watch, daemon=True).start()
    while True:
        try:
            line = console.input("[bold]you>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        try:
            match command:
                case "":
                    continue
                case "/quit":
                    return
                case "/new":
                    talk.messages, talk.turn_id = [], None
                case "/good":
                    talk.rate(1.0, rest)
                case "/bad":
                    talk.rate(-1.0, rest)
                case _:
                    talk.ask(line)
        except APIError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
