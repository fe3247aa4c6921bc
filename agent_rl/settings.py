"""Every option of agent-rl, each documented under its field. TOML file < environment < command line.

Environment names are `AGENT_RL_` and the path with two underscores: `AGENT_RL_LEARNER__LR=5e-4`. A key that is not
here is an error, wherever it stands. `load` reads all three; `explain` says where each value came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

ENV_PREFIX = "AGENT_RL_"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class GatewaySettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs `require_key`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    require_key: bool = True
    """Whether requests need an API key. Off is allowed on loopback alone."""
    max_body_bytes: int = Field(16 * 2**20, gt=0)
    """Largest request body; a larger one is answered 413."""
    max_prompt_tokens: int = Field(4096, gt=0)
    """Longest prompt in tokens, the engine's context permitting; a longer one is a 400."""
    default_max_tokens: int = Field(256, gt=0)
    """Tokens of an answer when the client does not say."""
    max_concurrency: int = Field(256, gt=0)
    """Requests being answered at once; one more gets 429."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Longest time one answer may take before it is aborted."""
    keepalive_s: float = Field(10.0, gt=0)
    """Silence on a stream before a comment line is sent so that proxies keep it open."""
    adapter_wait_s: float = Field(20.0, ge=0)
    """How long a request waits for a restarted engine to have its release again, before a 503."""
    cache_s: float = Field(1.0, ge=0)
    """Life of cached keys, policies and deployments; a revoked key may live twice as long."""
    heads_in_memory: int = Field(4096, gt=0)
    """Conversations whose token ids the gateway keeps, newest first; older ones come from Redis or SQL."""
    head_ttl_s: float = Field(3600.0, gt=0)
    """Life of a conversation's head in Redis."""
    outbox_ttl_s: float = Field(900.0, gt=0)
    """How long after its last sign of life an agent's socket can be resumed (`/v1/agent`)."""
    outbox_grace_s: float = Field(60.0, gt=0)
    """How long answers go on for an agent whose socket has dropped."""
    body_timeout_s: float = Field(60.0, gt=0)
    """Longest time the body of a request may take to arrive; a slower one is answered 408."""
    stall_timeout_s: float = Field(60.0, gt=0)
    """A client that sends half a header or reads nothing of its answer for so long is cut off."""
    cors_origins: tuple[str, ...] = ()
    """Web pages (scheme://host:port) that may call this server; none by default, and no `*`."""


class EngineSettings(Section):
    url: str | None = None
    """Address of an engine that runs elsewhere (SGLang or ours). Unset: ours is started."""
    admin_key: SecretStr | None = None
    """Key of the engine's administrative endpoints. Unset: one is made for the engine that we start."""
    kind: Literal["torch", "scripted"] = "torch"
    """Which of our engine servers to start: the real one, or the one that answers from a script."""
    script: Path | None = None
    """JSON script of the scripted engine."""
    model: Path | None = None
    """Folder of a Hugging Face causal language model. Unset: SmolLM2-135M-Instruct from its package."""
    port: int = Field(0, ge=0, le=65535)
    """Loopback port of the engine that we start; 0 takes a free one."""
    device: str = "cpu"
    """Torch device of the engine."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the base weights in the engine; `auto` measures which is faster here. Adapters are fp32."""
    threads: int = Field(0, ge=0)
    """Compute threads; 0 leaves one core to everything else."""
    max_batch: int = Field(16, gt=0)
    """Answers decoded at once; more wait in a queue."""
    max_queue: int = Field(256, gt=0)
    """Requests that wait for a place in the batch; one more is answered 503."""
    max_context: int = Field(2048, gt=0)
    """Longest prompt plus answer in tokens."""
    prefix_cache_mb: int = Field(512, ge=0)
    """Memory for the KV of finished conversations, reused by the next turn under the same release."""


class StoreSettings(Section):
    database: str | None = None
    """SQLAlchemy async URL. Unset: SQLite in the home folder."""
    redis: str | None = None
    """Redis URL. Unset: a private Redis is started on a socket in the home folder."""
    stream: str = "agent-rl:turns"
    """Name of the Redis stream."""
    segment_bytes: int = Field(16 * 2**20, gt=0)
    """Size at which a journal segment is closed."""
    recorder_batch: int = Field(256, gt=0)
    """Entries written in one SQL transaction."""
    session_idle_s: float = Field(1800.0, gt=0)
    """A session without a turn for so long is closed: nothing followed its last answer. A later turn reopens it."""


class JudgeSettings(Section):
    batch: int = Field(16, gt=0)
    """Turns judged per claim."""
    poll_s: float = Field(0.2, gt=0)
    """Pause when there is nothing to judge."""
    lease_s: float = Field(60.0, gt=0)
    """A claim that is older is taken over by another judge."""


class LoraSettings(Section):
    rank: int = Field(16, gt=0)
    """Rank of the adapter."""
    alpha: float = Field(32.0, gt=0)
    """Adapter scale is alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers, by the last part of their name, that carry an adapter."""


class MethodSettings(Section):
    type: Literal["user_hindsight"] = "user_hindsight"
    """Which method turns lessons into updates."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled"] = "reverse_kl"
    """What is minimised between student and teacher; `sampled` is the sampled-token advantage."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd`."""
    top_k: int = Field(0, ge=0)
    """Support: 0 is the whole vocabulary, K > 0 the student's K likeliest tokens and a bucket for the rest."""
    advantage_clip: float = Field(5.0, gt=0)
    """Largest |log-ratio| of the sampled-token advantage."""
    ratio_cap: float = Field(2.0, gt=0)
    """Cap of the truncated importance weight of the sampled-token objective."""
    hindsight: Literal["hint", "plain", "system"] = "hint"
    """How the follow-up is shown to the teacher."""
    min_gap: float = Field(0.02, ge=0)
    """Least mean reverse KL between student and teacher for a turn to be a lesson, in nats per token."""
    check_teacher: bool = True
    """Whether the teacher must do what was asked in its own re-answer before it may teach."""
    reanswers: float = Field(1.0, ge=0)
    """Weight of the teacher's re-answers, learned by forward KL beside the student's own answers; 0 leaves them out."""


class LearnerSettings(Section):
    enabled: bool = True
    """Whether `serve` starts a learner."""
    tuning: Literal["lora", "full"] = "lora"
    """An adapter over the frozen base, or all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter, where tuning is `lora`."""
    method: MethodSettings = MethodSettings()
    """The method and its own settings."""
    teacher: Literal["frozen", "ema", "live"] = "frozen"
    """Whose weights score the teacher view. `live` collapses at a useful learning rate, whatever the objective."""
    ema_rate: float = Field(0.02, gt=0, le=1)
    """Share of the student in each update of the `ema` teacher."""
    lr: float = Field(7e-4, gt=0)
    """Learning rate at `lessons_per_step` lessons; fewer lessons take the square root of their share."""
    lessons_per_step: int = Field(4, gt=0)
    """Fresh lessons in one update."""
    max_wait_s: float = Field(10.0, ge=0)
    """A lesson that has waited this long is learned with what there is."""
    replays_per_step: int = Field(0, ge=0)
    """Lessons used before that are shown again in each update, counted as replays."""
    steps_per_checkpoint: int = Field(2, gt=0)
    """Updates covered by one checkpoint and offered as one release."""
    max_staleness: int = Field(64, ge=0)
    """Most checkpoints that a turn's release may lie behind the head."""
    max_attempts: int = Field(2, ge=1)
    """Most fresh uses of a lesson: after the branch that used it was cut off it waits again, until then."""
    max_tokens: int = Field(1024, gt=0)
    """Longest prompt plus response that is trained on."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    device: str = "cpu"
    """Torch device of the learner."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the forward pass, chosen as the engine's; adapters, gradients and optimizer state are fp32."""
    threads: int = Field(1, gt=0)
    """Compute threads of the learner."""
    lease_s: float = Field(30.0, gt=0)
    """Life of the learner's lease on a policy; renewed at a third of it."""
    seed: int = 0
    """Seed of adapter initialisation and of the order of replays."""


class ReleaseSettings(Section):
    auto: bool = True
    """Whether a candidate that passes goes live by itself."""
    probes: int = Field(12, gt=0)
    """Probe questions asked in an exam."""
    probe_max_tokens: int = Field(48, gt=0)
    """Tokens allowed to a probe's answer."""
    max_empty_rate: float = Field(0.0, ge=0, le=1)
    """Most probes that may be answered with nothing."""
    max_repetition: float = Field(0.3, ge=0, le=1)
    """Highest mean share of repeated 3-grams in the probes' answers."""
    max_truncation_increase: float = Field(0.25, ge=0, le=1)
    """How much more often than live, and than the base, a candidate may run into the token limit."""
    min_length_ratio: float = Field(0.1, ge=0)
    """Least mean answer length, as a share of the base's."""
    max_perplexity_ratio: float = Field(1.05, gt=0)
    """Highest perplexity on the retention texts, as a multiple of the base's."""
    max_kl_to_live: float = Field(2.0, gt=0)
    """Highest mean KL from live on the candidate's own answers, nats per token."""
    min_on_topic: float = Field(0.8, ge=0, le=1)
    """Least share of (question, answer) pairs that the base finds likelier than the answer under another question."""
    poll_s: float = Field(0.5, gt=0)
    """How often the publisher compares what is wanted with what serves."""
    drain_s: float = Field(60.0, ge=0)
    """How long a retired adapter stays loaded for the answers that began with it."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__", use_attribute_docstrings=True
    )

    home: Path = Path(".agent-rl")
    """Folder of everything that is kept: database, Redis, journal, weights, key, logs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the roles log."""
    gateway: GatewaySettings = GatewaySettings()
    """The HTTP server that agents talk to."""
    engine: EngineSettings = EngineSettings()
    """What samples the answers."""
    store: StoreSettings = StoreSettings()
    """Journal, Redis and SQL."""
    judge: JudgeSettings = JudgeSettings()
    """What reads follow-ups."""
    learner: LearnerSettings = LearnerSettings()
    """What turns lessons into weights."""
    release: ReleaseSettings = ReleaseSettings()
    """What lets weights serve."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` reads file and environment, so that `explain` can tell them apart

    @property
    def database_url(self) -> str:
        return self.store.database or f"sqlite+aiosqlite:///{self.home.resolve() / 'agent-rl.db'}"

    @property
    def redis_url(self) -> str:
        return self.store.redis or f"unix://{self.home.resolve() / 'redis' / 'redis.sock'}"

    @property
    def smollm2_dir(self) -> Path:
        return self.home.resolve() / "models" / "smollm2-135m-instruct"

    @property
    def checkpoints_dir(self) -> Path:
        return self.home.resolve() / "checkpoints"

    @property
    def releases_dir(self) -> Path:
        return self.home.resolve() / "releases"


class SettingsError(ValueError):
    """An option is unknown or has a value that it cannot have; the message names the option."""


def load(file: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings from a TOML file (unset: `agent-rl.toml` here, if there is one), the environment, and dotted overrides.

    Raises SettingsError with every unknown key or bad value, in the words of the option.
    """
    merged: dict[str, Any] = {}
    for _, layer in _layers(file, overrides):
        _merge(merged, layer)
    try:
        return Settings(**merged)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise SettingsError("these settings cannot be used:\n  " + "\n  ".join(lines)) from error


def explain(file: Path | None = None, overrides: Mapping[str, object] | None = None) -> Iterator[tuple[str, Any, str]]:
    """Each option's dotted name, the value in force, and where it came from."""
    layers = [(where, dict(flatten(layer))) for where, layer in _layers(file, overrides)]
    for name, value in flatten(load(file, overrides).model_dump(mode="json")):
        yield name, value, next((where for where, layer in reversed(layers) if name in layer), "default")


def option_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every option, dotted."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from option_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested options as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _layers(file: Path | None, overrides: Mapping[str, object] | None) -> list[tuple[str, dict[str, Any]]]:
    """(where, options) from the weakest to the strongest."""
    path = file or Path("agent-rl.toml")
    if file and not file.exists():
        raise SettingsError(f"there is no settings file {file}; leave --config out or name one that exists")
    try:
        toml = TomlConfigSettingsSource(Settings, path)()
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    known = {ENV_PREFIX + name.replace(".", "__").upper() for name in option_names()}
    unknown = sorted(n for n in os.environ if n.startswith(ENV_PREFIX) and n not in known)
    if unknown:
        raise SettingsError(f"unknown options in the environment: {', '.join(unknown)}; see `agent-rl config show`")
    dotted: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        leaf = value
        for part in reversed(name.split(".")):
            leaf = {part: leaf}
        _merge(dotted, leaf)  # type: ignore[arg-type]
    return [(str(path), toml), ("environment", EnvSettingsSource(Settings)()), ("command line", dotted)]


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = dict(value) if isinstance(value, Mapping) else value
