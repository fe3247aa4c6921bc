"""What an answer says, however it is cut into pieces: text, reasoning, calls, and no markup."""

from __future__ import annotations

import pytest

from agent_rl.dialects import HERMES, LLAMA, XML, Dialect
from agent_rl.parsing import CallDelta, Parsed, Reader
from agent_rl.types import Json

LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "}\\"", "deep": [1, {"x": 2}]}}\n</tool_call>'
ARGUMENTS = '{"at": "}\\"", "deep": [1, {"x": 2}]}'


def read(
    text: str,
    size: int = 1,
    *,
    dialect: Dialect | None = HERMES,
    thinks: bool = True,
    thinking: bool = False,
    stop: tuple[str, ...] = (),
    tools: tuple[Json, ...] = (),
) -> tuple[str, str, list[tuple[str, str]], Reader]:
    """(text, reasoning, calls as (name, arguments)) put together from what was pushed; the reader."""
    reader = Reader(stop, dialect, thinks=thinks, thinking=thinking, tools=tools)
    pieces = [reader.push(text[at : at + size]) for at in range(0, len(text), size)] + [reader.push("", last=True)]
    calls: list[tuple[str, str]] = []
    for delta in (delta for piece in pieces for delta in piece.calls):
        if delta.name is not None:
            assert delta.index == len(calls)
            assert delta.id
            calls.append((delta.name, ""))
        calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    said = "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces)
    message = reader.answer()
    assert message.content == said[0]
    assert (message.reasoning or "") == said[1].strip()
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls
    return *said, calls, reader


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "thought", "calls"),
    [
        ("Tea is hot. <b> 1 < 2", "Tea is hot. <b> 1 < 2", "", []),
        (f"I look.\n\n{LOOK}", "I look.", "", [("look", ARGUMENTS)]),
        (f"{LOOK}\n{LOOK}", "", "", [("look", ARGUMENTS)] * 2),
        (f"<think>\nHm.\n</think>\n\nYes.{LOOK}", "Yes.", "\nHm.\n", [("look", ARGUMENTS)]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "look"}</tool_call>', "", "", [("look", '{"a": 1}')]),
        ("So <tool_call>\nno call\n</tool_call> it is", "So <tool_call>\nno call\n</tool_call> it is", "", []),
        ('<tool_call>\n{"name": "lo', "", "", []),
        ('<tool_call>\n{"name": "look", "arguments": {"a": [1', "", "", [("look", '{"a": [1')]),
        ("a <think> is a tag", "a <think> is a tag", "", []),
        ("<think>never ended", "", "never ended", []),
        ("ends like <tool_", "ends like <tool_", "", []),
        ("  \n text  \n", "  \n text  \n", "", []),
    ],
)
def test_pieces_make_the_whole(text: str, said: str, thought: str, calls: list[tuple[str, str]], size: int) -> None:
    assert read(text, size)[:3] == (said, thought, calls)


def test_calls_are_text_where_no_tools_were_offered() -> None:
    assert read(LOOK, dialect=None)[:3] == (LOOK, "", [])


def test_thoughts_are_text_where_the_model_has_none() -> None:
    assert read("<think>Hm.</think>Yes", thinks=False)[0] == "<think>Hm.</think>Yes"


def test_a_thought_that_the_prompt_opened() -> None:
    assert read("Hm.\n</think>\n\nYes", thinking=True)[:2] == ("Yes", "Hm.\n")


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_call_ends_a_thought_that_nothing_else_ended(size: int) -> None:
    assert read(f"Hm.\n{LOOK}", size, thinking=True)[:3] == ("", "Hm.\n", [("look", ARGUMENTS)])


def test_a_stop_string_ends_everything() -> None:
    said, _, calls, reader = read(f"One. EN END {LOOK}", stop=("END",))
    assert (said, calls, reader.stop_string) == ("One. EN ", [], "END")


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('{"name": "look", "parameters": {"at": 1}}', "", [("look", '{"at": 1}')]),
        ('{"name": "look", "parameters": {}}; {"name": "go", "parameters": {}}', "", [("look", "{}"), ("go", "{}")]),
        ("{1, 2} is a set", "{1, 2} is a set", []),
        ('The JSON is {"name": "look", "parameters": {}}', 'The JSON is {"name": "look", "parameters": {}}', []),
    ],
)
def test_llama_writes_bare_json(text: str, said: str, calls: list[tuple[str, str]], size: int) -> None:
    assert read(text, size, dialect=LLAMA)[::2] == (said, calls)


WRITE: Json = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {"properties": {"text": {"type": ["string", "null"]}, "n": {"type": "integer"}, "on": {}}},
    },
}


def xml(*parameters: tuple[str, str], name: str = "write") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (xml(("text", "12"), ("n", "12")), "", [("write", '{"text": "12", "n": 12}')]),
        (xml(("text", "a\n </p> é\n"), ("on", "True")), "", [("write", '{"text": "a\\n </p> é\\n", "on": true}')]),
        (xml(("on", '{"a": [1]}')), "", [("write", '{"on": {"a": [1]}}')]),
        (xml(("on", "NaN"), ("n", "many")), "", [("write", '{"on": "NaN", "n": "many"}')]),
        (f"So.\n\n{xml()}\n{xml(name='look')}", "So.", [("write", "{}"), ("look", "{}")]),
        ("<tool_call>\n<function=write>\n<parameter=text>\nhalf", "", [("write", "")]),
        ("<tool_call>\n<function=wri", "", []),
        ("<tool_call>\nnone\n</tool_call>", "<tool_call>\nnone\n</tool_call>", []),
    ],
)
def test_parameters_in_xml_become_json(text: str, said: str, calls: list[tuple[str, str]], size: int) -> None:
    assert read(text, size, dialect=XML, tools=(WRITE,))[::2] == (said, calls)


def test_a_name_is_told_before_its_arguments_end() -> None:
    reader = Reader((), HERMES, thinks=False, thinking=False)
    first = reader.push('<tool_call>\n{"name": "look", "arguments": {"at"').calls
    assert [(call.index, call.name, call.arguments) for call in first] == [(0, "look", '{"at"')]
    assert reader.push(": 1}").calls == (CallDelta(0, ": 1}"),)
    assert reader.push("}\n</tool_call>") == Parsed()
