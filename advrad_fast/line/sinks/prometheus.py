"""Metrics for Prometheus to fetch (the extra ``prometheus``)."""

from __future__ import annotations

from advrad_fast import checks
from advrad_fast.detector import Outcome
from advrad_fast.errors import SinkError
from advrad_fast.line.drift import Direction
from advrad_fast.line.results import StreamInspection

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Prometheus:
    """Serves metrics at ``http://HOST:PORT/metrics``.  Put it last among a stream's sinks: it counts what those before refused.

    With the label ``source``: advrad_results_total (with ``outcome``, too), advrad_dropped_total, advrad_unstored_total,
    advrad_latency_seconds (a histogram, from capture to result), advrad_score and advrad_threshold (the last ones), and of a
    stream with a drift test advrad_drift_e_value and advrad_drift_alarm (with ``direction``, too: 1 after an alarm, else 0).

    Args:
        port: 0 for any free one, see :attr:`port`.
        host: the address to listen on: this machine's own by default.  Metrics are not secret from whoever can reach it.

    Raises:
        ConfigError: the host or the port cannot be.
        SinkError: the address is taken, or not this machine's.
        ModuleNotFoundError: prometheus_client is not installed.
    """

    retry = False

    def __init__(self, port: int = 9108, *, host: str = "127.0.0.1") -> None:
        host, port = checks.text("host", host), checks.integer("port", port, 0, 65535)
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

        self.registry = registry = CollectorRegistry()
        source = ["source"]
        self._results = Counter("advrad_results", "Results by outcome.", [*source, "outcome"], registry=registry)
        self._dropped = Counter("advrad_dropped", "Frames that were not inspected.", source, registry=registry)
        self._unstored = Counter("advrad_unstored", "Results that a sink did not take at once.", source, registry=registry)
        self._latency = Histogram(
            "advrad_latency_seconds", "From capture to result.", source, registry=registry, buckets=_SECONDS
        )
        self._score = Gauge("advrad_score", "The last score.", source, registry=registry)
        self._threshold = Gauge("advrad_threshold", "A score above it is a defect.", source, registry=registry)
        self._evidence = Gauge("advrad_drift_e_value", "The evidence that scores have drifted.", source, registry=registry)
        self._alarm = Gauge("advrad_drift_alarm", "Whether scores have drifted.", [*source, "direction"], registry=registry)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
            raise SinkError(f"prometheus {host}:{port}: {error}") from error
        self.host, self.port = host, int(self._server.server_port)
        self.name = f"prometheus {host}:{self.port}"

    def write(self, result: StreamInspection) -> None:
        """Count it."""
        source = result.source
        for outcome in Outcome:  # all four are there from the start: an alarm on a rate needs its zero
            self._results.labels(source, str(outcome)).inc(outcome is result.outcome)
        self._dropped.labels(source).inc(result.dropped)
        self._unstored.labels(source).inc(bool(result.unstored))
        self._latency.labels(source).observe(result.latency_ms / 1e3)
        self._threshold.labels(source).set(result.inspection.threshold)
        if result.score is not None:
            self._score.labels(source).set(result.score)
        if result.drift is not None:
            self._evidence.labels(source).set(result.drift.e_value)
            for direction in Direction:
                self._alarm.labels(source, str(direction)).set(direction is result.drift.direction)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
