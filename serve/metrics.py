"""Prometheus metrics of one ingress. Replicas send their figures along with every answer, so one address has it all."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.calls import ReplicaState, Reply

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters, gauges and histograms, each labelled by ``ingress``, so that the series of several never mix."""

    def __init__(self, ingress: str) -> None:
        self.registry = CollectorRegistry()
        self._ingress = ingress

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("ingress", *labels), registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ("ingress", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, ("ingress", *labels), registry=self.registry, buckets=buckets)

        self._requests = counter("ace_requests", "answered requests", "route", "status")
        self._seconds = histogram("ace_request_seconds", "time to answer, by route", _SECONDS, "route")
        self._stages = histogram("ace_stage_seconds", "time of a search by stage", _SECONDS, "stage")
        self._batch = histogram("ace_batch_queries", "queries decoded together", _COUNTS)
        self._beam = histogram("ace_beam_width", "beam width of a search", _COUNTS)
        self._in_flight = gauge("ace_searches_in_flight", "searches that wait or are being answered")
        self._rejected = counter("ace_rejected", "searches refused, by reason", "reason")
        self._empty = counter("ace_empty_results", "queries that found nothing")
        self._unsure = counter("ace_unconfident_results", "queries whose best score is below the threshold")
        self._snapshot = gauge("ace_snapshot_info", "1 for the snapshot that a replica serves", "replica", "snapshot")
        self._refused = gauge(
            "ace_snapshot_refused", "1 for a published snapshot that a replica refuses", "replica", "snapshot"
        )
        self._items = gauge("ace_snapshot_items", "items of the served snapshot", "modality")

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(self._ingress, route, str(status)).inc()
        self._seconds.labels(self._ingress, route).observe(seconds)

    def in_flight(self, count: int) -> None:
        self._in_flight.labels(self._ingress).set(count)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._ingress, reason).inc()

    def answered(self, reply: Reply, seconds: float) -> None:
        """A search that took ``seconds`` from the ingress's side: the rest of it is the way there and back."""
        for stage, spent in reply.stages.items():
            self._stages.labels(self._ingress, stage).observe(spent)
        self._stages.labels(self._ingress, "transport").observe(max(0.0, seconds - sum(reply.stages.values())))
        self._batch.labels(self._ingress).observe(reply.batch)
        self._beam.labels(self._ingress).observe(reply.beam)
        for hits in reply.results:
            if not hits:
                self._empty.labels(self._ingress).inc()
            elif hits[0].score < reply.threshold:
                self._unsure.labels(self._ingress).inc()

    def replicas(self, states: list[ReplicaState], items: dict[str, int]) -> None:
        """What is served now; replaces what was said before."""
        self._snapshot.clear()
        self._refused.clear()
        for state in states:
            self._snapshot.labels(self._ingress, state.replica, state.snapshot).set(1)
            if state.refused is not None:
                self._refused.labels(self._ingress, state.replica, state.refused).set(1)
        for modality, count in items.items():
            self._items.labels(self._ingress, modality).set(count)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
