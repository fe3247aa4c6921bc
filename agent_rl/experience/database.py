"""One database, SQLite or PostgreSQL: how it is connected, locked and migrated."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.dialects.sqlite.dml import Insert
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.sql.schema import Table

BUSY_S = 30.0  # how long a writer waits for another one on SQLite
MIGRATION_LOCK = 7_306_052_114  # any number: what two migrating processes meet at on PostgreSQL


class Refused(ValueError):
    """SQL rejects these values and always will; nothing was written."""


class StoreUnavailable(ConnectionError):
    """SQL is down, busy or broken; nothing was written and it is worth trying again."""


def connect(url: str) -> AsyncEngine:
    """An engine whose transactions begin where they say: SQLite's driver would begin them late and never for DDL."""
    if make_url(url).get_backend_name() != "sqlite":
        return create_async_engine(url, pool_pre_ping=True)
    engine = create_async_engine(url, connect_args={"timeout": BUSY_S})

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # the journal is trimmed after a commit: it has to be on disk
        cursor.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


async def empty_log(engine: AsyncEngine) -> None:
    """Move SQLite's write-ahead log into the file and empty it, so that no deleted page is left there.

    Raises StoreUnavailable where others read for too long: the log is as it was.
    """
    if engine.dialect.name != "sqlite":
        return
    try:
        async with engine.connect() as connection:
            await connection.exec_driver_sql("ROLLBACK")
            busy = (await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")).one()[0]
            await connection.exec_driver_sql("BEGIN")
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"SQLite's log cannot be emptied now: {error}") from error
    if busy:
        raise StoreUnavailable("SQLite's log cannot be emptied while others read: what was deleted is still in it")


def writer(engine: AsyncEngine) -> AsyncEngine:
    """The same connections, with transactions that take SQLite's write lock when they begin."""
    return engine.execution_options(immediate=True)


def refuses(error: StatementError) -> bool:
    """True where the database rejects these values and always will; False where it is down, busy or broken."""
    if not isinstance(error, DBAPIError):
        return True  # the values did not even reach the driver
    state = getattr(error.orig, "sqlstate", None) or ""
    unsendable = isinstance(getattr(error.orig, "__cause__", None), ValueError | OverflowError)
    return isinstance(error, IntegrityError | DataError) or state.startswith(("22", "23")) or unsendable


async def migrate(url: str) -> None:
    """Bring a database to the newest revision of `migrations/`, in one transaction; several may try at once."""
    if make_url(url).get_backend_name() == "sqlite" and (database := make_url(url).database):
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = connect(url)
    try:
        async with writer(engine).begin() as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            await connection.run_sync(upgrade)
    finally:
        await engine.dispose()


def upgrade(connection: Connection, revision: str = "head") -> None:
    command.upgrade(migrations(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    command.downgrade(migrations(connection), revision)


def migrations(connection: Connection | None = None) -> Config:
    """Alembic's configuration, without an alembic.ini, wherever this distribution is installed."""
    spec = find_spec("migrations")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package `migrations` is missing from this installation; install agent-rl again")
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(spec.origin).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def check_revision(connection: Connection) -> None:
    """Raises RuntimeError unless the schema is the one that this code was written for."""
    expected = ScriptDirectory.from_config(migrations()).get_current_head()
    found = MigrationContext.configure(connection).get_current_revision()
    if found != expected:
        raise RuntimeError(
            f"the database {connection.engine.url.render_as_string()} has schema revision {found}, this version needs "
            f"{expected}: run `agent-rl serve`, which migrates it, or call agent_rl.experience.store.migrate"
        )


def insert(connection: AsyncConnection, table: Table) -> Insert:
    """INSERT that knows ON CONFLICT, which both databases have under two names."""
    if connection.dialect.name == "postgresql":
        return postgresql_insert(table)  # type: ignore[return-value]  # same methods, no common base
    return sqlite_insert(table)
