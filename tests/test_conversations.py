"""Fifty turns with tools, on models of three shapes: what is extended is what was sampled, never rendered again."""

from __future__ import annotations

import json
import random

import pytest
from shapes import SHAPES, make_shape

from agent_rl.rendering import Renderer
from agent_rl.types import Json, Message, ToolCall

TOOLS: list[Json] = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}
]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Renderer]:
    return request.param, Renderer(make_shape(request.param, tmp_path_factory.mktemp(request.param)))


def test_the_bridge_is_proven(shape: tuple[str, Renderer]) -> None:
    assert shape[1].bridge_refusal is None


def test_tools_and_their_use_are_in_the_prompt(shape: tuple[str, Renderer]) -> None:
    name, renderer = shape
    asked = [Message("user", "Where?")]
    assert '"look"' in renderer.decode(renderer.render(asked, TOOLS))
    parser = renderer.parser(tools=TOOLS)  # as if the prompt had opened no thought
    parser.push(renderer.encode(call_of(name, '{"at": 7}')))
    parser.finish()
    used = renderer.decode(renderer.render([*asked, parser.answer(), Message("tool", "behind you")], TOOLS))
    assert ("<parameter=at>\n7\n" if name == "xml" else '{"at": 7}') in used
    assert "behind you" in used


def call_of(name: str, arguments: str) -> str:
    if name == "llama":
        return f'{{"name": "look", "parameters": {arguments}}}'
    if name == "xml":
        parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in json.loads(arguments).items())
        return f"<tool_call>\n<function=look>\n{parameters}</function>\n</tool_call>"
    return f'<tool_call>\n{{"name": "look",  "arguments": {arguments}}}\n</tool_call>'


def sampled(shape: str, renderer: Renderer, turn: int, rng: random.Random) -> tuple[int, ...]:
    """An answer with what models really do: odd white space in JSON, split characters, no end marker at the limit."""
    arguments = json.dumps({"at": turn, "why": "naïve 🙂"}, indent=turn % 3 or None, ensure_ascii=turn % 2 == 0)
    kind = turn % 4
    text = ["It is there.  ", call_of(shape, arguments), "日本 🦀 done\n", "cut in the mid"][kind]
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)] if kind == 0 else [text]
    ids = [token for piece in pieces for token in renderer.encode(piece)]  # not as the tokenizer would cut it
    end = [] if kind == 3 else [rng.choice(renderer.stop_ids[-1:])]
    return (*ids, *end)


def test_fifty_turns_hold_exactly_what_was_sampled(shape: tuple[str, Renderer]) -> None:
    name, renderer = shape
    rng, messages = random.Random(0), [Message("system", "You are terse."), Message("user", "Begin.")]
    ids, answers = list(renderer.render(messages, TOOLS)), []
    for turn in range(50):
        response = sampled(name, renderer, turn, rng)
        parser = renderer.parser(tools=TOOLS, prompt_ids=ids)
        for token in response:
            parser.push([token])
        parser.finish()
        answer = parser.answer()
        assert bool(answer.tool_calls) == (turn % 4 == 1)
        answers.append((len(ids), response))
        follow = Message("tool", f"result {turn}.") if answer.tool_calls else Message("user", f"Go on {turn} ")
        past = (*ids, *response)
        tail = renderer.bridge(past, [follow], TOOLS)
        assert tail is not None
        ids = [*past, *tail]
        messages += [answer, follow]
    for start, response in answers:
        assert tuple(ids[start : start + len(response)]) == response
    text = renderer.decode(ids)
    assert [text.count(f"result {turn}.") for turn in range(1, 50, 4)] == [1] * 13


def test_what_follows_an_answer_is_what_the_template_writes(shape: tuple[str, Renderer]) -> None:
    _, renderer = shape
    asked, answer, more = Message("user", "a"), Message("assistant", "b"), Message("user", "c")
    first = renderer.render([asked], TOOLS)
    past = (*first, *renderer.encode("b"), renderer.stop_ids[-1])
    tail = renderer.bridge(past, [more], TOOLS)
    assert tail is not None
    everything = renderer.render([asked, answer, more], TOOLS)
    if renderer.decode(first).endswith("<think>\n"):  # which this template leaves out of the past
        assert renderer.decode(everything).endswith(renderer.decode((*renderer.encode("b"), *past[-1:], *tail)))
    else:
        assert (*past, *tail) == everything


def test_results_of_parallel_calls_follow_as_the_template_writes_them(shape: tuple[str, Renderer]) -> None:
    name, renderer = shape
    if name == "llama":
        pytest.skip("its template knows one call at a time")
    calls = tuple(ToolCall(f"c{n}", "look", f'{{"at": {n}}}') for n in (1, 2))
    results = [Message("tool", f"seen {call.id}", tool_call_id=call.id) for call in calls]
    everything = renderer.render([Message("user", "a"), Message("assistant", "", tool_calls=calls), *results], TOOLS)
    end = renderer.stop_ids[-1]
    tail = renderer.bridge((1, 5, end), results, TOOLS)
    assert tail is not None
    assert everything[-len(tail) - 1 :] == (end, *tail)
    assert renderer.decode(tail).count("seen c") == 2
