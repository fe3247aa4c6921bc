"""The publisher against a real database and the scripted engine: what is staged goes live or is rejected, whatever dies
in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from nouns import make_checkpoint, make_release, make_step
from serving import serving

from agent_rl.engine import Engine
from agent_rl.experience import lineage
from agent_rl.experience.store import Store
from agent_rl.experience.tables import policies
from agent_rl.models import LoraConfig, load_adapter, save_adapter, tensors_checksum
from agent_rl.rendering import Renderer
from agent_rl.settings import EngineSettings, ReleaseSettings, Settings, StoreSettings
from agent_rl.types import BASE_RELEASE, Message, Release, ReleaseState, Sampling
from server.engines import protocol
from server.engines.scripted import Rule, Script, ScriptedEngine
from server.publisher import CANARY_PROMPT, Publisher, run

S = ReleaseState
QUICK = ReleaseSettings(probes=2, probe_max_tokens=16, min_on_topic=0.5, poll_s=0.01)


@dataclass
class Stage:
    """One policy, one engine, one publisher."""

    folder: Path
    store: Store
    server: ScriptedEngine
    engine: Engine
    publisher: Publisher
    made: dict[str, Release] = field(default_factory=dict)

    async def offer(self, release_id: str, policy: str = "p1", **changes: Any) -> Release:
        """A checkpoint behind the policy's newest one and its release, staged as a learner stages them."""
        n = len(self.made) + 1
        folder = self.folder / release_id
        save_adapter(folder, LoraConfig(1, 1.0, ("q_proj",)), {"layer.lora_A.weight": torch.full((1, 2), float(n))})
        checksum = tensors_checksum(load_adapter(folder)[1])
        values = {"path": str(folder), "checksum": checksum, "created_at": 300.0 + n, "step": n, "policy_id": policy}
        release = make_release(release_id, f"c{n}", **{**values, **changes})
        head = await lineage.head(self.store, policy)
        checkpoint = make_checkpoint(f"c{n}", head.checkpoint_id if head else None, step=n, policy_id=policy)
        lease = await lineage.acquire(self.store, policy, "learner", 60)
        assert lease is not None
        await lineage.commit(self.store, lease, checkpoint, [make_step(n)], release)
        self.made[release_id] = release
        return release

    async def state(self, release_id: str) -> ReleaseState:
        found = await lineage.find_release(self.store, release_id)
        assert found is not None
        return found.state

    async def reasons(self, release_id: str) -> tuple[str, ...]:
        found = await lineage.find_release(self.store, release_id)
        assert found is not None
        return found.reasons

    async def live(self, policy: str = "p1") -> str:
        deployment = await self.store.deployment(policy)
        assert deployment is not None
        return deployment.live

    async def head(self) -> str | None:
        head = await lineage.head(self.store, "p1")
        return head.checkpoint_id if head else None

    def options(self, **changes: Any) -> None:
        release = QUICK.model_copy(update=changes)
        self.publisher.settings = self.publisher.settings.model_copy(update={"release": release})

    def another(self) -> Publisher:
        """A publisher that knows nothing: the one before has died."""
        old = self.publisher
        return Publisher(old.settings, self.store, self.engine, old.renderer)


@pytest.fixture
async def stage(tiny_model: Path, tmp_path: Path, store: Store) -> AsyncIterator[Stage]:
    await store.ensure_tenant("default", "default")
    await lineage.ensure_policy(store, "default", "p1", "b" * 64)
    rules = [
        Rule(release="empty", text=""),
        Rule(release="mute", user=CANARY_PROMPT.replace("?", r"\?"), text=""),
    ]
    server = ScriptedEngine(tiny_model, Script(rules=rules), 1024)
    async with serving(protocol.create_app(server, None)) as url:
        settings = Settings(
            home=tmp_path,
            release=QUICK,
            engine=EngineSettings(model=tiny_model, url=url),
            store=StoreSettings(database=f"sqlite+aiosqlite:///{tmp_path / 'agent-rl.db'}"),
        )
        engine = Engine(url)
        try:
            yield Stage(tmp_path, store, server, engine, Publisher(settings, store, engine, Renderer(tiny_model)))
        finally:
            await engine.close()


# ------------------------------------------------------------------------------------------------- candidates


async def test_what_passes_goes_live_and_the_one_before_retires(stage: Stage) -> None:
    await stage.offer("good1")
    await stage.publisher.round()
    assert (await stage.live(), await stage.state("good1")) == ("good1", S.LIVE)
    await stage.offer("good2")
    await stage.publisher.round()
    assert (await stage.live(), await stage.state("good1"), await stage.state("good2")) == ("good2", S.RETIRED, S.LIVE)
    assert set(stage.server.adapters) == {"good1", "good2"}  # the one before may still have answers to finish
    report = await lineage.last_exam(stage.store, "good2")
    assert report is not None
    assert report.passed


async def test_what_fails_is_rejected_with_reasons_and_the_head_moves_back(stage: Stage) -> None:
    await stage.offer("good1")
    await stage.publisher.round()
    await stage.offer("empty")
    assert await stage.head() == "c2"
    await stage.publisher.round()
    assert (await stage.live(), await stage.state("empty"), await stage.head()) == ("good1", S.REJECTED, "c1")
    assert "empty rate 1 > 0" in await stage.reasons("empty")
    report = await lineage.last_exam(stage.store, "empty")
    assert report is not None
    assert report.values["empty_rate"] == 1.0
    await stage.publisher.round()
    assert set(stage.server.adapters) == {"good1"}  # nobody was ever served by it: it goes at once


async def test_only_the_newest_candidate_is_examined(stage: Stage) -> None:
    for release_id in ("one", "two", "three"):
        await stage.offer(release_id)
    await stage.publisher.round()
    assert [await stage.state(r) for r in ("one", "two", "three")] == [S.SUPERSEDED, S.SUPERSEDED, S.LIVE]
    assert set(stage.server.adapters) == {"three"}


async def test_an_exam_that_a_dead_publisher_left_is_held_again(stage: Stage) -> None:
    await stage.offer("good1")
    await lineage.set_state(stage.store, "good1", S.EXAMINING, expect=[S.STAGED])
    await stage.another().round()
    assert await stage.state("good1") is S.LIVE


async def test_a_pass_that_a_dead_publisher_did_not_act_on_goes_live(stage: Stage) -> None:
    await stage.offer("good1")
    await lineage.set_state(stage.store, "good1", S.CANARY, expect=[S.STAGED])
    await stage.another().round()
    assert await stage.live() == "good1"


async def test_other_weights_than_were_released_are_rejected(stage: Stage) -> None:
    await stage.offer("forged", checksum="f" * 64)
    await stage.publisher.round()
    assert (await stage.state("forged"), await stage.head()) == (S.REJECTED, None)
    assert "the release is " + "f" * 64 in (await stage.reasons("forged"))[0]
    assert stage.server.adapters == {}


async def test_a_release_without_files_is_rejected(stage: Stage) -> None:
    await stage.offer("gone", path=str(stage.folder / "nowhere"))
    await stage.publisher.round()
    assert await stage.state("gone") is S.REJECTED
    assert "does not load it" in (await stage.reasons("gone"))[0]


async def test_by_hand_a_pass_waits_loaded_for_promotion(stage: Stage) -> None:
    stage.options(auto=False)
    await stage.offer("good1")
    await stage.publisher.round()
    await stage.publisher.round()
    assert (await stage.live(), await stage.state("good1")) == (BASE_RELEASE, S.CANARY)
    assert set(stage.server.adapters) == {"good1"}
    await lineage.promote(stage.store, "good1", actor="test", reason="by hand", max_attempts=2)
    await stage.publisher.round()
    assert (await stage.live(), stage.publisher.proven) == ("good1", {"good1"})


# ---------------------------------------------------------------------------------------------- many policies


async def test_many_policies_serve_on_one_engine_and_have_all_again_when_it_restarts(stage: Stage) -> None:
    for policy in ("p2", "p3"):
        await lineage.ensure_policy(stage.store, "default", policy, "b" * 64)
    await stage.offer("one")
    await stage.offer("two", policy="p2")
    await stage.publisher.round()
    assert [await stage.live(policy) for policy in ("p1", "p2", "p3")] == ["one", "two", BASE_RELEASE]
    await stage.offer("empty", policy="p2")
    await stage.publisher.round()
    assert (await stage.state("empty"), await stage.live("p1"), await stage.live("p2")) == (S.REJECTED, "one", "two")
    stage.server.adapters.clear()
    await stage.publisher.round()
    assert set(stage.server.adapters) == {"one", "two"}


async def test_a_policy_that_came_without_a_deployment_gets_one_with_its_first_release(stage: Stage) -> None:
    async with stage.store.write() as connection:  # as the recorder makes the policies of subjects
        row = {"policy_id": "p1:ab12", "tenant_id": "default", "name": "p1@ab12", "base_hash": "b" * 64}
        await connection.execute(policies.insert(), {**row, "created_at": 1.0})
    assert await stage.store.deployment("p1:ab12") is None
    with pytest.raises(ValueError, match="base serves policy p1:ab12 already"):
        await lineage.rollback(stage.store, "p1:ab12", None, actor="test", reason="x", max_attempts=2)
    await stage.offer("own", policy="p1:ab12")
    await stage.publisher.round()
    assert (await stage.live("p1:ab12"), await stage.live("p1")) == ("own", BASE_RELEASE)
    await lineage.rollback(stage.store, "p1:ab12", None, actor="test", reason="x", max_attempts=2)
    assert await stage.live("p1:ab12") == BASE_RELEASE


async def test_a_policy_without_a_release_is_not_looked_at(stage: Stage) -> None:
    assert await lineage.deployed(stage.store) == []
    await stage.offer("good1")
    assert [deployment.policy_id for deployment in await lineage.deployed(stage.store)] == ["p1"]
    assert await lineage.wanted(stage.store) == {}
    await stage.publisher.round()
    wanted = await lineage.wanted(stage.store)
    assert [release.release_id for release in wanted["p1"]] == ["good1"]


# --------------------------------------------------------------------------------------------- what is served


async def test_a_restarted_engine_has_everything_again_after_a_round(stage: Stage) -> None:
    await stage.offer("good1")
    await stage.publisher.round()
    stage.server.adapters.clear()
    await stage.publisher.round()
    assert set(stage.server.adapters) == {"good1"}


async def test_what_retired_is_unloaded_when_it_has_drained(stage: Stage) -> None:
    for release_id in ("good1", "good2"):
        await stage.offer(release_id)
        await stage.publisher.round()
    await stage.publisher.round()
    assert set(stage.server.adapters) == {"good1", "good2"}
    stage.options(drain_s=0.0)
    await stage.publisher.round()
    assert set(stage.server.adapters) == {"good2"}


async def test_adapters_of_others_are_left_alone(stage: Stage) -> None:
    stage.options(drain_s=0.0)
    stage.server.adapters["somebody's"] = "x"
    await stage.publisher.round()
    assert set(stage.server.adapters) == {"somebody's"}


async def test_a_live_release_that_answers_nothing_is_rolled_back(stage: Stage) -> None:
    await stage.offer("good1")
    await stage.publisher.round()
    await stage.offer("mute")  # it answers the probes, and not the canary prompt
    await stage.publisher.round()
    assert (await stage.live(), await stage.state("mute"), await stage.head()) == ("good1", S.ROLLED_BACK, "c1")
    assert await stage.reasons("mute") == (f"it answers {CANARY_PROMPT!r} with nothing",)


async def test_rolling_back_by_hand_is_followed(stage: Stage) -> None:
    stage.options(drain_s=0.0)
    await stage.offer("good1")
    await stage.publisher.round()
    await lineage.rollback(stage.store, "p1", BASE_RELEASE, actor="test", reason="by hand", max_attempts=2)
    await stage.publisher.round()
    assert stage.server.adapters == {}
    assert await stage.live() == BASE_RELEASE


async def test_an_engine_that_is_away_is_nobodys_fault(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    await stage.offer("good1")
    nowhere = Engine("http://127.0.0.1:1")
    publisher = Publisher(stage.publisher.settings, stage.store, nowhere, stage.publisher.renderer)
    for _ in range(4):
        await publisher.round()
    assert await stage.state("good1") is S.STAGED
    assert sum("waiting for the engine" in r.message for r in caplog.records) == 1
    publisher.engine = publisher.examiner.engine = stage.engine
    await publisher.round()
    assert await stage.live() == "good1"
    await nowhere.close()


async def test_no_request_fails_while_releases_change(stage: Stage) -> None:
    prompt = stage.publisher.renderer.render([Message("user", "Hi")])
    done = asyncio.Event()

    async def ask() -> int:
        n = 0
        while not done.is_set():
            found = await stage.engine.complete(prompt, Sampling(max_tokens=8), release=await stage.live())
            assert found.ids
            n += 1
        return n

    users = [asyncio.create_task(ask()) for _ in range(4)]
    for i in range(4):
        await stage.offer(f"good{i}")
        await stage.publisher.round()
    done.set()
    asked = sum(await asyncio.gather(*users))
    assert await stage.live() == "good3"
    assert asked > 8


# ------------------------------------------------------------------------------------------------ full weights


async def test_full_weights_are_examined_swapped_in_and_rolled_back(stage: Stage, tiny_model: Path) -> None:
    await stage.offer("whole", kind="full", path=str(tiny_model))
    await stage.publisher.round()
    assert (await stage.live(), stage.server.version) == ("whole", "whole")
    await lineage.rollback(stage.store, "p1", BASE_RELEASE, actor="test", reason="by hand", max_attempts=2)
    await stage.publisher.round()
    assert stage.server.version == BASE_RELEASE


async def test_full_weights_that_fail_give_way_to_what_served(stage: Stage, tiny_model: Path) -> None:
    await stage.offer("empty", kind="full", path=str(tiny_model))
    await stage.publisher.round()
    assert (await stage.state("empty"), stage.server.version) == (S.REJECTED, BASE_RELEASE)


# -------------------------------------------------------------------------------------------------------- role


async def test_the_role_publishes_until_told_to_stop(stage: Stage) -> None:
    await stage.offer("good1")
    stop = asyncio.Event()
    role = asyncio.create_task(run(stage.publisher.settings, stop))
    for _ in range(500):
        if await stage.live() == "good1":
            break
        await asyncio.sleep(0.02)
    stop.set()
    await asyncio.wait_for(role, 5)
    assert await stage.live() == "good1"
