"""The learner's loop with a real database, the tiny model and an engine over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from nouns import answer, make_turn, make_verdict, user
from sqlalchemy import select

from agent_rl import learner
from agent_rl.experience import lessons as pool
from agent_rl.experience import lineage
from agent_rl.experience.store import Store, migrate
from agent_rl.experience.tables import checkpoints, drops, lesson_uses, lessons, steps
from agent_rl.models import base_hash, hash_folder, load_adapter, tensors_checksum
from agent_rl.rendering import Renderer
from agent_rl.settings import Settings
from agent_rl.types import Arrival, Checkpoint, Finish, Release, Span
from server.engines.scripted import create_app

HINT = "Too long. Please answer in one short sentence."
LONG = "Tea is a hot drink made from leaves. The capital of France is Paris. How do birds fly?"
OBEYS = {"default": {"text": LONG}, "rules": [{"prompt": "Too long", "text": "A hot drink."}]}
CANNOT = {"default": {"text": LONG}, "rules": []}


@pytest.fixture
async def engine(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Callable[[dict[str, Any]], Awaitable[str]]]:
    """Starts a scripted engine; returns its URL."""
    servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def start(script: dict[str, Any]) -> str:
        path = tmp_path / f"script{len(servers)}.json"
        path.write_text(json.dumps(script))
        settings = Settings(engine={"kind": "scripted", "script": path, "model": tiny_model})  # type: ignore[arg-type]
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", lifespan="on"))
        servers.append((server, asyncio.create_task(server.serve([listener]))))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, task in servers:
        server.should_exit = True
        await task


def make_settings(tmp_path: Path, model: Path, url: str, **options: Any) -> Settings:
    chosen = {
        "dtype": "float32",
        "lr": 1e-3,
        "method": {"min_gap": 0.001},
        "lessons_per_step": 2,
        "steps_per_checkpoint": 1,
        "max_wait_s": 60.0,
        **options,
    }
    return Settings(home=tmp_path, engine={"url": url, "model": model}, learner=chosen)  # type: ignore[arg-type]


async def teach(store: Store, model: Path, count: int, first: int = 0, policy: str = "default") -> list[str]:
    """So many answered turns, each followed by a complaint and judged; the lessons' ids."""
    await store.ensure_tenant("default", "default")
    await lineage.ensure_policy(store, "default", policy, base_hash(model))
    renderer = Renderer(model)
    arrivals = []
    for i in range(first, first + count):
        asked = (user(f"What is tea? {i}"),)
        response = (*renderer.encode(LONG), 2)
        turn = make_turn(
            f"t{i}",
            tenant_id="default",
            policy_id=policy,
            created_at=100.0 + i,
            session_id=f"s{i}",
            messages=asked,
            answer=answer(LONG),
            prompt_ids=renderer.render(asked),
            response_ids=response,
            behavior_logprobs=(-3.0,) * len(response),
            spans=(Span("base", 0, len(response)),),
            finish=Finish.STOP,
            chain=f"c{i}",
        )
        after = make_turn(
            f"u{i}",
            tenant_id="default",
            policy_id=policy,
            created_at=100.5 + i,
            session_id=f"s{i}",
            parent_id=f"t{i}",
            shared_len=len(turn.prompt_ids) + len(response),
            shared_messages=2,
            messages=(user(HINT),),
            no_lesson="x-train",
        )
        arrivals += [Arrival("j1", 2 * i + 1, turn), Arrival("j1", 2 * i + 2, after)]
    await store.record(arrivals)
    made = []
    for evidence in await pool.claim_evidence(store, 100, 60.0):
        verdict = make_verdict(evidence, hint=HINT)
        made.append(await pool.settle(store, evidence, verdict, method="user_hindsight", standing=HINT))
    return [lesson_id for lesson_id in made if lesson_id]


@asynccontextmanager
async def learning(settings: Settings) -> AsyncIterator[asyncio.Event]:
    """The role, running; stopped at the end, and whatever it died of is raised."""
    stop = asyncio.Event()
    task = asyncio.create_task(learner.run(settings, stop))
    try:
        yield stop
    finally:
        stop.set()
        await task


async def states(store: Store) -> dict[str, str]:
    async with store.read() as connection:
        rows = await connection.execute(select(lessons.c.lesson_id, lessons.c.state))
        return {row.lesson_id: row.state for row in rows}


async def reasons(store: Store) -> list[str]:
    async with store.read() as connection:
        return list((await connection.execute(select(drops.c.reason))).scalars())


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 40.0) -> Any:
    async with asyncio.timeout(timeout_s):
        while True:
            if found := await condition():
                return found
            await asyncio.sleep(0.02)


async def released(store: Store, count: int, policy: str = "default") -> list[Release]:
    found = await lineage.releases(store, policy)
    return found if len(found) >= count else []


async def head_at(store: Store, step: int) -> Checkpoint | None:
    head = await lineage.head(store, "default")
    return head if head and head.step == step else None


async def test_complaints_become_a_candidate(tiny_model: Path, tmp_path: Path, store: Store, engine: Any) -> None:
    made = await teach(store, tiny_model, 4)
    settings = make_settings(tmp_path, tiny_model, await engine(OBEYS))
    async with learning(settings):
        newest, oldest = await until(lambda: released(store, 2))

    assert await states(store) == dict.fromkeys(made, "used")
    head = await lineage.head(store, "default")
    assert head is not None
    assert (head.step, head.checkpoint_id) == (2, newest.checkpoint_id)
    assert head.parent_id == oldest.checkpoint_id
    assert hash_folder(Path(head.path)) == head.checkpoint_id
    assert newest.release_id == f"default-00002-{head.checkpoint_id[:8]}"
    assert Path(newest.path) == settings.releases_dir / newest.release_id
    assert tensors_checksum(load_adapter(Path(newest.path))[1]) == newest.checksum
    assert newest.base_hash == base_hash(tiny_model)

    async with store.read() as connection:
        uses = (await connection.execute(select(lesson_uses.c.lesson_id, lesson_uses.c.kind))).all()
        metrics = list((await connection.execute(select(steps.c.metrics).order_by(steps.c.step))).scalars())
    assert sorted(uses) == sorted((lesson_id, "fresh") for lesson_id in made)
    assert [m["step"] for m in metrics] == [1, 2]
    assert metrics[0]["values"]["on_head"] == 1.0  # sampled by the base, scored by the base
    assert metrics[1]["values"]["on_head"] == 0.0
    assert metrics[0]["lr"] == 1e-3
    assert metrics[0]["values"]["reanswers"] == 2.0
    assert (await lineage.acquire(store, "default", "another", 1.0)) is not None  # the lease was given back


async def test_part_of_a_batch_is_learned_once_it_has_waited(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    await teach(store, tiny_model, 1)
    url = await engine(OBEYS)
    options = {"lessons_per_step": 4, "max_wait_s": 0.3, "steps_per_checkpoint": 9}
    async with learning(make_settings(tmp_path, tiny_model, url, **options)):
        await until(lambda: released(store, 1))
    async with store.read() as connection:
        (metrics,) = (await connection.execute(select(steps.c.metrics))).scalars()
    assert metrics["lr"] == pytest.approx(1e-3 * 0.5)  # √(1/4)


async def test_uncommitted_steps_are_committed_when_lessons_run_dry(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    await teach(store, tiny_model, 2)
    options = {"max_wait_s": 0.5, "steps_per_checkpoint": 9}
    async with learning(make_settings(tmp_path, tiny_model, await engine(OBEYS), **options)):
        (release,) = await until(lambda: released(store, 1))
    assert release.step == 1


async def test_a_teacher_that_cannot_do_it_does_not_teach_it(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    made = await teach(store, tiny_model, 2)
    async with learning(make_settings(tmp_path, tiny_model, await engine(CANNOT))):
        await until(lambda: reasons_of(store, 2))
    assert await states(store) == dict.fromkeys(made, "dropped")
    assert await reasons(store) == ["teacher_cannot"] * 2
    assert await lineage.head(store, "default") is None


async def reasons_of(store: Store, count: int) -> bool:
    return len(await reasons(store)) >= count


async def test_where_both_agree_there_is_nothing_to_learn(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    await teach(store, tiny_model, 2)
    url = await engine(OBEYS)
    async with learning(make_settings(tmp_path, tiny_model, url, method={"min_gap": 1e6})):
        await until(lambda: reasons_of(store, 2))
    assert await reasons(store) == ["weak_signal"] * 2
    assert await released(store, 0) == []


async def test_a_rejected_candidate_sends_the_learner_back(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    made = await teach(store, tiny_model, 2)
    async with learning(make_settings(tmp_path, tiny_model, await engine(OBEYS))):
        (first,) = await until(lambda: released(store, 1))
        more = await teach(store, tiny_model, 2, first=2)
        await until(lambda: released(store, 2))
        await lineage.reject(store, first.release_id, ["says thanks to everything"], max_attempts=3)
        assert (await until(lambda: head_at(store, 2))).step == 2  # made again from the lessons that came back
    assert await states(store) == dict.fromkeys([*made, *more], "used")
    async with store.read() as connection:
        fresh = select(lesson_uses.c.lesson_id, lesson_uses.c.returned_at).where(lesson_uses.c.kind == "fresh")
        uses = (await connection.execute(fresh)).all()
    standing = [lesson_id for lesson_id, returned_at in uses if returned_at is None]
    assert sorted(standing) == sorted([*made, *more])  # one fresh use each in the line that stands
    assert len(uses) == 8


async def test_a_crash_before_the_commit_loses_nothing(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "agent_rl.learner")
    made = await teach(store, tiny_model, 2)
    url = await engine(OBEYS)
    never = make_settings(tmp_path, tiny_model, url, steps_per_checkpoint=9)
    crashing = asyncio.create_task(learner.run(never, asyncio.Event()))

    async def stepped() -> bool:
        return "step 1: 2 lessons" in caplog.text

    await until(stepped)
    crashing.cancel()
    with suppress(asyncio.CancelledError):
        await crashing
    assert await states(store) == dict.fromkeys(made, "claimed")
    assert await lineage.head(store, "default") is None

    async with learning(make_settings(tmp_path, tiny_model, url)):
        await until(lambda: released(store, 1))
    assert await states(store) == dict.fromkeys(made, "used")


async def test_a_lost_lease_changes_nothing_and_is_taken_again(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "agent_rl.learner")
    made = await teach(store, tiny_model, 2)
    url = await engine(OBEYS)
    options = {"lease_s": 0.6, "steps_per_checkpoint": 9, "max_wait_s": 3.0}
    async with learning(make_settings(tmp_path, tiny_model, url, **options)):

        async def stepped() -> bool:
            return "step 1: 2 lessons" in caplog.text

        await until(stepped)
        async with store.write() as connection:  # as if it had slept past its end, and another had taken over
            await connection.exec_driver_sql("UPDATE policies SET lease_owner = 'other', lease_epoch = lease_epoch + 1")
        await until(lambda: released(store, 1))
    assert "starting over from the head: the lease of" in caplog.text
    assert await states(store) == dict.fromkeys(made, "used")
    assert len(await released(store, 1)) == 1


async def test_replays_are_counted_apart(tiny_model: Path, tmp_path: Path, store: Store, engine: Any) -> None:
    made = await teach(store, tiny_model, 2)
    async with learning(make_settings(tmp_path, tiny_model, await engine(OBEYS), replays_per_step=1)):
        await until(lambda: released(store, 1))
        more = await teach(store, tiny_model, 2, first=2)
        await until(lambda: released(store, 2))
    async with store.read() as connection:
        metrics = list((await connection.execute(select(steps.c.metrics).order_by(steps.c.step))).scalars())
    assert sorted(metrics[1]["lesson_ids"]) == sorted(more)
    (replayed,) = metrics[1]["replay_ids"]
    assert replayed in made


# ------------------------------------------------------------------------------------------- policies in turn


async def committed(store: Store) -> list[tuple[str, int]]:
    """(policy, step) of every checkpoint, in the order in which they were made."""
    async with store.read() as connection:
        query = select(checkpoints.c.policy_id, checkpoints.c.step).order_by(checkpoints.c.created_at)
        return [(row.policy_id, row.step) for row in await connection.execute(query)]


async def test_policies_take_turns_oldest_lesson_first(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    await teach(store, tiny_model, 2, first=0, policy="a")
    await teach(store, tiny_model, 4, first=2, policy="b")
    await teach(store, tiny_model, 2, first=6, policy="a")
    async with learning(make_settings(tmp_path, tiny_model, await engine(OBEYS))):
        await until(lambda: released(store, 2, "a"))
        await until(lambda: released(store, 2, "b"))
        await until(lambda: released(store, 2, "a"))
    assert await committed(store) == [("a", 1), ("b", 1), ("b", 2), ("a", 2)]


async def test_an_open_checkpoint_closes_when_another_policy_waits(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    await teach(store, tiny_model, 2, first=0, policy="a")
    options = {"steps_per_checkpoint": 9, "max_wait_s": 60.0}
    async with learning(make_settings(tmp_path, tiny_model, await engine(OBEYS), **options)):
        await until(lambda: taken(store))
        await teach(store, tiny_model, 2, first=2, policy="b")
        await until(lambda: released(store, 1, "a"))
    assert (await committed(store))[0] == ("a", 1)


async def taken(store: Store) -> bool:
    return "claimed" in (await states(store)).values()


async def weights(store: Store, policy: str) -> list[bytes]:
    """Adapter, moments and EMA of the policy's head, byte by byte."""
    head = await lineage.head(store, policy)
    assert head is not None
    names = ("adapter_model.safetensors", "optimizer.safetensors", "ema.safetensors")
    return [(Path(head.path) / name).read_bytes() for name in names]


async def test_a_policy_learns_the_same_whoever_learned_in_between(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any
) -> None:
    url, options = await engine(OBEYS), {"teacher": "ema"}
    alone = await Store.open(await migrated(tmp_path / "alone"))
    await teach(alone, tiny_model, 2, first=0, policy="a")
    await teach(alone, tiny_model, 2, first=4, policy="a")
    async with learning(make_settings(tmp_path / "alone", tiny_model, url, **options)):
        await until(lambda: released(alone, 2, "a"))
    await teach(store, tiny_model, 2, first=0, policy="a")
    await teach(store, tiny_model, 2, first=2, policy="b")
    await teach(store, tiny_model, 2, first=4, policy="a")
    async with learning(make_settings(tmp_path, tiny_model, url, **options)):
        await until(lambda: released(store, 2, "a"))
    assert await committed(store) == [("a", 1), ("b", 1), ("a", 2)]
    assert await weights(store, "a") == await weights(alone, "a")
    assert await weights(store, "b") != await weights(alone, "a")
    await alone.close()


async def migrated(home: Path) -> str:
    home.mkdir()
    url = f"sqlite+aiosqlite:///{home / 'agent-rl.db'}"
    await migrate(url)
    return url


async def test_a_policy_whose_head_is_damaged_keeps_nobody_waiting(
    tiny_model: Path, tmp_path: Path, store: Store, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = await engine(OBEYS)
    await teach(store, tiny_model, 2, first=0, policy="a")
    async with learning(make_settings(tmp_path, tiny_model, url)):
        await until(lambda: released(store, 1, "a"))
    head = await lineage.head(store, "a")
    assert head is not None
    (Path(head.path) / "state.json").write_text("{}")
    broken = await teach(store, tiny_model, 2, first=2, policy="a")
    await teach(store, tiny_model, 2, first=4, policy="b")
    async with learning(make_settings(tmp_path, tiny_model, url)):
        await until(lambda: released(store, 1, "b"))
    assert "policy a cannot be learned for now" in caplog.text
    found = await states(store)
    assert [found[lesson_id] for lesson_id in broken] == ["ready", "ready"]
