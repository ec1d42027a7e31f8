"""The other servers, each as a process: `python -m benchmarks.speed.serving.servers NAME STORE PORT DTYPE THREADS`.

pipelines: FastAPI and one transformers pipeline per task; the client names the task (oracle routing).
litserve:  LitServe with our model behind it, which it batches.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import litserve
import torch
import transformers
import uvicorn
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from benchmarks.speed.serving.lit import Api
from slm_fast.loading import resolve

MOST, PATIENCE = 32, 0.005  # requests per LitServe batch, and seconds that the first of them waits


def pipelines(store: str, port: int, dtype: str) -> None:
    transformers.logging.set_verbosity_error()
    manifest = json.loads((Path(store) / "manifest.json").read_text())
    where = resolve(manifest["model"]["backbone"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    longest = manifest["model"]["config"]["max_length"]
    app, lock, known = FastAPI(), threading.Lock(), {}
    for name in manifest["tasks"]:  # one model per task, as after fine-tuning
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            where, num_labels=8, dtype=getattr(torch, dtype)
        )
        known[name] = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)

    @app.post("/{task}")
    async def classify(task: str, request: Request) -> Any:
        texts = (await request.json())["input"]

        def answer() -> Any:
            with lock:
                return known[task](texts, batch_size=len(texts), truncation=True, max_length=longest)

        return await run_in_threadpool(answer)

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, port=port, log_level="warning")


def lit(store: str, port: int, dtype: str) -> None:
    api = Api(store, dtype, torch.get_num_threads(), max_batch_size=MOST, batch_timeout=PATIENCE)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        port=port, generate_client_file=False, log_level="warning"
    )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    {"pipelines": pipelines, "litserve": lit}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), sys.argv[4])
