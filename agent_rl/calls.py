"""One tool call, read as it is written: its name as soon as it is whole, then its arguments, piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from agent_rl.types import Json

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
XML_HEAD = re.compile(r"\s*<function=([^>\n]+)>")
XML_NEXT = re.compile(r"\s*(?:<parameter=([^>\n]+)>|</function>)")
XML_END = "</parameter>"
PYTHON = {"True": "true", "False": "false", "None": "null"}  # templates print values as Python does


class JsonCall:
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


class XmlCall:
    """One call as it is written, its arguments made JSON, a parameter at a time; what is a string, the schema says."""

    def __init__(self, tools: Sequence[Json]) -> None:
        self._functions = [tool.get("function") for tool in tools]
        self.name: str | None = None
        self.arguments = ""
        self.raw = ""
        self.done = False
        self._at = 0  # how far of `raw` has been read
        self._searched = 0  # no parameter ends before
        self._key: str | None = None  # of the parameter that is being read

    def push(self, text: str) -> str:
        """The piece of arguments that this makes certain."""
        self.raw += text
        if self.name is None:
            head = XML_HEAD.match(self.raw)
            if head is None:
                return ""
            self.name, self._at = head[1].strip(), head.end()
        before = len(self.arguments)
        while not self.done and (self._begin() if self._key is None else self._finish(self._key)):
            pass
        return self.arguments[before:]

    def _begin(self) -> bool:
        """The next parameter, or the end; False where neither is there yet."""
        found = XML_NEXT.match(self.raw, self._at)
        if found is None:
            return False
        self._at = self._searched = found.end()
        self._key, self.done = found[1], found[1] is None
        if self.done:
            self.arguments += "}" if self.arguments else "{}"
        return True

    def _finish(self, key: str) -> bool:
        end = self.raw.find(XML_END, self._searched)
        if end < 0:
            self._searched = max(self._at, len(self.raw) - len(XML_END) + 1)
            return False
        value = self.raw[self._at : end].removeprefix("\n").removesuffix("\n")
        self.arguments += f"{', ' if self.arguments else '{'}{json.dumps(key)}: {self._json(key, value)}"
        self._at, self._key = end + len(XML_END), None
        return True

    def _json(self, key: str, value: str) -> str:
        function = next((f for f in self._functions if isinstance(f, dict) and f.get("name") == self.name), None)
        kind = _item(_item(_item(function, "parameters"), "properties"), key)
        kinds = _item(kind, "type")
        is_string = "string" in kinds if isinstance(kinds, list | str) else False
        bare = PYTHON.get(value.strip(), value.strip())
        return bare if not is_string and _is_json(bare) else json.dumps(value, ensure_ascii=False)

    @property
    def rest(self) -> str:
        """What was written behind the call."""
        return self.raw[self._at :] if self.done else ""

    def whole(self) -> tuple[str, str] | None:
        """A call in XML has one order: what has shown no name is none."""
        return None


CallReader = JsonCall | XmlCall


def function_of(tool: Json) -> Json:
    """Its name, its description, its parameters. Raises ValueError."""
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool must be {{'type': 'function', 'function': {{'name': …}}}}, not {tool!r:.100}")
    return function


def _item(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return text not in ("NaN", "Infinity", "-Infinity")
