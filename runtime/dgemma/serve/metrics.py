"""The server's metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dgemma.serve.generation import AnswerFinished, PromptEncoded, WorkerEvent

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server; record() counts the worker's events."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dgemma_requests", "Requests, by the status of their answer.", ["path", "status"], registry=registry
        )
        self.disconnects = Counter(
            "dgemma_requests_left", "Requests whose client left before the end.", registry=registry
        )
        self.seconds = Histogram(
            "dgemma_request_seconds", "From a request to its end.", ["path"], buckets=SECONDS, registry=registry
        )
        self.waited = Histogram(
            "dgemma_queue_seconds", "What requests waited for their first turn.", buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "dgemma_first_text_seconds",
            "From a request to the first text of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self._prompt = Counter("dgemma_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("dgemma_prompt_tokens_cached", "Of these: they were encoded already.", registry=registry)
        self._answer = Counter("dgemma_completion_tokens", "Tokens of answers.", registry=registry)
        self._steps = Counter("dgemma_steps", "Denoising steps of finished answers.", registry=registry)
        self._ended = Counter("dgemma_answers", "Answers, by why they ended.", ["finish_reason"], registry=registry)

    def add_gauges(self, waiting: Callable[[], int], running: Callable[[], int], tokens: Callable[[], int]) -> None:
        """Add gauges whose values these functions return whenever the metrics are read."""
        for name, help_text, ask in (
            ("dgemma_requests_waiting", "Requests in the queue.", waiting),
            ("dgemma_requests_running", "Requests that have turns.", running),
            ("dgemma_cached_tokens", "Tokens encoded in sessions that wait for more of their conversation.", tokens),
        ):
            Gauge(name, help_text, registry=self.registry).set_function(ask)

    def record(self, event: WorkerEvent) -> None:
        if isinstance(event, PromptEncoded):
            self._prompt.inc(event.prompt)
            self._cached.inc(event.cached)
        elif isinstance(event, AnswerFinished):
            self._answer.inc(event.tokens)
            self._steps.inc(event.figures["steps"])
            self._ended.labels(event.reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
