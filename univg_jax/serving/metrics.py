"""What a server counts, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server.

    Pictures a second are `rate(univg_pictures_total[1m])`.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "univg_requests",
            "requests by route and status (499: the client left)",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "univg_request_seconds",
            "from the first byte of a request to the last of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.waiting = Gauge(
            "univg_queue_pictures", "pictures that wait or are being made", registry=registry
        )
        self.queue_seconds = Histogram(
            "univg_queue_seconds",
            "that a picture waited for its batch",
            ["task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "univg_batch_size",
            "pictures in a batch, without padding",
            ["task"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "univg_batch_seconds",
            "that a batch took",
            ["task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.pictures = Counter("univg_pictures", "pictures made", ["task"], registry=registry)
        self.ready = Gauge("univg_ready", "1 if all programs are compiled", registry=registry)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
