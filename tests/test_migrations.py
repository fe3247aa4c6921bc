"""The schema's history leads to the schema that the code knows, forwards and back."""

from __future__ import annotations

import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect

from agent_rl.experience.database import connect, downgrade, upgrade, writer
from agent_rl.experience.store import Store, migrate
from agent_rl.experience.tables import metadata


def drift(connection: Connection) -> list[object]:
    options = {"compare_type": True, "compare_server_default": True}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names()) - {"alembic_version"}


async def test_up_check_down_up(any_database_url: str) -> None:
    engine = connect(any_database_url)
    async with writer(engine).begin() as connection:
        await connection.run_sync(upgrade)
        assert await connection.run_sync(tables) == set(metadata.tables)
        assert await connection.run_sync(drift) == []
        await connection.run_sync(downgrade, "base")
        assert await connection.run_sync(tables) == set()
        await connection.run_sync(upgrade)
        assert await connection.run_sync(drift) == []
    await engine.dispose()


async def test_indexes_and_constraints_have_the_names_that_the_code_gives_them(any_database_url: str) -> None:
    await migrate(any_database_url)
    engine = connect(any_database_url)
    async with engine.begin() as connection:
        found = await connection.run_sync(
            lambda c: {(t, i["name"], i["unique"]) for t in tables(c) for i in inspect(c).get_indexes(t)}
        )
    await engine.dispose()
    declared = {(t.name, i.name, bool(i.unique)) for t in metadata.tables.values() for i in t.indexes}
    assert declared <= {(table, name, bool(unique)) for table, name, unique in found}


async def test_two_processes_may_migrate_at_once(any_database_url: str) -> None:
    await asyncio.gather(migrate(any_database_url), migrate(any_database_url))
    await (await Store.open(any_database_url)).close()


async def test_a_database_that_is_not_migrated_is_refused_with_what_to_do(any_database_url: str) -> None:
    with pytest.raises(RuntimeError, match="has schema revision None, this version needs 0002: run `agent-rl serve`"):
        await Store.open(any_database_url)
