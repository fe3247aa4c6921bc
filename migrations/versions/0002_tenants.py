"""What tenants decide, limits of keys, policies of subjects; turns know their client's session."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OLD = "uq_preferences_policy_id_subject_text"
NEW = "uq_preferences_policy_id_tenant_id_subject_text"


def added() -> dict[str, list[sa.Column]]:
    return {
        "tenants": [
            sa.Column("unstored", sa.String(16), nullable=False, server_default="learn"),
            sa.Column("policies", sa.String(16), nullable=False, server_default="shared"),
            sa.Column("retention_s", sa.Float()),
        ],
        "api_keys": [sa.Column("requests_per_minute", sa.Integer()), sa.Column("max_concurrency", sa.Integer())],
        "policies": [sa.Column("subject", sa.String(256))],
        "turns": [
            sa.Column("client_session_id", sa.String(256)),
            sa.Column("retrievable", sa.Boolean(), nullable=False, server_default=sa.text("true")),
        ],
    }


def upgrade() -> None:
    for name, columns in added().items():
        for column in columns:
            op.add_column(name, column)
    with op.batch_alter_table("preferences") as table:
        table.drop_constraint(op.f(OLD), type_="unique")
        table.create_unique_constraint(op.f(NEW), ["policy_id", "tenant_id", "subject", "text"])
    is_open = sa.text("closed_at IS NULL")
    op.create_index("ix_sessions_open", "sessions", ["last_turn_at"], sqlite_where=is_open, postgresql_where=is_open)
    op.create_index("ix_sessions_client", "sessions", ["tenant_id", "client_session_id"])
    op.create_index("ix_tombstones_created", "tombstones", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_tombstones_created", "tombstones")
    op.drop_index("ix_sessions_client", "sessions")
    op.drop_index("ix_sessions_open", "sessions")
    with op.batch_alter_table("preferences") as table:
        table.drop_constraint(op.f(NEW), type_="unique")
        table.create_unique_constraint(op.f(OLD), ["policy_id", "subject", "text"])
    for name, columns in added().items():
        for column in columns:
            op.drop_column(name, column.name)
