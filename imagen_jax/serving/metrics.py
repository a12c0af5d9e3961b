"""Prometheus metrics of the server: jobs, images, batches, the queue and open connections."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Prometheus' own defaults end at 10 s; a batch of a large cascade takes minutes.
BATCH_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The metrics, in a registry of their own."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = CollectorRegistry()
        of = {"registry": self.registry, "namespace": "imagen"}
        self.jobs = Counter("jobs", "Jobs that have ended, by state.", ["state"], **of)
        self.images = Counter("images", "Images of jobs that are done.", **of)
        self.refused = Counter("refused", "Responses of 4xx and 5xx, by status.", ["status"], **of)
        self.batch_seconds = Histogram(
            "batch_seconds", "Time of a batch through the cascade.", buckets=BATCH_SECONDS, **of
        )
        self._of = of

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(name, text, **self._of).set_function(read)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
