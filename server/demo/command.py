"""`agent-rl demo`: scenarios on a running server, or each on a server of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from agent_rl.experience.store import Store
from agent_rl.settings import Settings
from server import launch
from server.demo.report import keep, table
from server.demo.scenario import PREFERENCES, Client, Results, Scene, View, play


async def run(
    settings: Settings,
    interactions: int | None,
    n_questions: int,
    chosen: Sequence[str] | None,
    view: View,
    console: Console,
) -> list[Results]:
    """Play scenarios on a running server, one after the other."""
    store = await Store.open(settings.database_url)
    client = Client(settings)
    played = []
    try:
        for name in chosen or list(PREFERENCES):
            if name not in PREFERENCES:
                raise ValueError(f"there is no scenario {name!r}; there are {', '.join(PREFERENCES)}")
            scene = Scene(settings, client, store, view, console)
            scene.say(f"[bold]{name}[/bold]")
            preference = PREFERENCES[name]
            results = Results(name, preference.complaint)
            folder = settings.home / "demo" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            try:
                await play(scene, preference, interactions or preference.conversations, n_questions, results)
            finally:
                keep(results, preference, folder)
            if results.after:
                console.print(table(results))
            scene.say(f"transcript, result and chart are in {folder}")
            played.append(results)
    finally:
        await client.openai.close()
        await store.close()
    return played


async def with_server(
    settings: Settings,
    interactions: int | None,
    n_questions: int,
    chosen: Sequence[str] | None,
    view: View,
    console: Console,
) -> None:
    """The same on a server of its own for each scenario, in fresh home folders; stopped at the end."""
    for name in chosen or list(PREFERENCES):
        home = settings.home.resolve().parent / f"{settings.home.name}-demo-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        own = settings.model_copy(
            update={"home": home, "gateway": settings.gateway.model_copy(update={"port": launch.free_port()})}
        )
        async with launch.served(own, console.print, lambda role, line: None) as complete:
            await run(complete, interactions, n_questions, [name], view, console)
