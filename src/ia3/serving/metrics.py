"""What is counted for Prometheus, and the log: lines of JSON without texts, keys, or anybody's name in a label."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ia3.serving.requests import Answer, Server

LOG = logging.getLogger("ia3.serving")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The engine's figures that go up and down; all others only grow.
_OF_NOW = ("queued", "running", "adapters", "versions")


class Metrics:
    """Counters of one server. Their labels are routes and numbers of HTTP alone.

    Args:
        server: whose own figures are shown beside them.
    """

    def __init__(self, server: Server) -> None:
        self._registry = CollectorRegistry()
        own: Any = {"registry": self._registry}
        routes = ("route", "status")
        self._requests = Counter("ia3_http_requests", "Requests that have ended.", routes, **own)
        self._seconds = Histogram(
            "ia3_http_request_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            **own,
            buckets=_SECONDS,
        )
        self.running = Gauge("ia3_http_requests_running", "Requests under way.", **own)
        self._answers = Counter("ia3_answers", "Answers given, one a text and model.", **own)
        self._read = Counter("ia3_prompt_tokens", "Tokens read.", **own)
        self._written = Counter("ia3_generation_tokens", "Tokens written.", **own)
        self._queued = Histogram(
            "ia3_request_queue_seconds", "From a text's coming to the start of its batch.", **own, buckets=_SECONDS
        )
        self._ran = Histogram("ia3_request_run_seconds", "What a text's batch took.", **own, buckets=_SECONDS)
        self._registry.register(_Figures(server))

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """A text has its answer."""
        self._answers.inc()
        self._read.inc(answer.prompt_tokens)
        self._written.inc(answer.completion_tokens)
        self._queued.observe(answer.queued_s)
        self._ran.observe(answer.ran_s)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Figures(Collector):
    """The engine's own figures, asked for when they are read."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        for name, value in sorted(self._server.stats().items()):
            kind = GaugeMetricFamily if name in _OF_NOW else CounterMetricFamily
            yield kind(f"ia3_engine_{name}", "The engine's figure of this name.", value=value)

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
