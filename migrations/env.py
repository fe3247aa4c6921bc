"""Alembic's entry: migrates over the connection handed in, or over `-x url=…` on alembic's own command line.

A new revision: change `agent_rl/experience/tables.py`, then, against a database at head,
`alembic -x url=sqlite+aiosqlite:///scratch.db revision --autogenerate -m "what changes"`.
"""

from __future__ import annotations

import asyncio

from alembic import context
from sqlalchemy import Connection

from agent_rl.experience.database import connect, writer
from agent_rl.experience.tables import metadata


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_type=True,
        compare_server_default=True,
        render_as_batch=connection.dialect.name == "sqlite",  # SQLite cannot alter most things in place
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_over(url: str) -> None:
    engine = connect(url)
    try:
        async with writer(engine).begin() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


if context.config.attributes.get("connection") is not None:
    run(context.config.attributes["connection"])
else:
    asyncio.run(run_over(context.get_x_argument(as_dictionary=True)["url"]))
