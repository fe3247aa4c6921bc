"""What the gateway counts, in Prometheus' words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agent_rl.types import Turn

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """One registry per app, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running = Gauge("agent_rl_answers_running", "Answers being given", registry=self.registry)
        self._turns = Counter("agent_rl_turns", "Turns recorded", ["finish", "fork"], registry=self.registry)
        self._tokens = Counter("agent_rl_sampled_tokens", "Tokens sampled", registry=self.registry)
        self._refusals = Counter("agent_rl_refusals", "Requests refused", ["status"], registry=self.registry)
        self._first = Histogram(
            "agent_rl_first_token_seconds", "Time to the first token", buckets=SECONDS, registry=self.registry
        )
        self._whole = Histogram(
            "agent_rl_answer_seconds", "Time to the whole answer", buckets=SECONDS, registry=self.registry
        )

    @contextmanager
    def answering(self) -> Iterator[None]:
        self._running.inc()
        try:
            yield
        finally:
            self._running.dec()

    def ended(self, turn: Turn) -> None:
        self._turns.labels(turn.finish, turn.fork_reason or "none").inc()
        self._tokens.inc(len(turn.response_ids))
        if turn.first_token_s is not None:
            self._first.observe(turn.first_token_s)
        if turn.duration_s is not None:
            self._whole.observe(turn.duration_s)

    def refused(self, status: int) -> None:
        self._refusals.labels(str(status)).inc()

    def page(self) -> bytes:
        return generate_latest(self.registry)
