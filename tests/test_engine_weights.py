"""Adapters and weights that come and go under running answers, on every server of the engine protocol."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from engines import (
    GREEDY,
    LONG_ANSWER,
    Server,
    begun,
    needs_weights,
)

from agent_rl.engine import (
    EngineRejected,
    ReleaseNotLoaded,
)
from agent_rl.models import load_adapter, load_model, tensors_checksum
from agent_rl.types import BASE_RELEASE, Finish, Span

# -------------------------------------------------------------------------------------------------- adapters


async def test_adapters_answer_side_by_side(server: Server, adapters: dict[str, Path]) -> None:
    for name, folder in adapters.items():
        await server.engine.load_adapter(name, folder)
        await server.engine.load_adapter(name, folder)  # again: no error
    checksums = {name: tensors_checksum(load_adapter(folder)[1]) for name, folder in adapters.items()}
    assert (await server.engine.info()).adapters == checksums
    releases = (BASE_RELEASE, "r1", "r2")
    prompt = server.prompt("tea")
    alone = [await server.engine.complete(prompt, GREEDY, release=release) for release in releases]
    together = await asyncio.gather(*(server.engine.complete(prompt, GREEDY, release=r) for r in releases))
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({answer.ids for answer in alone}) == 3
    assert [answer.spans[0].release for answer in alone] == list(releases)


async def test_an_answer_finishes_on_the_adapter_it_began_with(server: Server, adapters: dict[str, Path]) -> None:
    await server.engine.load_adapter("r1", adapters["r1"])
    whole = await server.engine.complete(server.prompt("long"), LONG_ANSWER, release="r1")
    task = await begun(server, "a", "r1")
    await server.engine.unload_adapter("r1")
    with pytest.raises(ReleaseNotLoaded, match="r1"):
        await server.engine.complete(server.prompt("tea"), GREEDY, release="r1")
    assert not task.done()
    assert (await server.engine.info()).adapters == {}
    await server.engine.load_adapter("r2", adapters["r2"])
    answer = await task
    assert answer.ids == whole.ids
    assert answer.spans == (Span("r1", 0, len(whole.ids)),)
    with pytest.raises(ReleaseNotLoaded):
        await server.engine.unload_adapter("r1")
    await server.engine.load_adapter("r1", adapters["r1"])
    again = await server.engine.complete(server.prompt("long"), LONG_ANSWER, release="r1")
    assert again.ids == whole.ids


async def test_a_name_means_one_adapter(server: Server, adapters: dict[str, Path]) -> None:
    await server.engine.load_adapter("r1", adapters["r1"])
    with pytest.raises(EngineRejected, match="r1 is loaded already, with other weights"):
        await server.engine.load_adapter("r1", adapters["r2"])
    with pytest.raises(EngineRejected, match="is no adapter folder"):
        await server.engine.load_adapter("r3", server.folder)
    with pytest.raises(ValueError, match="'base' names the model without an adapter"):
        await server.engine.load_adapter(BASE_RELEASE, adapters["r1"])


# --------------------------------------------------------------------------------------------------- weights


async def test_a_swap_lets_running_answers_end_on_the_old_weights(server: Server, other_weights: Path) -> None:
    before = await server.engine.complete(server.prompt("long"), LONG_ANSWER)
    task = await begun(server, "a")
    swap = asyncio.create_task(server.engine.update_weights(other_weights, "w1"))
    await asyncio.sleep(0.02)
    later = asyncio.create_task(server.engine.complete(server.prompt("tea"), GREEDY))
    answer = await task
    assert (answer.ids, answer.spans) == (before.ids, (Span(BASE_RELEASE, 0, len(before.ids)),))
    await swap
    assert {span.release for span in (await later).spans} == {"w1"}
    info = await server.engine.info()
    assert (info.weight_version, info.model_path) == ("w1", str(other_weights))
    after = await server.engine.complete(server.prompt("tea"), GREEDY, release="w1")
    assert after.spans == (Span("w1", 0, len(after.ids)),)
    with pytest.raises(ReleaseNotLoaded, match="w1, not base"):
        await server.engine.complete(server.prompt("tea"), GREEDY)


async def test_swapped_weights_are_the_ones_that_answer(server: Server, other_weights: Path) -> None:
    needs_weights(server)
    prompt = server.prompt("What is tea?")
    await server.engine.score(prompt, [5, 6])
    await server.engine.complete(prompt, GREEDY, priority=0)  # leaves its KV behind: it must not be used again
    await server.engine.update_weights(other_weights, "w1")
    with torch.no_grad():
        logits = load_model(other_weights, "float32")(torch.tensor([[*prompt, 5, 6]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[[0, 1], [5, 6]].tolist()
    assert await server.engine.score(prompt, [5, 6], release="w1") == pytest.approx(expected, abs=1e-4)


async def test_a_swap_may_abort(server: Server, other_weights: Path) -> None:
    task = await begun(server, "a")
    await server.engine.update_weights(other_weights, "w1", abort=True)
    answer = await task
    assert answer.finish is Finish.ABORTED
    assert answer.spans == (Span(BASE_RELEASE, 0, len(answer.ids)),)


async def test_a_swap_is_refused_while_adapters_rest_on_the_base(server: Server, adapters: dict[str, Path]) -> None:
    await server.engine.load_adapter("r1", adapters["r1"])
    with pytest.raises(EngineRejected, match=r"\['r1'\] belong to the weights that serve"):
        await server.engine.update_weights(server.folder, "w1")
    with pytest.raises(EngineRejected, match="is no model folder"):
        await server.engine.update_weights(adapters["r1"], "w1")
    assert (await server.engine.info()).weight_version == BASE_RELEASE


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_pause_holds_answers_and_a_swap_in_it_shows(server: Server, other_weights: Path, mode: str) -> None:
    task = await begun(server, "a")
    await server.engine.pause(mode)  # type: ignore[arg-type]
    assert not await server.engine.healthy()
    waiting = asyncio.create_task(server.engine.complete(server.prompt("tea"), GREEDY))
    await asyncio.sleep(0.05)
    await server.engine.update_weights(other_weights, "w1")
    assert not task.done()
    assert not waiting.done()
    await server.engine.resume()
    answer = await task
    old, new = answer.spans
    assert (old.release, old.start, old.kv_mixed) == (BASE_RELEASE, 0, False)
    assert (new.release, new.start, new.end, new.kv_mixed) == ("w1", old.end, len(answer.ids), mode == "in_place")
    assert (await waiting).spans[0].release == "w1"
    assert await server.engine.healthy()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_pause_alone_changes_no_answer(server: Server, mode: str) -> None:
    whole = await server.engine.complete(server.prompt("long"), LONG_ANSWER)
    task = await begun(server, "a")
    await server.engine.pause(mode)  # type: ignore[arg-type]
    await server.engine.flush_cache()
    await server.engine.resume()
    answer = await task
    assert (answer.ids, answer.spans) == (whole.ids, (Span(BASE_RELEASE, 0, len(whole.ids)),))


async def test_a_pause_may_abort(server: Server) -> None:
    task = await begun(server, "a")
    await server.engine.pause("abort")
    assert (await task).finish is Finish.ABORTED
    await server.engine.resume()
