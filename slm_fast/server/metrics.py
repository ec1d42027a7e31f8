"""Prometheus metrics for /metrics, including the vLLM names that load balancers of the Gateway API read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from slm_fast.predict import Prediction
from slm_fast.server.engine import Engine
from slm_fast.server.generation import Watcher
from slm_fast.server.jobs import Job, Piece

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, named by Prometheus conventions."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "slm_fast_requests", "Requests answered, by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "slm_fast_request_duration_seconds", "From a request to its answer.", ["path"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.rows = Counter("slm_fast_rows", "Rows answered, by the task found.", ["task"], registry=registry)
        self.first = Histogram(
            "slm_fast_time_to_first_token_seconds", "From a request to its first token.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch = Histogram("slm_fast_batch_rows", "Rows of a batch.", buckets=ROWS, registry=registry)
        self.prompt = Counter("slm_fast_prompt_tokens", "Tokens read.", registry=registry)
        self.written = Counter("slm_fast_generation_tokens", "Tokens written.", registry=registry)

    def watch(self, engine: Engine, watcher: Watcher) -> None:
        """Register the figures that are computed when scraped."""
        self.registry.register(Now(engine, watcher))

    def note(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def note_batch(self, rows: int, tokens: int) -> None:
        self.batch.observe(rows)

    def note_rows(self, job: Job) -> None:
        for piece in job.pieces:
            answer = piece.result
            if isinstance(answer, Prediction):
                self.rows.labels(answer.task or "").inc()
            self.prompt.inc(piece.length)
            self.written.inc(len(piece.tokens))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Now(Collector):
    """What a server does at the moment of a scrape."""

    def __init__(self, engine: Engine, watcher: Watcher) -> None:
        self.engine, self.watcher = engine, watcher

    def collect(self) -> Iterator[Metric]:
        room, tasks = self.engine.room, len(self.engine.generation.files)
        waiting, running = self.engine.unanswered()
        share = min(1.0, room.tokens / room.most_tokens)
        for name, about, value in (
            ("slm_fast_queue_rows", "Rows admitted and not answered yet.", len(waiting) + len(running)),
            ("slm_fast_queue_tokens", "Their tokens.", room.tokens),
            ("slm_fast_queue_seconds", "Until the last of them is answered.", room.wait),
            ("slm_fast_running_rows", "Those in the batch that runs, or whose text is being written.", len(running)),
            ("slm_fast_tasks", "Tasks of the generation that answers.", tasks),
            ("slm_fast_store_ok", "1 unless the store cannot be read.", self.watcher.trouble is None),
            ("vllm:num_requests_waiting", "As vLLM has it, of rows.", len(waiting)),
            ("vllm:num_requests_running", "As vLLM has it, of rows.", len(running)),
            ("vllm:kv_cache_usage_perc", "As vLLM has it: the share of the queue's tokens that is taken.", share),
        ):
            yield GaugeMetricFamily(name, about, float(value))
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "As vLLM has it. Tasks need no loading, so no task has to wait for another.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )  # fmt: skip
        info.add_metric([str(tasks), _tasks_of(running), _tasks_of(waiting)], time.time())
        yield info


def _tasks_of(rows: Sequence[Piece]) -> str:
    """The tasks of rows, as far as known: those that requests name, and those in the routes of texts begun."""
    found = set[str]()
    for piece in rows:
        if isinstance(piece.head, Prediction):
            found.update(piece.head.route.tasks)
        elif piece.job.ask.task is not None:
            found.add(piece.job.ask.task)
    return ",".join(sorted(found))
