"""Prometheus metrics for /metrics, including the vLLM names that load balancers of the Gateway API read."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from slm_fast.predict import Prediction
from slm_fast.server.engine import Engine
from slm_fast.server.generation import Watcher
from slm_fast.server.jobs import Job

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
        """Register gauges that are computed when scraped."""

        def gauge(name: str, about: str, value: Any) -> None:
            Gauge(name, about, registry=self.registry).set_function(value)

        gauge("slm_fast_queue_rows", "Rows admitted and not answered yet.", lambda: engine.room.rows)
        gauge("slm_fast_queue_tokens", "Their tokens.", lambda: engine.room.tokens)
        gauge("slm_fast_queue_seconds", "Until the last of them is answered.", lambda: engine.room.wait)
        gauge("slm_fast_running_rows", "Texts being written.", lambda: engine.running_rows)
        gauge("slm_fast_tasks", "Tasks of the generation that answers.", lambda: len(engine.generation.files))
        gauge("slm_fast_store_ok", "1 unless the store cannot be read.", lambda: float(watcher.trouble is None))
        gauge("vllm:num_requests_waiting", "As vLLM has it.", lambda: engine.waiting_rows)
        gauge("vllm:num_requests_running", "As vLLM has it.", lambda: engine.running_rows)
        share = lambda: min(1.0, engine.room.tokens / engine.room.most_tokens)  # noqa: E731
        gauge("vllm:kv_cache_usage_perc", "As vLLM has it: the share of the queue's tokens that is taken.", share)
        info = Gauge(
            "vllm:lora_requests_info", "As vLLM has it. Tasks need no loading, so no task has to wait for another.",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"], registry=self.registry,
        )  # fmt: skip
        info.labels(str(len(engine.generation.files)), "", "").set_to_current_time()

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
