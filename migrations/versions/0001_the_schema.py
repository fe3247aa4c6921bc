"""The schema of the first version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

json_type = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("api_key_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_hash", sa.String(length=64), nullable=False),
        sa.Column("label", sa.String(length=200), server_default=sa.text("''"), nullable=False),
        sa.Column("scopes", json_type, nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("revoked_at", sa.Float(precision=53), nullable=True),
        sa.PrimaryKeyConstraint("api_key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_hash", name=op.f("uq_api_keys_key_hash")),
    )
    op.create_table(
        "arrivals",
        sa.Column("journal_id", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("journal_id", "seq", name=op.f("pk_arrivals")),
    )
    op.create_table(
        "audit",
        sa.Column("audit_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=256), nullable=False),
        sa.Column("detail", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("audit_id", name=op.f("pk_audit")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("parent_id", sa.String(length=64), nullable=True),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("lease_epoch", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_checkpoints")),
    )
    op.create_index("ix_checkpoints_parent", "checkpoints", ["parent_id"], unique=False)
    op.create_index("ix_checkpoints_policy", "checkpoints", ["policy_id", "step"], unique=False)
    op.create_table(
        "dead_letters",
        sa.Column("journal_id", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("journal_id", "seq", name=op.f("pk_dead_letters")),
    )
    op.create_table(
        "deployments",
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("live_release_id", sa.String(length=64), nullable=False),
        sa.Column("canary_release_id", sa.String(length=64), nullable=True),
        sa.Column("canary_share", sa.Float(), server_default="0", nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("policy_id", name=op.f("pk_deployments")),
    )
    op.create_table(
        "drops",
        sa.Column("drop_id", sa.String(length=64), nullable=False),
        sa.Column("lesson_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("drop_id", name=op.f("pk_drops")),
    )
    op.create_index("ix_drops_lesson", "drops", ["lesson_id"], unique=False)
    op.create_table(
        "episodes",
        sa.Column("episode_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("group_id", sa.String(length=64), nullable=True),
        sa.Column("environment", sa.String(length=200), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reward", sa.Float(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("finished_at", sa.Float(precision=53), nullable=True),
        sa.PrimaryKeyConstraint("episode_id", name=op.f("pk_episodes")),
    )
    op.create_index("ix_episodes_group", "episodes", ["group_id"], unique=False)
    op.create_table(
        "exams",
        sa.Column("exam_id", sa.String(length=64), nullable=False),
        sa.Column("release_id", sa.String(length=64), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("reasons", json_type, nullable=False),
        sa.Column("report", json_type, nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("exam_id", name=op.f("pk_exams")),
    )
    op.create_index("ix_exams_release", "exams", ["release_id"], unique=False)
    op.create_table(
        "feedback",
        sa.Column("feedback_id", sa.String(length=128), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("turn_id", sa.String(length=64), nullable=True),
        sa.Column("session_id", sa.String(length=64), nullable=True),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("label", sa.String(length=200), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("correction", sa.Text(), nullable=True),
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("retracted", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("feedback_id", "tenant_id", name=op.f("pk_feedback")),
    )
    op.create_index("ix_feedback_session", "feedback", ["session_id"], unique=False)
    op.create_index("ix_feedback_turn", "feedback", ["turn_id"], unique=False)
    op.create_table(
        "journals",
        sa.Column("journal_id", sa.String(length=64), nullable=False),
        sa.Column("watermark", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("journal_id", name=op.f("pk_journals")),
    )
    op.create_table(
        "lesson_uses",
        sa.Column("use_id", sa.String(length=64), nullable=False),
        sa.Column("lesson_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("returned_at", sa.Float(precision=53), nullable=True),
        sa.PrimaryKeyConstraint("use_id", name=op.f("pk_lesson_uses")),
    )
    op.create_index("ix_lesson_uses_checkpoint", "lesson_uses", ["checkpoint_id"], unique=False)
    op.create_index("ix_lesson_uses_lesson", "lesson_uses", ["lesson_id"], unique=False)
    op.create_index(
        "uq_lesson_uses_fresh",
        "lesson_uses",
        ["lesson_id", "policy_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'fresh' AND returned_at IS NULL"),
        postgresql_where=sa.text("kind = 'fresh' AND returned_at IS NULL"),
    )
    op.create_table(
        "lessons",
        sa.Column("lesson_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("target_id", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("claim_epoch", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("lesson_id", name=op.f("pk_lessons")),
        sa.UniqueConstraint("target_id", "revision", "method", name=op.f("uq_lessons_target_id_revision_method")),
    )
    op.create_index("ix_lessons_ready", "lessons", ["policy_id", "state", "created_at"], unique=False)
    op.create_table(
        "policies",
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("base_hash", sa.String(length=64), nullable=False),
        sa.Column("head_checkpoint_id", sa.String(length=64), nullable=True),
        sa.Column("lineage", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_owner", sa.String(length=200), nullable=True),
        sa.Column("lease_epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_expires_at", sa.Float(precision=53), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("policy_id", name=op.f("pk_policies")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_policies_tenant_id_name")),
    )
    op.create_table(
        "preferences",
        sa.Column("preference_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=256), nullable=False),
        sa.Column("turn_id", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("retracted_at", sa.Float(precision=53), nullable=True),
        sa.PrimaryKeyConstraint("preference_id", name=op.f("pk_preferences")),
        sa.UniqueConstraint("policy_id", "subject", "text", name=op.f("uq_preferences_policy_id_subject_text")),
    )
    op.create_table(
        "releases",
        sa.Column("release_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("base_hash", sa.String(length=64), nullable=False),
        sa.Column("tokenizer_hash", sa.String(length=64), nullable=False),
        sa.Column("checksum", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("reasons", json_type, nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("state_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("release_id", name=op.f("pk_releases")),
        sa.UniqueConstraint("checkpoint_id", "kind", name=op.f("uq_releases_checkpoint_id_kind")),
    )
    op.create_index("ix_releases_policy_state", "releases", ["policy_id", "state", "created_at"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("client_session_id", sa.String(length=256), nullable=True),
        sa.Column("api_key_id", sa.String(length=64), nullable=True),
        sa.Column("subject", sa.String(length=256), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("last_turn_at", sa.Float(precision=53), nullable=False),
        sa.Column("closed_at", sa.Float(precision=53), nullable=True),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    op.create_index("ix_sessions_tenant_subject", "sessions", ["tenant_id", "subject"], unique=False)
    op.create_table(
        "steps",
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("metrics", json_type, nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("policy_id", "checkpoint_id", "step", name=op.f("pk_steps")),
    )
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("learn", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("hmac_key", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_tenants")),
    )
    op.create_table(
        "tombstones",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("target_id", sa.String(length=256), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("kind", "target_id", name=op.f("pk_tombstones")),
    )
    op.create_table(
        "turns",
        sa.Column("turn_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=64), nullable=False),
        sa.Column("api_key_id", sa.String(length=64), nullable=True),
        sa.Column("subject", sa.String(length=256), nullable=True),
        sa.Column("parent_id", sa.String(length=64), nullable=True),
        sa.Column("shared_len", sa.Integer(), nullable=False),
        sa.Column("shared_messages", sa.Integer(), nullable=False),
        sa.Column("fork_reason", sa.String(length=64), nullable=True),
        sa.Column("session_rule", sa.String(length=64), nullable=False),
        sa.Column("chain", sa.String(length=64), nullable=False),
        sa.Column("prompt_ids", sa.LargeBinary(), nullable=False),
        sa.Column("response_ids", sa.LargeBinary(), nullable=False),
        sa.Column("behavior_logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("kept_mass", sa.LargeBinary(), nullable=True),
        sa.Column("spans", json_type, nullable=False),
        sa.Column("messages", json_type, nullable=False),
        sa.Column("answer", json_type, nullable=False),
        sa.Column("tools", json_type, nullable=False),
        sa.Column("sampling", json_type, nullable=False),
        sa.Column("finish", sa.String(length=16), nullable=False),
        sa.Column("no_lesson", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("duration_s", sa.Float(), nullable=True),
        sa.Column("first_token_s", sa.Float(), nullable=True),
        sa.Column("evidence_revision", sa.Integer(), server_default="0", nullable=False),
        sa.Column("judged_revision", sa.Integer(), server_default="0", nullable=False),
        sa.Column("judge_lease_until", sa.Float(precision=53), nullable=True),
        sa.CheckConstraint("shared_len >= 0", name=op.f("ck_turns_shared_len")),
        sa.PrimaryKeyConstraint("turn_id", name=op.f("pk_turns")),
    )
    op.create_index("ix_turns_chain", "turns", ["tenant_id", "chain"], unique=False)
    op.create_index("ix_turns_parent", "turns", ["parent_id"], unique=False)
    op.create_index("ix_turns_session", "turns", ["session_id", "created_at"], unique=False)
    op.create_index(
        "ix_turns_unjudged",
        "turns",
        ["created_at"],
        unique=False,
        sqlite_where=sa.text("evidence_revision > judged_revision"),
        postgresql_where=sa.text("evidence_revision > judged_revision"),
    )
    op.create_table(
        "verdicts",
        sa.Column("turn_id", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=32), nullable=False),
        sa.Column("score", sa.Integer(), nullable=True),
        sa.Column("hint", sa.Text(), nullable=True),
        sa.Column("related", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.CheckConstraint("score IS NULL OR score IN (-1, 0, 1)", name=op.f("ck_verdicts_score")),
        sa.PrimaryKeyConstraint("turn_id", "revision", name=op.f("pk_verdicts")),
    )


def downgrade() -> None:
    op.drop_table("verdicts")
    op.drop_table("turns")
    op.drop_table("tombstones")
    op.drop_table("tenants")
    op.drop_table("steps")
    op.drop_table("sessions")
    op.drop_table("releases")
    op.drop_table("preferences")
    op.drop_table("policies")
    op.drop_table("lessons")
    op.drop_table("lesson_uses")
    op.drop_table("journals")
    op.drop_table("feedback")
    op.drop_table("exams")
    op.drop_table("episodes")
    op.drop_table("drops")
    op.drop_table("deployments")
    op.drop_table("dead_letters")
    op.drop_table("checkpoints")
    op.drop_table("audit")
    op.drop_table("arrivals")
    op.drop_table("api_keys")
