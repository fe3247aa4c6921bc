"""The schema, as SQLAlchemy sees it. Its history is `migrations/` and nothing else; a test holds the two together.

Token arrays are little-endian binary (int32 ids, float32 logprobs with NaN for None), each token of a conversation
once: a turn holds what it adds beyond `shared_len` tokens of its parent. `parent_id` has no foreign key, since a child
may be recorded before its parent.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)
json_type = JSON().with_variant(JSONB(), "postgresql")
Id = String(64)


class json_length(GenericFunction[int]):
    """Items of a JSON list, which both databases count under two names."""

    type = Integer()
    inherit_cache = True


@compiles(json_length)
def _sqlite_length(call: json_length, compiler: SQLCompiler, **options: object) -> str:
    return f"json_array_length({compiler.process(call.clauses, **options)})"


@compiles(json_length, "postgresql")
def _postgresql_length(call: json_length, compiler: SQLCompiler, **options: object) -> str:
    return f"jsonb_array_length({compiler.process(call.clauses, **options)})"


def _id(name: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, Id, nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> Column[float]:
    return Column(name, Float(53), nullable=nullable)  # unix seconds


# ------------------------------------------------------------------------------------------- who and where

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", Id, primary_key=True),
    Column("name", String(200), nullable=False),
    Column("learn", Boolean, nullable=False, server_default=text("true")),
    Column("unstored", String(16), nullable=False, server_default="learn"),  # `store: false`: learn | keep | discard
    Column("policies", String(16), nullable=False, server_default="shared"),  # shared | own | subject
    Column("retention_s", Float),  # sessions idle for longer are deleted; NULL: never
    Column("hmac_key", LargeBinary, nullable=False),  # keys the prefix chains of this tenant
    _time("created_at"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("api_key_id", Id, primary_key=True),
    _id("tenant_id"),
    Column("key_hash", String(64), nullable=False, unique=True),  # sha256 hex; the key itself is shown once
    Column("label", String(200), nullable=False, server_default=text("''")),
    Column("scopes", json_type, nullable=False),  # agent, feedback, admin
    _time("created_at"),
    _time("revoked_at", nullable=True),  # from then on it is refused; a rotated key has a while left
    Column("requests_per_minute", Integer),
    Column("max_concurrency", Integer),
)

policies = Table(
    "policies",
    metadata,
    Column("policy_id", Id, primary_key=True),
    _id("tenant_id"),
    Column("name", String(200), nullable=False),  # what clients send as `model`
    Column("base_hash", String(64), nullable=False),
    Column("subject", String(256)),  # of a policy that one subject's lessons alone teach
    _id("head_checkpoint_id", nullable=True),  # NULL: the base itself
    Column("lineage", Integer, nullable=False, server_default="0"),  # counts how often the head was moved back
    Column("lease_owner", String(200)),
    Column("lease_epoch", Integer, nullable=False, server_default="0"),
    _time("lease_expires_at", nullable=True),
    _time("created_at"),
    UniqueConstraint("tenant_id", "name"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Id, primary_key=True),  # ours; the client's own id is a separate column
    _id("tenant_id"),
    Column("client_session_id", String(256)),
    _id("api_key_id", nullable=True),
    Column("subject", String(256)),
    _time("created_at"),
    _time("last_turn_at"),
    _time("closed_at", nullable=True),
    Index("ix_sessions_tenant_subject", "tenant_id", "subject"),
    Index("ix_sessions_client", "tenant_id", "client_session_id"),
    Index(
        "ix_sessions_open",
        "last_turn_at",
        sqlite_where=text("closed_at IS NULL"),
        postgresql_where=text("closed_at IS NULL"),
    ),
)

# ------------------------------------------------------------------------------------------- what happened

turns = Table(
    "turns",
    metadata,
    Column("turn_id", Id, primary_key=True),
    _id("session_id"),
    _id("tenant_id"),
    _id("policy_id"),
    _id("api_key_id", nullable=True),
    Column("subject", String(256)),
    _id("parent_id", nullable=True),
    Column("shared_len", Integer, nullable=False),
    Column("shared_messages", Integer, nullable=False),
    Column("fork_reason", String(64)),
    Column("session_rule", String(64), nullable=False),
    Column("client_session_id", String(256)),
    Column("retrievable", Boolean, nullable=False, server_default=text("true")),
    Column("chain", String(64), nullable=False),
    Column("prompt_ids", LargeBinary, nullable=False),
    Column("response_ids", LargeBinary, nullable=False),
    Column("behavior_logprobs", LargeBinary, nullable=False),
    Column("kept_mass", LargeBinary),
    Column("spans", json_type, nullable=False),
    Column("messages", json_type, nullable=False),
    Column("answer", json_type, nullable=False),
    Column("tools", json_type, nullable=False),
    Column("sampling", json_type, nullable=False),
    Column("finish", String(16), nullable=False),
    Column("no_lesson", String(64)),
    _time("created_at"),
    Column("duration_s", Float),
    Column("first_token_s", Float),
    # evidence: raised by each child and each feedback; the judge works on turns whose evidence is ahead of it
    Column("evidence_revision", Integer, nullable=False, server_default="0"),
    Column("judged_revision", Integer, nullable=False, server_default="0"),
    _time("judge_lease_until", nullable=True),
    CheckConstraint("shared_len >= 0", name="shared_len"),
    Index("ix_turns_parent", "parent_id"),
    Index("ix_turns_session", "session_id", "created_at"),
    Index("ix_turns_chain", "tenant_id", "chain"),
    Index(
        "ix_turns_unjudged",
        "created_at",
        sqlite_where=text("evidence_revision > judged_revision"),
        postgresql_where=text("evidence_revision > judged_revision"),
    ),
)

feedback = Table(
    "feedback",
    metadata,
    Column("feedback_id", String(128), primary_key=True),
    Column("tenant_id", Id, primary_key=True),
    _id("turn_id", nullable=True),
    _id("session_id", nullable=True),
    Column("name", String(200), nullable=False),
    Column("value", Float),
    Column("label", String(200)),
    Column("comment", Text),
    Column("correction", Text),
    Column("source", String(64), nullable=False),
    Column("retracted", Boolean, nullable=False),
    _time("created_at"),
    Index("ix_feedback_turn", "turn_id"),
    Index("ix_feedback_session", "session_id"),
)

journals = Table(
    "journals",
    metadata,
    Column("journal_id", Id, primary_key=True),
    Column("watermark", Integer, nullable=False),  # every record up to this one is in SQL
)

arrivals = Table(  # records above the watermark that are in SQL already; pruned as the watermark passes them
    "arrivals",
    metadata,
    Column("journal_id", Id, primary_key=True),
    Column("seq", Integer, primary_key=True),
)

dead_letters = (
    Table(  # records that SQL refused or that could not be read: kept, passed by the watermark, repaired by hand
        "dead_letters",
        metadata,
        Column("journal_id", Id, primary_key=True),
        Column("seq", Integer, primary_key=True),
        Column("payload", LargeBinary, nullable=False),
        Column("error", Text, nullable=False),
        _time("created_at"),
    )
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("kind", String(16), primary_key=True),  # session | turn | subject | tenant | name | late: see burial.py
    Column("target_id", String(256), primary_key=True),
    _time("created_at"),
    Index("ix_tombstones_created", "created_at"),
)

# ------------------------------------------------------------------------------------------- what it teaches

verdicts = Table(
    "verdicts",
    metadata,
    Column("turn_id", Id, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("source", String(32), nullable=False),
    Column("score", Integer),
    Column("hint", Text),
    Column("related", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    _time("created_at"),
    CheckConstraint("score IS NULL OR score IN (-1, 0, 1)", name="score"),
)

preferences = Table(  # standing feedback of a subject: asked before and not taken back
    "preferences",
    metadata,
    Column("preference_id", Id, primary_key=True),
    _id("tenant_id"),
    _id("policy_id"),
    Column("subject", String(256), nullable=False),
    _id("turn_id"),
    Column("text", Text, nullable=False),
    _time("created_at"),
    _time("retracted_at", nullable=True),
    UniqueConstraint("policy_id", "tenant_id", "subject", "text"),
)

lessons = Table(
    "lessons",
    metadata,
    Column("lesson_id", Id, primary_key=True),
    _id("policy_id"),
    Column("target_id", Id, nullable=False),  # a turn, or a group of turns claimed whole
    Column("revision", Integer, nullable=False),
    Column("method", String(64), nullable=False),
    Column("state", String(16), nullable=False),  # ready | claimed | used | dropped
    Column("attempts", Integer, nullable=False, server_default="0"),  # fresh uses that were cut off with their branch
    Column("claim_epoch", Integer),  # the lease epoch of the learner that holds it
    _time("created_at"),
    UniqueConstraint("target_id", "revision", "method"),
    Index("ix_lessons_ready", "policy_id", "state", "created_at"),
)

lesson_uses = Table(
    "lesson_uses",
    metadata,
    Column("use_id", Id, primary_key=True),
    _id("lesson_id"),
    _id("policy_id"),
    _id("checkpoint_id"),
    Column("step", Integer, nullable=False),
    Column("kind", String(8), nullable=False),  # fresh | replay
    _time("created_at"),
    _time("returned_at", nullable=True),  # its branch was cut off
    Index("ix_lesson_uses_lesson", "lesson_id"),
    Index("ix_lesson_uses_checkpoint", "checkpoint_id"),
    Index(
        "uq_lesson_uses_fresh",
        "lesson_id",
        "policy_id",
        unique=True,
        sqlite_where=text("kind = 'fresh' AND returned_at IS NULL"),
        postgresql_where=text("kind = 'fresh' AND returned_at IS NULL"),
    ),
)

drops = Table(
    "drops",
    metadata,
    Column("drop_id", Id, primary_key=True),
    _id("lesson_id"),
    _id("policy_id"),
    Column("reason", String(64), nullable=False),
    Column("detail", Text, nullable=False, server_default=text("''")),
    _time("created_at"),
    Index("ix_drops_lesson", "lesson_id"),
)

# ------------------------------------------------------------------------------------------- when it ships

steps = Table(
    "steps",
    metadata,
    Column("policy_id", Id, primary_key=True),
    Column("checkpoint_id", Id, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("metrics", json_type, nullable=False),
    _time("created_at"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("checkpoint_id", String(64), primary_key=True),  # hash of the folder's content
    _id("policy_id"),
    _id("parent_id", nullable=True),
    Column("step", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("method", String(64), nullable=False),
    Column("lease_epoch", Integer, nullable=False),
    Column("rejected", Boolean, nullable=False, server_default=text("false")),
    _time("created_at"),
    Index("ix_checkpoints_policy", "policy_id", "step"),
    Index("ix_checkpoints_parent", "parent_id"),
)

releases = Table(
    "releases",
    metadata,
    Column("release_id", Id, primary_key=True),
    _id("policy_id"),
    _id("checkpoint_id"),
    Column("kind", String(16), nullable=False),  # adapter | full
    Column("path", Text, nullable=False),
    Column("base_hash", String(64), nullable=False),
    Column("tokenizer_hash", String(64), nullable=False),
    Column("checksum", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("reasons", json_type, nullable=False),
    _time("created_at"),
    _time("state_at"),
    Index("ix_releases_policy_state", "policy_id", "state", "created_at"),
    UniqueConstraint("checkpoint_id", "kind"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("policy_id", Id, primary_key=True),
    Column("live_release_id", Id, nullable=False),  # or "base"
    Column("canary_release_id", Id),
    Column("canary_share", Float, nullable=False, server_default="0"),
    Column("generation", Integer, nullable=False),  # raised by every change of this row
    _time("updated_at"),
)

exams = Table(
    "exams",
    metadata,
    Column("exam_id", Id, primary_key=True),
    _id("release_id"),
    Column("passed", Boolean, nullable=False),
    Column("reasons", json_type, nullable=False),
    Column("report", json_type, nullable=False),
    _time("created_at"),
    Index("ix_exams_release", "release_id"),
)

audit = Table(  # who changed what is served, when and why
    "audit",
    metadata,
    Column("audit_id", Id, primary_key=True),
    _time("created_at"),
    Column("actor", String(200), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(256), nullable=False),
    Column("detail", Text, nullable=False, server_default=text("''")),
)

episodes = Table(
    "episodes",
    metadata,
    Column("episode_id", Id, primary_key=True),
    _id("policy_id"),
    Column("group_id", Id),
    Column("environment", String(200), nullable=False),
    Column("task", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reward", Float),
    Column("reason", Text),
    _time("created_at"),
    _time("finished_at", nullable=True),
    Index("ix_episodes_group", "group_id"),
)
