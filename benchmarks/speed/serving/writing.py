"""Texts streamed by our server, against `predict` on the same rows and transformers' own server with the bare model.

    python -m benchmarks.speed.serving.writing [--clients 1 16 64] [--seconds 20] [--store DIR]

SmolLM2-135M-Instruct with the three tasks of `slm-fast demo --backbone smollm2` (an existing --store has them already).
Clients stream one chat after another, with rows of all three tasks mixed and no task named. Servers and clients share
the CPU; the servers take turns, `--rounds` times, with the others paused. auto: our server routes each row. base: our
server with the bare model. transformers: `transformers serve` with the same weights and prompts, with continuous
batching if its line says so. Every text of auto is compared with what `predict` generates for that row.

texts_per_second, tokens_per_second: over all clients. to_predict: tokens per second relative to `predict` (auto: with
the tasks; base and transformers: with the bare model). first_ms: until the first word. between_ms: between two parts of
a text. Both at the 50th and 99th percentile.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks.arguments import Parser, at_least, duration, exit_status, output_file
from benchmarks.speed.serving.load import Running, in_turns, percentile, served
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.demo.chat import FIRST_LAYER, LEARN, load

COMMAND = "slm-fast bench streams"
NEW_TOKENS = 32


@dataclass
class Streams:
    """What clients observed. texts: with the indices of their rows. first, between: seconds."""

    elapsed: float = 0.0
    texts: list[tuple[int, str]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, rounds: Sequence[Streams]) -> Streams:
        """All rounds together."""
        found = cls()
        for one in rounds:
            found.elapsed += one.elapsed
            found.texts += one.texts
            found.first += one.first
            found.between += one.between
        return found


def stream_all(port: int, model: str, rows: Sequence[Row], clients: int, seconds: float) -> Streams:
    """Let clients stream answers to the rows in turns for `seconds` seconds. Raises RuntimeError if refused."""
    found, lock, began = Streams(), Lock(), time.perf_counter()

    def ask(connection: http.client.HTTPConnection, number: int) -> bool:
        if time.perf_counter() - began >= seconds:
            return False
        place = number % len(rows)
        text, times = streamed(connection, model, rows[place])
        with lock:
            found.texts.append((place, text))
            found.first += [first - times[0] for first in times[1:2]]
            found.between += [after - before for before, after in pairwise(times[1:])]
        return True

    found.elapsed = in_turns(port, clients, ask)
    return found


def streamed(connection: http.client.HTTPConnection, model: str, row: Row) -> tuple[str, list[float]]:
    """A chat's answer, and the times of the request and of each part of the answer."""
    said = [{"role": "system", "content": row.instruction}, {"role": "user", "content": row.text}]
    body = {"model": model, "messages": said, "max_tokens": NEW_TOKENS, "stream": True, "temperature": 0}
    text, times = "", [time.perf_counter()]
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{model}: {response.status}: {response.read()[:200]!r}")
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            part = json.loads(line[6:])
            if more := "".join(choice["delta"].get("content") or "" for choice in part.get("choices", ())):
                text += more
                times.append(time.perf_counter())
    return text.strip(), times


def predicted(slm: ScalableLM, rows: Sequence[str | Row], *, bare: bool) -> tuple[list[str], float]:
    """The answers of one call, and the seconds it took."""
    slm.predict(rows[:4], bare=bare, max_new_tokens=2)
    began = time.perf_counter()
    found = slm.predict(rows, bare=bare, max_new_tokens=NEW_TOKENS)
    return [answer.text or "" for answer in found], time.perf_counter() - began


def learned(store: Path, dtype: str) -> ScalableLM:
    """A model with the demonstration's tasks, from the store or learned into it."""
    if not store.exists():
        slm = ScalableLM.from_backbone("smollm2", first_layer=FIRST_LAYER)
        slm.save_pretrained(store)
        for task in load("train").values():
            slm.learn(task, LEARN)
    return ScalableLM.from_pretrained(store, dtype=dtype)


def measured(chosen: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    slm = learned(chosen.store or folder / "store", chosen.dtype)
    tokenizer = slm.model.backbone.tokenizer
    rows = [row for task in load("test").values() for row in task.rows]
    random.Random(0).shuffle(rows)
    prompts = [in_chat(tokenizer, row) for row in rows]
    slm.model.backbone.model.save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")
    expected, _ = predicted(slm, rows, bare=False)
    store = str(chosen.store or folder / "store")
    ours = ["slm_fast.cli", "serve", store, "--port", "PORT", "--dtype", chosen.dtype, "--threads", str(chosen.threads)]
    theirs = ["transformers.cli.transformers", "serve", str(folder / "bare"), "--port", "PORT", "--dtype", chosen.dtype]
    servers = {"auto": (ours, "auto", "/ready"), "base": (ours, "base", "/ready")}
    servers |= {
        f"transformers{word}": ([*theirs, *more], str(folder / "bare"), "/health")
        for word, more in (("", []), (", continuous batching", ["--continuous-batching"]))
    }
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for name, (words, _, ready) in servers.items():
            running[name] = stack.enter_context(served(words, ready))
            running[name].pause()
        for clients in chosen.clients:
            rounds: dict[str, list[Streams]] = {}
            for _ in range(chosen.rounds):
                for name, one in running.items():
                    one.resume()
                    stream_all(one.port, servers[name][1], rows, min(2, clients), 1.0)
                    rounds.setdefault(name, []).append(
                        stream_all(one.port, servers[name][1], rows, clients, chosen.seconds)
                    )
                    one.pause()
                for name, asked, bare in (("predict", rows, False), ("predict, bare", prompts, True)):
                    texts, took = predicted(slm, asked, bare=bare)
                    rounds.setdefault(name, []).append(Streams(took, list(enumerate(texts))))
            wrong = [place for seen in rounds["auto"] for place, text in seen.texts if text != expected[place].strip()]
            assert not wrong, f"{len(wrong)} texts are not those of predict"
            lines = {name: figures(name, clients, Streams.of(each), tokenizer) for name, each in rounds.items()}
            for name, line in lines.items():
                base = lines["predict" if name in ("auto", "predict") else "predict, bare"]
                line["to_predict"] = round(line["tokens_per_second"] / base["tokens_per_second"], 3)
            found += lines.values()
            print(table(list(lines.values())), flush=True)
    write_csv(chosen.output, found, {"dtype": chosen.dtype, "tokens of a text": f"at most {NEW_TOKENS}"})
    return found


def figures(server: str, clients: int, seen: Streams, tokenizer: Any) -> dict[str, Any]:
    tokens = sum(len(ids) for ids in tokenizer([text for _, text in seen.texts])["input_ids"])
    line = {"server": server, "clients": clients, "texts_per_second": round(len(seen.texts) / seen.elapsed, 2)}
    line |= {"tokens_per_second": round(tokens / seen.elapsed, 1), "to_predict": 0.0}
    for name, times in (("first", seen.first), ("between", seen.between)):
        line |= {f"{name}_ms_p{round(100 * p)}": f"{percentile(times, p):.0f}" for p in (0.5, 0.99)}
    return line


def in_chat(tokenizer: Any, row: Row) -> str:
    """The prompt that the model's template makes of a row, without its final newline, which `predict` adds."""
    said = [{"role": "system", "content": row.instruction}, {"role": "user", "content": row.text}]
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return text.removesuffix("\n")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = Parser(COMMAND, __doc__)
    parser.add_argument("--store", type=Path, help="store to read, created if missing; default: a temporary one")
    parser.add_argument("--clients", type=at_least(1), nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=duration, default=20.0, help="seconds per round and number of clients")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each server")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--output", type=output_file, default=RESULTS / "serving_writing.csv")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # for the servers
    with tempfile.TemporaryDirectory() as folder:
        return measured(chosen, Path(folder))


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
