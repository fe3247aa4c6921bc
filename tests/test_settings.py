"""Options: each is a decision, so each stands here by name; where values come from; what is refused and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from agent_rl.settings import Settings, SettingsError, explain, load, option_names

OPTIONS = """
home
log_level
gateway.host
gateway.port
gateway.require_key
gateway.max_body_bytes
gateway.max_prompt_tokens
gateway.default_max_tokens
gateway.max_concurrency
gateway.request_timeout_s
gateway.keepalive_s
gateway.adapter_wait_s
gateway.cache_s
gateway.heads_in_memory
gateway.head_ttl_s
gateway.outbox_ttl_s
gateway.outbox_grace_s
gateway.body_timeout_s
gateway.stall_timeout_s
gateway.cors_origins
engine.url
engine.admin_key
engine.kind
engine.script
engine.model
engine.port
engine.device
engine.dtype
engine.threads
engine.max_batch
engine.max_queue
engine.max_context
engine.prefix_cache_mb
store.database
store.redis
store.stream
store.segment_bytes
store.recorder_batch
store.session_idle_s
judge.batch
judge.poll_s
judge.lease_s
learner.enabled
learner.tuning
learner.lora.rank
learner.lora.alpha
learner.lora.targets
learner.method.type
learner.method.divergence
learner.method.beta
learner.method.top_k
learner.method.advantage_clip
learner.method.ratio_cap
learner.method.hindsight
learner.method.min_gap
learner.method.check_teacher
learner.method.reanswers
learner.teacher
learner.ema_rate
learner.lr
learner.lessons_per_step
learner.max_wait_s
learner.replays_per_step
learner.steps_per_checkpoint
learner.max_staleness
learner.max_attempts
learner.max_tokens
learner.grad_clip
learner.weight_decay
learner.device
learner.dtype
learner.threads
learner.lease_s
learner.seed
release.auto
release.probes
release.probe_max_tokens
release.max_empty_rate
release.max_repetition
release.max_truncation_increase
release.min_length_ratio
release.max_perplexity_ratio
release.max_kl_to_live
release.min_on_topic
release.poll_s
release.drain_s
""".split()


def test_the_options_are_these() -> None:
    assert sorted(option_names()) == sorted(OPTIONS)


def fields(model: type[BaseModel]) -> list[tuple[str, str | None]]:
    found = []
    for name, info in model.model_fields.items():
        found.append((f"{model.__name__}.{name}", info.description))
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += fields(info.annotation)
    return found


def test_every_option_is_documented_under_its_field() -> None:
    assert [name for name, description in fields(Settings) if not description] == []


def test_command_line_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[gateway]\nport = 1\nmax_concurrency = 2\n[learner]\nlr = 3e-4\n")
    monkeypatch.setenv("AGENT_RL_GATEWAY__PORT", "4")
    monkeypatch.setenv("AGENT_RL_GATEWAY__MAX_CONCURRENCY", "5")
    settings = load(file, {"gateway.port": "6"})
    assert (settings.gateway.port, settings.gateway.max_concurrency, settings.learner.lr) == (6, 5, 3e-4)
    where = {name: source for name, _, source in explain(file, {"gateway.port": "6"})}
    assert where["gateway.port"] == "command line"
    assert where["gateway.max_concurrency"] == "environment"
    assert where["learner.lr"] == str(file)
    assert where["learner.seed"] == "default"


def test_unknown_keys_are_errors_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[gateway]\nprot = 1\n")
    with pytest.raises(SettingsError, match=r"gateway\.prot"):
        load(file)
    with pytest.raises(SettingsError, match=r"learner\.lora\.rnak"):
        load(None, {"learner.lora.rnak": 3})
    monkeypatch.setenv("AGENT_RL_LEARNER__RL", "1")
    with pytest.raises(SettingsError, match="AGENT_RL_LEARNER__RL"):
        load()


def test_a_bad_value_is_named_with_what_was_got() -> None:
    with pytest.raises(SettingsError, match=r"gateway\.port.*'many'"):
        load(None, {"gateway.port": "many"})


def test_a_file_that_is_not_toml_or_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("port: 1")
    with pytest.raises(SettingsError, match="not TOML"):
        load(tmp_path / "bad.toml")


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_RL_ENGINE__ADMIN_KEY", "very-secret")
    assert "very-secret" not in str(list(explain())) + repr(load())
