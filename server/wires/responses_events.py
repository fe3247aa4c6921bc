"""What a response looks like: the object, its items, and the typed events that build it up."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import orjson

from agent_rl.parsing import CallDelta
from agent_rl.types import Finish, Json, Message, ToolCall
from server.answering import Delta, Ended, Started
from server.wires.responses_request import Asked, ToolNames

# Fields of the request that the response repeats, and what they are where it has none
REPEATED: tuple[tuple[str, object], ...] = (
    ("instructions", None),
    ("max_output_tokens", None),
    ("metadata", {}),
    ("parallel_tool_calls", True),
    ("previous_response_id", None),
    ("reasoning", {"effort": None, "summary": None}),
    ("store", True),
    ("temperature", 1.0),
    ("text", {"format": {"type": "text"}}),
    ("tool_choice", "auto"),
    ("tools", []),
    ("top_p", 1.0),
    ("truncation", "disabled"),
    ("user", None),
)


def response_id(turn_id: str) -> str:
    return f"resp_{turn_id}"


def turn_id_of(response: str) -> str:
    return response.removeprefix("resp_")


def response_body(
    turn_id: str, created_at: float, asked: Asked, status: str, output: list[Json], ended: Ended | None = None
) -> Json:
    body: Json = {
        "id": response_id(turn_id),
        "object": "response",
        "created_at": int(created_at),
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": asked.conversation.policy,
        "output": output,
        "usage": usage_of(ended) if ended else None,
    }
    for name, default in REPEATED:
        value = asked.body.get(name)
        body[name] = default if value is None else value
    return body


def usage_of(ended: Ended) -> Json:
    return {
        "input_tokens": ended.prompt_tokens,
        "input_tokens_details": {"cached_tokens": ended.cached_tokens},
        "output_tokens": ended.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
        "total_tokens": ended.prompt_tokens + ended.completion_tokens,
    }


def status_of(finish: Finish) -> str:
    return "incomplete" if finish is Finish.LENGTH else "completed"


# ------------------------------------------------------------------------------------------------------- items


def items_of(
    turn_id: str, answer: Message, names: ToolNames, *, status: str = "completed", encrypted: bool = False
) -> list[Json]:
    """The finished items of an answer: reasoning, then text, then calls. `status`: of the last."""
    output: list[Json] = []
    if answer.reasoning:
        output.append(reasoning_item(turn_id, answer.reasoning, encrypted))
    if answer.content or (not output and not answer.tool_calls):
        output.append(message_item(turn_id, answer.content))
    output += [call_item(turn_id, at, call, names) for at, call in enumerate(answer.tool_calls)]
    if "status" in output[-1]:
        output[-1]["status"] = status
    return output


def reasoning_item(turn_id: str, thought: str, encrypted: bool) -> Json:
    """`encrypted_content` holds nothing secret: it is the text, for clients that give nothing else back."""
    content = [{"type": "reasoning_text", "text": thought}] if thought else []
    item: Json = {"id": f"rs_{turn_id}", "type": "reasoning", "summary": [], "content": content}
    return item | {"encrypted_content": base64.b64encode(thought.encode()).decode()} if encrypted else item


def message_item(turn_id: str, text: str, status: str = "completed") -> Json:
    content = [] if status == "in_progress" else [text_part(text)]
    return {"id": f"msg_{turn_id}", "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(turn_id: str, at: int, call: ToolCall, names: ToolNames, status: str = "completed") -> Json:
    space, name = names.spaces.get(call.name, (None, call.name))
    named: Json = {"call_id": call.id, "name": name, "status": status}
    if space is not None:
        named["namespace"] = space
    done = status != "in_progress"
    if call.name in names.custom:
        said = custom_input(call.arguments) if done else ""
        return {"id": f"ctc_{turn_id}_{at}", "type": "custom_tool_call", **named, "input": said}
    arguments = call.arguments if done else ""
    return {"id": f"fc_{turn_id}_{at}", "type": "function_call", **named, "arguments": arguments}


def custom_input(arguments: str) -> str:
    """The string that a custom tool gets; what the model wrote, where it did not keep to the form."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    said = value.get("input") if isinstance(value, dict) else None
    return said if isinstance(said, str) else arguments


# ------------------------------------------------------------------------------------------------------ events


class Builder:
    """The core's events in, typed events out, in the order that clients insist on."""

    def __init__(self, started: Started, asked: Asked) -> None:
        self._started, self._asked = started, asked
        self._turn = started.turn_id
        self._seq = 0
        self._output: list[Json] = []  # finished items
        self.ended: Ended | None = None
        self._open: str | None = None  # reasoning | message | call
        self._text = ""  # of the open item
        self._call = ToolCall("", "", "")
        self._calls = 0

    def begin(self) -> Iterator[Json]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._body("in_progress"))

    def delta(self, event: Delta) -> Iterator[Json]:
        parsed = event.parsed
        if parsed.reasoning:
            yield from self._into("reasoning")
            self._text += parsed.reasoning
            yield self._piece("response.reasoning_text.delta", delta=parsed.reasoning, content_index=0)
        if parsed.text:
            yield from self._into("message")
            self._text += parsed.text
            yield self._piece("response.output_text.delta", delta=parsed.text, content_index=0, logprobs=[])
        for call in parsed.calls:
            yield from self._calling(call)

    def end(self, ended: Ended) -> Iterator[Json]:
        """The turn is on disk, unless `ended` says otherwise."""
        self.ended = ended
        if ended.failure:
            error = {"code": ended.failure.code or "server_error", "message": ended.failure.message}
            yield self._event("response.failed", response=self._body("failed") | {"error": error})
            return
        if self._open is None and not self._output:
            yield from self._into("message")
        status = status_of(ended.finish)
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self._body(status))

    def _body(self, status: str) -> Json:
        started = self._started
        return response_body(started.turn_id, started.created_at, self._asked, status, self._output, self.ended)

    def _calling(self, delta: CallDelta) -> Iterator[Json]:
        if delta.id is not None and delta.name is not None:
            yield from self._close()
            self._call, self._open = ToolCall(delta.id, delta.name, ""), "call"
            yield self._piece("response.output_item.added", item=self._item("in_progress"))
        self._call = ToolCall(self._call.id, self._call.name, self._call.arguments + delta.arguments)
        if delta.arguments and self._call.name not in self._asked.names.custom:
            yield self._piece("response.function_call_arguments.delta", delta=delta.arguments)

    def _into(self, kind: str) -> Iterator[Json]:
        if self._open == kind:
            return
        yield from self._close()
        self._open, self._text = kind, ""
        yield self._piece("response.output_item.added", item=self._item("in_progress"))
        if kind == "message":
            yield self._piece("response.content_part.added", content_index=0, part=text_part(""))

    def _close(self, status: str = "completed") -> Iterator[Json]:
        """The open item is finished, or `incomplete`."""
        if self._open is None:
            return
        item = self._item(status)
        if self._open == "message":
            yield self._piece("response.output_text.done", content_index=0, text=self._text, logprobs=[])
            yield self._piece("response.content_part.done", content_index=0, part=text_part(self._text))
        elif self._open == "reasoning":
            yield self._piece("response.reasoning_text.done", content_index=0, text=self._text)
        elif self._call.name in self._asked.names.custom:
            said = custom_input(self._call.arguments)
            yield self._piece("response.custom_tool_call_input.delta", delta=said)
            yield self._piece("response.custom_tool_call_input.done", input=said)
        else:
            said = self._call.arguments
            yield self._piece("response.function_call_arguments.done", name=item["name"], arguments=said)
        yield self._piece("response.output_item.done", item=item)
        self._calls += self._open == "call"
        self._output.append(item)
        self._open = None

    def _item(self, status: str) -> Json:
        if self._open == "reasoning":
            return reasoning_item(self._turn, self._text, self._asked.encrypted and status != "in_progress")
        if self._open == "message":
            return message_item(self._turn, self._text, status)
        return call_item(self._turn, self._calls, self._call, self._asked.names, status)

    def _piece(self, kind: str, **fields: Any) -> Json:
        """An event of the open item."""
        item = fields.get("item") or self._item("in_progress")
        named = {} if "item" in fields else {"item_id": item["id"]}
        return self._event(kind, output_index=len(self._output), **named, **fields)

    def _event(self, kind: str, **fields: Any) -> Json:
        self._seq += 1
        return {"type": kind, "sequence_number": self._seq - 1, **fields}
