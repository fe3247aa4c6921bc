"""How a model writes tool calls into its answers: three dialects, told apart by reading what its template writes.

    hermes   <tool_call>\\n{"name": "look", "arguments": {"at": 1}}\\n</tool_call>   Qwen 2.5 and 3, Hermes, SmolLM
    llama    {"name": "look", "parameters": {"at": 1}}                           Llama 3: the whole answer is a call
    xml      <tool_call>\\n<function=look>\\n<parameter=at>\\n1\\n</parameter>\\n</function>\\n</tool_call>
                                                                                 Qwen 3.5 and Coder, Nemotron 3

A template that ignores tools, or writes calls in another way, gets them written in hermes by `spell_out`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent_rl.calls import CallReader, JsonCall, XmlCall, function_of
from agent_rl.types import Grammar, Json, Message, ToolCall


@dataclass(frozen=True, slots=True)
class Dialect:
    name: str
    opening: str  # "": a call is the whole answer
    closing: str
    head: str  # what stands before the arguments of a call of NAME
    tail: str
    content: str = "json_schema"  # how xgrammar calls the way in which arguments are written

    def begin(self, tool: str) -> str:
        """Everything before the arguments of a call of `tool`."""
        head = self.head.replace("NAME", tool if self is XML else json.dumps(tool)[1:-1])
        return f"{self.opening}\n{head}" if self.opening else head

    @property
    def end(self) -> str:
        return f"{self.tail}\n{self.closing}" if self.closing else self.tail

    def reader(self, tools: Sequence[Json]) -> CallReader:
        """Of one call of any of `tools`."""
        return XmlCall(tools) if self is XML else JsonCall()


HERMES = Dialect("hermes", "<tool_call>", "</tool_call>", '{"name": "NAME", "arguments": ', "}")
LLAMA = Dialect("llama", "", "", '{"name": "NAME", "parameters": ', "}")
XML = Dialect("xml", "<tool_call>", "</tool_call>", "<function=NAME>\n", "</function>", "qwen_xml_parameter")
DIALECTS = (HERMES, XML, LLAMA)


def tool_grammar(dialect: Dialect, tools: Sequence[Json], choice: str, parallel: bool) -> Grammar:
    """One call or more of these tools and nothing else. `choice`: "required" or "=NAME". Raises ValueError."""
    wanted = [tool for tool in map(function_of, tools) if choice in ("required", f"={tool['name']}")]
    if not wanted:
        raise ValueError(
            f"there is no tool {choice.removeprefix('=')!r} among {[function_of(t)['name'] for t in tools]}"
        )
    tags = [
        {
            "type": "tag",
            "begin": dialect.begin(str(tool["name"])),
            "content": {"type": dialect.content, "json_schema": tool.get("parameters") or {"type": "object"}},
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
