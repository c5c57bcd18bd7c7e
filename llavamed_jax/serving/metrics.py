"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counts of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        name = lambda text: f"llavamed_{text}"
        self.requests = Counter(name("requests"), "Requests, by route and HTTP status", ["route", "status"],
                                registry=self.registry)
        self.gone = Counter(name("clients_gone"), "Clients that hung up before their answer was complete",
                            registry=self.registry)
        self.prompt = Counter(name("prompt_tokens"), "Positions of prompts, images included", registry=self.registry)
        self.cached = Counter(name("prefix_hit_tokens"), "Positions of prompts taken from another request's row",
                              registry=self.registry)
        self.hits = Counter(name("prefix_hits"), "Requests that shared a prefix", registry=self.registry)
        self.first = Histogram(name("time_to_first_token_seconds"), "From the queue to the first token",
                               buckets=_SECONDS, registry=self.registry)
        self.whole = Histogram(name("answer_seconds"), "From the queue to the end of the answer", buckets=_SECONDS,
                               registry=self.registry)

    def watch(self, service) -> None:
        """Reads the gauges from a service whenever they are asked for."""
        def gauge(name: str, text: str, value) -> None:
            Gauge(f"llavamed_{name}", text, registry=self.registry).set_function(value)

        gauge("ready", "1 if requests are answered", lambda: float(service.is_ready))
        gauge("queue_requests", "Requests that wait for a row", lambda: _of(service, "waiting"))
        gauge("rows_in_use", "Rows that generate", lambda: _of(service, "rows"))
        gauge("rows", "Rows", lambda: service.model.engine.batch_size if service.model is not None else 0)
        gauge("requests_under_way", "Requests that are read, prepared, queued or answered", lambda: service.under_way)
        self.registry.register(_Tokens(service))

    def ended(self, ticket) -> None:
        """Counts a ticket whose row is free again."""
        now = time.monotonic()
        self.prompt.inc(len(ticket.request.ids))
        if ticket.cached:
            self.hits.inc()
            self.cached.inc(ticket.cached)
        if ticket.first_token is not None:
            self.first.observe(ticket.first_token - ticket.arrived)
        self.whole.observe(now - ticket.arrived)

    def text(self) -> bytes:
        """Returns everything in Prometheus's text format."""
        return generate_latest(self.registry)


class _Tokens:
    """Generated tokens, which the scheduler counts; `rate()` over them is tokens a second."""

    def __init__(self, service):
        self._service = service

    def collect(self):
        yield CounterMetricFamily("llavamed_generated_tokens", "Generated tokens",
                                  value=_of(self._service, "tokens"))


def _of(service, name: str) -> float:
    return float(getattr(service.scheduler, name)) if service.scheduler is not None else 0.0
