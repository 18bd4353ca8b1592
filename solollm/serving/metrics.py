"""What `/metrics` shows, for Prometheus: requests, tokens, waits, what the guard did, and the
engines' health.

No text, no key and no address of a client is ever a label.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from solollm.serving.answering import Timing
from solollm.serving.token_engine import TokenEngine

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# What filters did: (part, rule, action) to a count that grows.
Interventions = Mapping[tuple[str, str, str], int]
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One server's counters; nothing is shared between servers of one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, interventions: Interventions = MappingProxyType({})) -> None:
        """`interventions`: read anew whenever the page is asked for."""
        self._registry = registry = CollectorRegistry()
        registry.register(_Guard(interventions))
        self.requests = Counter(
            "solollm_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self._prompt = Counter(
            "solollm_prompt_tokens", "Prompt tokens read", ["model"], registry=registry
        )
        self._new = Counter("solollm_new_tokens", "Tokens made", ["model"], registry=registry)
        self._first = Histogram(
            "solollm_first_token_seconds", "Time to the first token", ["model"],
            registry=registry, buckets=_WAITS,
        )  # fmt: skip
        self._gap = Histogram(
            "solollm_between_tokens_seconds", "Time between a choice's batches of tokens",
            ["model"], registry=registry, buckets=_GAPS,
        )  # fmt: skip
        self.disconnects = Counter(
            "solollm_disconnects", "Clients that left before their answer ended", registry=registry
        )
        self._active = Gauge(
            "solollm_active_sequences", "Sequences under way or waiting", ["model"],
            registry=registry,
        )  # fmt: skip
        self._up = Gauge(
            "solollm_engine_up", "1 while the engine is ready", ["model"], registry=registry
        )
        self._restarts = Gauge(
            "solollm_engine_restarts", "How often the engine came back", ["model"],
            registry=registry,
        )  # fmt: skip

    def answered(self, model: str, prompt_tokens: int, new_tokens: int, timing: Timing) -> None:
        """Note a generation that has ended, by itself or because its client left."""
        self._prompt.labels(model).inc(prompt_tokens)
        self._new.labels(model).inc(new_tokens)
        moments = [moment for moment, _ in timing.moments]
        if moments:
            self._first.labels(model).observe(moments[0])
        for before, after in itertools.pairwise(moments):
            self._gap.labels(model).observe(after - before)

    def text(self, engines: Mapping[str, TokenEngine]) -> bytes:
        """The page, with the engines as they are now."""
        for name, engine in engines.items():
            self._active.labels(name).set(engine.num_active)
            self._up.labels(name).set(engine.state == "ready")
            self._restarts.labels(name).set(engine.num_restarts)
        return generate_latest(self._registry)


class _Guard(Collector):
    """The guard's own counts as a counter."""

    def __init__(self, interventions: Interventions) -> None:
        self._interventions = interventions

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "solollm_guard_interventions", "What the guard did to answers",
            labels=["part", "rule", "action"],
        )  # fmt: skip
        for labels, count in list(self._interventions.items()):  # filters run on other threads
            family.add_metric(labels, count)
        yield family
