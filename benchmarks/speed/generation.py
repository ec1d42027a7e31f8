"""Text generation: tokens per second of slm_fast, of the bare model in the same loop, of transformers' generate with
the bare model, and of the paper's method.

    python -m benchmarks.speed.generation --shape llama-2-7b --layers 2
    python -m benchmarks.speed.generation --shape t5-large --layers 4
    python -m benchmarks.speed.generation --stories DIR

Rows of five tasks are mixed, and all methods take turns within one run. Every row generates the full number of tokens,
because the model cannot generate its end token. The paper's method runs a batch of one, with increments as matrices
rebuilt in every pass as in its released code, and only on the attention outputs, as there. A run adds its model's rows
to benchmarks/results/generation.csv and redraws the .png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.arguments import Parser, at_least, exit_status, output_file
from benchmarks.continual.stories260k import convert
from benchmarks.figures import plot_rates
from benchmarks.speed.backbones import DEVICE, FULL, SHAPES, Load, copies, pretrained
from benchmarks.speed.layers import base_only, released, replace_layers
from benchmarks.speed.tasks import random_tasks
from benchmarks.speed.texts import task
from benchmarks.speed.timing import Times, percentiles
from benchmarks.tables import RESULTS, not_in, table, write_csv
from slm_fast import InputError, ScalableLM, WorkError

COMMAND = "slm-fast bench generation"
TASKS = 5
TITLES = {
    "slm_fast": "slm_fast, five tasks mixed",
    "bare": "bare model, same loop",
    "transformers": "bare model, transformers' generate",
    "paper": "the paper's way",
}


def endless(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and its tokenizer with an end token that has no logit, so that the model cannot generate it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # a token that the model can read
    tokenizer.add_special_tokens({"eos_token": "<never written>"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert tokenizer.eos_token_id >= model.config.vocab_size
    return model, tokenizer


class Writers:
    """The ways to answer the same prompts. Each takes the number of tokens per row and returns the texts.

    load: copies one model. alone: how many of the prompts the paper's method answers.
    """

    def __init__(self, load: Load, prompts: Sequence[str], batch_size: int, alone: int) -> None:
        self.prompts, self.batch_size, self.alone = list(prompts), batch_size, alone
        self.slm, self.untaught, self.paper_slm = (self._make(load) for _ in range(3))
        self.slm.add(random_tasks(self.slm, {f"task{i}": self.prompts[i::TASKS] for i in range(TASKS)}))
        self.paper_slm.add(list(self.slm.learned.values()))
        model = self.paper_slm.model
        attention_outputs = set(model.backbone.find_linears(("out",), 0))
        ways = {name: released if name in attention_outputs else base_only for name in model.modules}
        replace_layers(self.paper_slm, ways)

    @staticmethod
    def _make(load: Load) -> ScalableLM:
        model, tokenizer = load()
        return ScalableLM.from_backbone(model, tokenizer=tokenizer, max_length=128)

    def _write(self, slm: ScalableLM, prompts: Sequence[str], batch_size: int, new_tokens: int) -> list[str]:
        answers = slm.predict(prompts, max_new_tokens=new_tokens, batch_size=batch_size, batch_tokens=10**9)
        return [answer.text or "" for answer in answers]

    def slm_fast(self, new_tokens: int) -> list[str]:
        return self._write(self.slm, self.prompts, self.batch_size, new_tokens)

    def bare(self, new_tokens: int) -> list[str]:
        return self._write(self.untaught, self.prompts, self.batch_size, new_tokens)

    @torch.inference_mode()
    def transformers(self, new_tokens: int) -> list[str]:
        backbone = self.untaught.model.backbone
        tokenizer, causal = backbone.tokenizer, backbone.kind == "causal"
        texts: list[str] = []
        for start in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[start : start + self.batch_size]
            encoded = backbone.tokenization.encode(prompts, 128, padding_side="left" if causal else "right")
            out: Tensor = backbone.model.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            written = out[:, -new_tokens:]
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def paper(self, new_tokens: int) -> list[str]:
        return self._write(self.paper_slm, self.prompts[: self.alone], 1, new_tokens)


def make_prompts(rows: int, longest: int) -> list[str]:
    """Prompts of different lengths, at most `longest` tokens."""
    texts = [row.text.split() for row in task(None, "prompts", rows).rows]
    return [" ".join((words * longest)[: 3 + (5 * i) % (longest - 6)]) for i, words in enumerate(texts)]


def measure(writers: Writers, new_tokens: int, rounds: int) -> dict[str, Times]:
    """Milliseconds per token of each way, measured in turns."""
    calls: Mapping[str, Callable[[int], list[str]]] = {name: getattr(writers, name) for name in TITLES}
    for name in ("slm_fast", "transformers"):  # warm up
        calls[name](2)
    took_ms: dict[str, list[float]] = {name: [] for name in TITLES}
    order = list(calls)
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            start = time.perf_counter()
            texts = calls[name](new_tokens)
            took_ms[name].append(1e3 * (time.perf_counter() - start) / (len(texts) * new_tokens))
            print(f"{name}: {1e3 / took_ms[name][-1]:.2f} tokens a second", file=sys.stderr)
    return {name: percentiles(took) for name, took in took_ms.items()}


def lines(times: Mapping[str, Times], name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "dtype": arguments.dtype,
            "rows": arguments.alone if method == "paper" else arguments.rows,
            "batch_size": 1 if method == "paper" else arguments.batch_size,
            "new_tokens": arguments.new_tokens,
            "method": method,
            "tokens_per_second": round(1e3 / took.p50, 2),
            "p20": round(1e3 / took.p80, 2),
            "p80": round(1e3 / took.p20, 2),
            "slm_fast_times": round(took.p50 / times["slm_fast"].p50, 2),
        }
        for method, took in times.items()
    ]


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    charts = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        bars = [(TITLES[row["method"]], float(row["tokens_per_second"]), row["method"] == "slm_fast") for row in own]
        charts[f"{name}, {own[0]['dtype']}, batch {own[0]['batch_size']}"] = bars
    plot_rates(charts, "tokens a second", path)


def stories(source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The stories260K checkpoint and its tokenizer, from its folder or from DIR of the other benchmarks."""
    inside = source / "checkpoints" / "stories260K"
    with tempfile.TemporaryDirectory() as folder:
        try:
            convert(inside if inside.is_dir() else source, Path(folder))
        except OSError as error:
            raise InputError(f"--stories: {error.filename}: {error.strerror}") from None
        except ValueError as error:
            raise WorkError(f"--stories: {error}") from None
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval().to(DEVICE), transformers.AutoTokenizer.from_pretrained(folder)


def main() -> int:
    parser = Parser(COMMAND, __doc__)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "bert-base"], default="llama-2-7b")
    parser.add_argument("--layers", type=at_least(1), help="default: all layers of the shape")
    parser.add_argument(
        "--stories", type=Path, help="folder that contains checkpoints/stories260K, used instead of a shape"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=at_least(2 * TASKS), default=32)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--prompt-tokens", type=at_least(7), default=16, help="tokens per prompt, at most")
    parser.add_argument("--new-tokens", type=at_least(1), default=24)
    parser.add_argument("--alone", type=at_least(1), default=1, help="rows that the paper's method answers")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--output", type=output_file, default=RESULTS / "generation.csv")
    arguments = parser.parse_args()
    layers, dtype = arguments.layers or FULL[arguments.shape], getattr(torch, arguments.dtype)
    if arguments.stories:
        loaded, name = stories(arguments.stories, dtype), "stories260K"
    else:
        loaded, name = pretrained(arguments.shape, layers, dtype), f"{arguments.shape} shape, {layers} layers"
    prompts = make_prompts(arguments.rows, arguments.prompt_tokens)
    writers = Writers(copies(*endless(*loaded)), prompts, arguments.batch_size, arguments.alone)
    done = lines(measure(writers, arguments.new_tokens, arguments.rounds), name, arguments)
    print(table(done))
    rows = not_in(done, arguments.output, lambda row: (row["model"], row["dtype"])) + done
    write_csv(arguments.output, rows)
    plot(arguments.output.with_suffix(".png"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
