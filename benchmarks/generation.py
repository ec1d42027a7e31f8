"""Writing answers: tokens a second of slm_fast, of the bare model in the same loop, of transformers' generate with the
bare model, and of the paper's way.

    python -m benchmarks.generation --shape llama-2-7b --layers 2
    python -m benchmarks.generation --shape t5-large --layers 4
    python -m benchmarks.generation --stories DIR

Rows of five tasks are mixed; all methods take turns within one run. The paper's way is a batch of one with the
increments as matrices, made anew in every pass as its released code does, on the attention outputs alone as there.
A run adds its model's rows to benchmarks/results/generation.csv and draws the .png anew.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from benchmarks.repro.stories260k import convert
from benchmarks.shapes import FULL, SHAPES, backbones, task
from benchmarks.timing import RESULTS, percentiles, read_csv, table, write_csv
from benchmarks.training import dense
from slm_fast.backbone import Backbone
from slm_fast.data import Row
from slm_fast.layers import AdaptedLinear
from slm_fast.model import AdaptedModel, Config
from slm_fast.pool import Pool
from slm_fast.scheduler import generate
from slm_fast.tasks import LearnedTask, name_seed

TASKS, RANK = 5, 8
TITLES = {
    "slm_fast": "slm_fast, five tasks mixed",
    "bare": "bare model, same loop",
    "transformers": "bare model, transformers' generate",
    "paper": "the paper's way",
}


def random_tasks(model: AdaptedModel, prompts: list[Row]) -> list[LearnedTask]:
    """Five tasks that each know a fifth of the prompts, with small random increments."""
    found = []
    for i in range(TASKS):
        name = f"task{i}"
        generator = torch.Generator().manual_seed(name_seed(name, 0))
        values = {
            module: (
                torch.randn(1, RANK, features_in, generator=generator) / features_in**0.5,
                0.1 * torch.randn(1, RANK, features_out, generator=generator) / RANK**0.5,
            )
            for module, (features_in, features_out) in model.widths.items()
        }
        part = model.new_router().fit(model.queries(prompts[i::TASKS]), 1, 0)
        found.append(LearnedTask(name, None, values, part, None))
    return found


class Methods:
    """The four ways to write answers to the same prompts. Each returns how many tokens it wrote."""

    def __init__(self, loaded: Backbone, prompts: list[Row], batch_size: int, new_tokens: int, alone: int) -> None:
        self.model = AdaptedModel(loaded, Config(max_length=128))
        self.prompts, self.batch_size, self.new_tokens, self.alone = prompts, batch_size, new_tokens, alone
        self.side = "left" if loaded.kind == "causal" else "right"
        self.attention_outputs = set(loaded.find_linears(("out",), 0))
        self.model.set_tasks(random_tasks(self.model, prompts))
        self.full = self.model.pool
        self.none = Pool([], loaded.device, loaded.dtype)

    def _write(self, pool: Pool, rows: list[Row], batch_size: int) -> int:
        self.model.pool = pool
        encoded = self.model.encode(rows, padding_side=self.side)
        options = {"max_new_tokens": self.new_tokens, "num_beams": 1, "do_sample": False}
        written: list[int] = []
        decode = self.model.backbone.tokenizer.batch_decode
        route = self.model.empty_route(len(rows)) if pool is self.none else None

        def counted(tokens: Any, **options: Any) -> Any:
            written.extend(len(row) for row in tokens)
            return decode(tokens, **options)

        self.model.backbone.tokenizer.batch_decode = counted
        try:
            generate(self.model, encoded, options, seeds=range(len(rows)), at_once=batch_size, route=route)
        finally:
            self.model.backbone.tokenizer.batch_decode = decode
        return sum(written)

    def slm_fast(self) -> int:
        return self._write(self.full, self.prompts, self.batch_size)

    def bare(self) -> int:
        return self._write(self.none, self.prompts, self.batch_size)

    @torch.inference_mode()
    def transformers(self) -> int:
        lm, total = self.model.backbone.model, 0
        ends = self.model.backbone.end_tokens()
        for start in range(0, len(self.prompts), self.batch_size):
            encoded = self.model.encode(self.prompts[start : start + self.batch_size], padding_side=self.side)
            out: Tensor = lm.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=self.model.backbone.tokenizer.pad_token_id,
                eos_token_id=ends.tolist(),
            )
            prompt = encoded.input_ids.shape[1] if self.side == "left" else 1
            new = torch.isin(out[:, prompt:], ends)
            total += int((new.cumsum(1) - new.int() == 0).sum())
        return total

    def paper(self) -> int:
        with ExitStack() as stack:
            for name in self.model.modules:
                layer = self.model.backbone.model.get_submodule(name)
                layer.forward = MethodType(dense if name in self.attention_outputs else only_base, layer)
                stack.callback(delattr, layer, "forward")
            return self._write(self.full, self.prompts[: self.alone], 1)


def only_base(layer: AdaptedLinear, x: Tensor) -> Tensor:
    y: Tensor = layer.base(x)
    return y


def stories(source: Path, dtype: str, stack: ExitStack) -> Backbone:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    convert(source, folder)
    return Backbone.load(str(folder), dtype=dtype)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(len(models), 1, figsize=(6.5, 1.7 * len(models) + 0.4), layout="constrained")
    for panel, name in zip([panels] if len(models) == 1 else panels, models, strict=True):
        own = [row for row in rows if row["model"] == name][::-1]
        bars = panel.barh([TITLES[row["method"]] for row in own], [float(row["tokens_per_second"]) for row in own])
        for bar, row in zip(bars, own, strict=True):
            bar.set_color("tab:blue" if row["method"] == "slm_fast" else "tab:gray")
        panel.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        panel.set_title(f"{name}, {own[0]['dtype']}, batch {own[-1]['batch_size']}", fontsize=10)
        panel.set_xlabel("tokens a second")
        panel.tick_params(labelsize=8)
        panel.margins(x=0.12)
    figure.savefig(path, dpi=140)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokens a second of writing answers to a batch that mixes tasks.")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "bert-base"], default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="default: all of the shape's")
    parser.add_argument("--stories", type=Path, help="folder of the stories260K checkpoint, instead of a shape")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="the most")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--alone", type=int, default=1, help="rows that the paper's way answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "generation.csv")
    arguments = parser.parse_args()
    for option, least in (("rows", 2 * TASKS), ("prompt_tokens", 7), ("alone", 1), ("rounds", 1)):
        if getattr(arguments, option) < least:
            parser.error(f"--{option.replace('_', '-')}: expected at least {least}, got {getattr(arguments, option)}")
    layers = arguments.layers or FULL[arguments.shape]
    with ExitStack() as stack:
        if arguments.stories:
            loaded, name = stories(arguments.stories, arguments.dtype, stack), "stories260K"
        else:
            loaded = backbones(arguments.shape, layers, getattr(torch, arguments.dtype))()
            name = f"{arguments.shape} shape, {layers} layers"
    # Prompts of unlike lengths.
    texts = [row.text.split() for row in task(None, "prompts", arguments.rows).rows]
    prompts = [
        Row(" ".join((words * arguments.prompt_tokens)[: 3 + (5 * i) % (arguments.prompt_tokens - 6)]))
        for i, words in enumerate(texts)
    ]
    methods = Methods(loaded, prompts, arguments.batch_size, arguments.new_tokens, arguments.alone)
    calls: dict[str, Callable[[], int]] = {method: getattr(methods, method) for method in TITLES}
    rates: dict[str, list[float]] = {method: [] for method in TITLES}
    order = list(calls)
    methods.new_tokens = 2
    for method in ("slm_fast", "transformers"):  # a first time to warm up
        calls[method]()
    methods.new_tokens = arguments.new_tokens
    for _ in range(arguments.rounds):
        order = order[1:] + order[:1]
        for method in order:
            call = calls[method]
            start = time.perf_counter()
            tokens = call()
            rates[method].append(tokens / (time.perf_counter() - start))
            print(f"{method}: {rates[method][-1]:.2f} tokens a second", file=sys.stderr)
    ours = percentiles(rates["slm_fast"]).p50
    done: list[dict[str, Any]] = []
    for method, found in rates.items():
        rate = percentiles(found)
        done.append(
            {
                "model": name,
                "dtype": str(loaded.dtype).partition(".")[2],
                "rows": arguments.alone if method == "paper" else arguments.rows,
                "batch_size": 1 if method == "paper" else arguments.batch_size,
                "new_tokens": arguments.new_tokens,
                "method": method,
                "tokens_per_second": round(rate.p50, 2),
                "p20": round(rate.p20, 2),
                "p80": round(rate.p80, 2),
                "slm_fast_times": round(ours / rate.p50, 2),
            }
        )
    print(table(done))
    kept: list[dict[str, Any]] = list(read_csv(arguments.output)) if arguments.output.exists() else []
    same = (done[0]["model"], done[0]["dtype"])
    rows = [row for row in kept if (row["model"], row["dtype"]) != same] + done
    write_csv(arguments.output, rows)
    plot(arguments.output.with_suffix(".png"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
