"""An agent of the OpenAI Agents SDK with one tool; `responses` (streamed, in a chain) or `chat_completions`."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal, cast

from agents import Agent, Runner, function_tool, set_default_openai_api, set_tracing_disabled


@function_tool
def look_up(word: str) -> str:
    """Looks a word up."""
    return f"{word}-{4700 + 11}"


async def main(api: Literal["responses", "chat_completions"]) -> None:
    set_tracing_disabled(True)
    set_default_openai_api(api)
    agent = Agent(name="Tea", instructions="Be terse.", model="default", tools=[look_up])
    if api == "chat_completions":
        print((await Runner.run(agent, "run it please")).final_output)
        return
    streamed = Runner.run_streamed(agent, "run it please", auto_previous_response_id=True)
    async for _ in streamed.stream_events():
        pass
    print(streamed.final_output)


asyncio.run(main(cast(Literal["responses", "chat_completions"], sys.argv[1])))
