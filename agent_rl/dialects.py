"""How a model writes tool calls into its answers: two dialects, told apart by the chat template.

    hermes   <tool_call>\\n{"name": "look", "arguments": {"at": 1}}\\n</tool_call>   Qwen, Hermes, SmolLM, most others
    llama    {"name": "look", "parameters": {"at": 1}}                           Llama 3: the whole answer is a call

A template that ignores tools gets them written in hermes by `spell_out`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent_rl.types import Grammar, Json, Message, ToolCall


@dataclass(frozen=True, slots=True)
class Dialect:
    name: str
    opening: str  # "": a call is the whole answer
    closing: str
    arguments: str  # what it calls the arguments

    def begin(self, tool: str) -> str:
        """Everything before the arguments of a call of `tool`."""
        head = f'{{"name": {json.dumps(tool)}, "{self.arguments}": '
        return f"{self.opening}\n{head}" if self.opening else head

    @property
    def end(self) -> str:
        return f"}}\n{self.closing}" if self.closing else "}"


HERMES = Dialect("hermes", "<tool_call>", "</tool_call>", "arguments")
LLAMA = Dialect("llama", "", "", "parameters")


def dialect_of(template: str) -> Dialect:
    """By what the chat template writes; hermes where it says nothing of calls."""
    speaks_llama = HERMES.opening not in template and ("ipython" in template or "<|python_tag|>" in template)
    return LLAMA if speaks_llama else HERMES


def tool_grammar(dialect: Dialect, tools: Sequence[Json], choice: str, parallel: bool) -> Grammar:
    """One call or more of these tools and nothing else. `choice`: "required" or "=NAME". Raises ValueError."""
    wanted = [tool for tool in map(_function, tools) if choice in ("required", f"={tool['name']}")]
    if not wanted:
        raise ValueError(f"there is no tool {choice.removeprefix('=')!r} among {[_function(t)['name'] for t in tools]}")
    tags = [
        {
            "type": "tag",
            "begin": dialect.begin(str(tool["name"])),
            "content": {"type": "json_schema", "json_schema": tool.get("parameters") or {"type": "object"}},
            "end": dialect.end,
        }
        for tool in wanted
    ]
    form = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": not (parallel and dialect.opening),
    }
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": form}))


def _function(tool: Json) -> Json:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool must be {{'type': 'function', 'function': {{'name': …}}}}, not {tool!r:.100}")
    return function


# ------------------------------------------------------------------------------- for templates that ignore tools

INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query. Their signatures, within <tools></tools> tags:
<tools>
{tools}
</tools>

For each call, return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def spell_out(messages: Sequence[Message], tools: Sequence[Json]) -> list[Message]:
    """The same conversation for a template that knows neither tools nor calls nor results."""
    spelled: list[Message] = []
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if spelled and spelled[-1].role == "user" and spelled[-1].content.endswith("</tool_response>"):
                spelled[-1] = replace(spelled[-1], content=f"{spelled[-1].content}\n{result}")
            else:
                spelled.append(Message("user", result))
        elif message.tool_calls:
            parts = [message.content] if message.content else []
            calls = "\n".join([*parts, *map(spell_call, message.tool_calls)])
            spelled.append(replace(message, content=calls, tool_calls=()))
        else:
            spelled.append(message)
    if not tools:
        return spelled
    section = INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if spelled and spelled[0].role == "system":
        return [replace(spelled[0], content=f"{spelled[0].content}\n\n{section}"), *spelled[1:]]
    return [Message("system", section), *spelled]


def spell_call(call: ToolCall) -> str:
    return f"{HERMES.begin(call.name)}{call.arguments}{HERMES.end}"


# ------------------------------------------------------------------------------------------------ reading a call

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')


class CallReader:
    """One call as it is written: its name as soon as it is whole, then its arguments, piece by piece, as they are."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""
        self.raw = ""
        self.done = False  # the JSON of the whole call has ended
        self._at = 0  # how far of `raw` has been read
        self._depth, self._in_string, self._escaped = 0, False, False
        self._inside = True  # of the arguments' value

    def push(self, text: str) -> str:
        """The piece of arguments that this makes certain."""
        self.raw += text
        if self.name is None:
            head = HEAD.match(self.raw)
            if head is None:
                return ""
            self.name, self._at = json.loads(head[1]), head.end()
        piece = ""
        while self._at < len(self.raw) and not self.done:
            char = self.raw[self._at]
            self._at += 1
            if self._inside and self._belongs(char):
                piece += char
            elif not self._inside and char == "}":
                self.done = True
        self.arguments += piece
        return piece

    def _belongs(self, char: str) -> bool:
        """Whether the arguments' value goes on with this character; it ends where its brackets close."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth < 0:  # a bare value, closed with the call
                self._inside, self.done = False, True
                return False
        elif self._depth == 0 and char == ",":
            self._inside = False
            return False
        if self._depth == 0 and not self._in_string and char in "}]":
            self._inside = False
        return True

    @property
    def rest(self) -> str:
        """What was written behind the call."""
        return self.raw[self._at :] if self.done else ""

    def whole(self) -> tuple[str, str] | None:
        """(name, arguments) of a call whose fields come in another order; None if this is no call."""
        try:
            call = json.loads(self.raw)
        except ValueError:
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
