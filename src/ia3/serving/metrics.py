"""What is counted for Prometheus, and the log: lines of JSON without texts, keys, or anybody's name in a label."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ia3.serving.recent import Recent
from ia3.serving.requests import Answer, Request, Server

LOG = logging.getLogger("ia3.serving")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The engine's figures: what kind each is, and what it is called, as vLLM calls it where it has the same.
_FIGURES: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str]] = {
    "queued": (GaugeMetricFamily, "ia3_num_requests_waiting", "Texts that wait."),
    "running": (GaugeMetricFamily, "ia3_num_requests_running", "Texts that are being answered."),
    "adapters": (GaugeMetricFamily, "ia3_adapters", "Names of adapters that are served."),
    "refused": (GaugeMetricFamily, "ia3_adapters_refused", "Names whose files, as they are now, can't be served."),
    "versions": (GaugeMetricFamily, "ia3_adapter_versions", "Contents of adapters in memory."),
    "resident": (GaugeMetricFamily, "ia3_adapters_resident", "Contents of adapters on the device."),
    "batches": (CounterMetricFamily, "ia3_batches", "Batches that were run."),
    "ran_s": (CounterMetricFamily, "ia3_batch_seconds", "Seconds that they took."),
    "requests_answered": (CounterMetricFamily, "ia3_request_success", "Texts that were answered."),
    "prompt_tokens": (CounterMetricFamily, "ia3_prompt_tokens", "Tokens that were read."),
    "completion_tokens": (CounterMetricFamily, "ia3_generation_tokens", "Tokens that were written."),
}
_FAILURES = ("failed", "too_late", "cancelled", "overloaded", "dropped")


class Metrics:
    """What is counted of one server. Labels are routes, numbers of HTTP and reasons alone.

    Args:
        server: who answers, and whose own figures are shown beside them.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._registry = server, CollectorRegistry()
        self.recent = Recent()
        own: Any = {"registry": self._registry}
        timed: Any = {"buckets": _SECONDS, **own}
        self._requests = Counter("ia3_http_requests", "Requests that have ended.", ("route", "status"), **own)
        self._seconds = Histogram(
            "ia3_http_request_duration_seconds", "From a request's head to the end of its answer.", ("route",), **timed
        )
        self.running = Gauge("ia3_http_requests_running", "Requests under way.", **own)
        self._queued = Histogram(
            "ia3_request_queue_time_seconds", "From a text's coming until it is taken up.", **timed
        )
        self._ran = Histogram("ia3_request_inference_time_seconds", "From then on until its answer.", **timed)
        self._registry.register(_Figures(server))

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def submit(self, request: Request) -> Future[Answer]:
        """Let the server take a text in, as `Server.submit`; its answer is counted, whoever is there to read it."""
        future = self._server.submit(request)
        future.add_done_callback(self._answered)
        return future

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _answered(self, future: Future[Answer]) -> None:
        if future.cancelled() or future.exception() is not None:  # the engine counts these, by reason
            return
        answer = future.result()
        self._queued.observe(answer.queued_s)
        self._ran.observe(answer.ran_s)
        self.recent.add(answer.adapter)


class _Figures(Collector):
    """The engine's own figures, asked for when they are read."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        stats = self._server.stats()
        for figure, (kind, name, about) in _FIGURES.items():
            if figure in stats:
                yield kind(name, about, value=stats[figure])
        failures = CounterMetricFamily("ia3_request_failures", "Texts that got no answer.", labels=["reason"])
        for reason in _FAILURES:
            failures.add_metric([reason], stats[f"requests_{reason}"])
        yield failures

    def describe(self) -> Iterator[Metric]:
        return iter(())


class _Lines(logging.Formatter):
    """A line of JSON a record. An error is told by its class and place, since its message may hold a text."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)[-8:]
            said |= {"error": type(error).__name__, "at": [f"{each.name}:{each.lineno}" for each in frames]}
        return json.dumps(said, default=str)


def log_in_lines() -> None:
    """Let this package's and uvicorn's loggers write lines of JSON on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, level in ((LOG.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
