"""Metrics for Prometheus. No label holds a user's text: models, endpoints and codes are ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from runtime.engine.stats import Stats, TickReport

from .models import Model, Models, version

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TICK_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
ROWS = (1, 2, 4, 8, 16, 32, 64)
GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("live", "Samples that have taken a step and are not finished.", lambda s: s.live),
    ("waiting", "Samples that have taken no step yet.", lambda s: s.waiting),
    ("flows", "Users that have unfinished samples.", lambda s: s.flows),
    ("backlog_rows", "Network rows that are left.", lambda s: s.backlog_rows),
    ("backlog_seconds", "Predicted seconds that they take.", lambda s: s.backlog_seconds),
    ("tick_age_seconds", "How long the network call in progress runs.", lambda s: s.tick_seconds),
    ("pace", "Seconds that pass for each second that was predicted.", lambda s: s.pace),
)
COUNTERS: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("rows", "Network rows.", lambda s: s.rows),
    ("ticks", "Network calls.", lambda s: s.ticks),
    ("accepted", "Accepted tickets.", lambda s: s.accepted),
    ("done", "Finished tickets.", lambda s: s.done),
    ("failed", "Failed tickets, those whose deadline passed among them.", lambda s: s.failed),
    ("cancelled", "Cancelled tickets.", lambda s: s.cancelled),
    ("previews_dropped", "Previews that nobody took in time.", lambda s: s.previews_dropped),
)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint", "code")
        self._requests = Counter(
            "unnoise_requests", "HTTP requests.", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "unnoise_request_seconds",
            "Seconds from a request to the end of its response.",
            ("endpoint",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._queue = Histogram(
            "unnoise_queue_seconds",
            "Seconds from submission to the first step.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._gone = Counter(
            "unnoise_disconnects", "Clients that left early.", registry=self.registry
        )
        graph = ("model", "graph")
        self._tick = Histogram(
            "unnoise_tick_seconds",
            "Seconds of a network call.",
            graph,
            buckets=TICK_SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "unnoise_batch_rows",
            "Samples of a network call.",
            graph,
            buckets=ROWS,
            registry=self.registry,
        )

    def watch(self, models: Models) -> None:
        """Report the engines' own figures, too."""
        self.registry.register(_Engines(models))

    def tick(self, model: str, report: TickReport) -> None:
        """Enter a network call of a model."""
        graph = "guided" if report.guided else "plain"
        self._tick.labels(model, graph).observe(report.seconds)
        self._batch.labels(model, graph).observe(report.samples)

    def count(self, endpoint: str, code: int, seconds: float, queue_s: float | None) -> None:
        """Enter a request that has ended.

        Args:
            endpoint: The route's template.
            code: The status; 499 if the client left.
            seconds: That it took.
            queue_s: Seconds until its first step; None if it ran nothing.
        """
        self._requests.labels(endpoint, str(code)).inc()
        self._seconds.labels(endpoint).observe(seconds)
        if queue_s is not None:
            self._queue.observe(queue_s)
        if code == 499:
            self._gone.inc()

    def expose(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _Engines(Collector):
    """The figures of `Engine.stats`, read when they are asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        models = self._models.all.values()
        stats = [(model.name, model.engine.stats()) for model in models]
        for name, text, value in GAUGES:
            gauge = GaugeMetricFamily(f"unnoise_{name}", text, labels=["model"])
            for model, found in stats:
                gauge.add_metric([model], value(found))
            yield gauge
        for name, text, value in COUNTERS:
            counter = CounterMetricFamily(f"unnoise_{name}", text, labels=["model"])
            for model, found in stats:
                counter.add_metric([model], value(found))
            yield counter
        rejected = CounterMetricFamily(
            "unnoise_rejected", "Refused submissions by reason.", labels=["model", "why"]
        )
        for model, found in stats:
            for why, count in found.rejected.items():
                rejected.add_metric([model, why], count)
        yield rejected
        yield _info(models)


def _info(models: Iterable[Model]) -> Metric:
    info = InfoMetricFamily("unnoise", "What is served.", labels=["model"])
    for model in models:
        backend = model.sampler.backend
        values = {"version": version(), "backend": backend.name, "precision": backend.precision}
        info.add_metric([model.name], values)
    return info
