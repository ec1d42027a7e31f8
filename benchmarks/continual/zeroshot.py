"""What learning a stream does to other abilities: zero-shot benchmarks, answered by the bare backbone and by the final
model of each method of a `slm-fast repro` RUN (as the paper does with LLaMA after its orders 8 and 9).

    slm-fast repro RUN --data DIR --stream order8 --backbone smollm2 --methods slm finetune replay
    python -m benchmarks.continual.zeroshot RUN --data DIR

DIR/zeroshot holds a test.jsonl.gz each for arc_easy, arc_challenge, piqa and winogrande. `zeroshot_tasks/` defines them
as lm-eval tasks, with lm-eval's own prompts and scores. slm_fast answers through its integration, and with `--abstain`
once more; whole models answer through lm-eval's class for Hugging Face models. `--dtype bfloat16` is for processors
that multiply it. Results are kept in RUN/zeroshot/: run the same command again to resume. `--output` gets a line for
each method, seed and task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.arguments import Parser, at_least, output_file
from benchmarks.continual.cell import restore
from benchmarks.continual.methods import method_of
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.method import Setup
from benchmarks.tables import table, write_csv
from slm_fast import InputError, ScalableLM, SlmError, WorkError
from slm_fast.backbone import Backbone
from slm_fast.files import write
from slm_fast.integrations.harness import evaluate, scores
from slm_fast.integrations.lm_eval import BARE, StoreLM
from slm_fast.options import LearnOptions

TASKS = Path(__file__).parent / "zeroshot_tasks"
SETS = ("arc_easy", "arc_challenge", "piqa", "winogrande")
WHOLE = ("finetune", "replay", "ewc", "joint")  # methods that end as one model and nothing else
PREFIX = "local_"  # keeps these tasks' names apart from lm-eval's own


def cells_of(run: Path, about: Mapping[str, Any]) -> list[tuple[str, int, Path]]:
    """The method, the seed and the folder of each finished cell of a RUN. Raises WorkError if there is none."""
    found = []
    for stages in sorted(run.glob("*/seed*/stages.jsonl")):
        folder = stages.parent
        if len(stages.read_text().splitlines()) == len(about["stream"]["tasks"]):
            spec = folder.parent.name.replace(",", ":", 1)
            found.append((spec, int(folder.name.removeprefix("seed")), folder))
        else:
            print(f"zeroshot: {folder}: not done; left out", file=sys.stderr)
    if not found:
        raise WorkError(f"{run}: no method has learned the whole stream; `slm-fast repro` goes on with it")
    return found


def whole_model(about: Mapping[str, Any], spec: str, seed: int, folder: Path, dtype: str = "float32") -> Backbone:
    """The backbone with the final weights of a method.

    Raises InputError for a method that does not end as one model, or adapts it to each row, and if the folder does not
    hold the weights.
    """
    name = spec.partition(":")[0]
    if name not in ("slm", *WHOLE):
        raise InputError(f"method {spec!r}: is no model on its own; slm, {', '.join(WHOLE)} are")
    if name == "slm" or not (folder / "state.pt").is_file():
        what = "store" if name == "slm" else "state.pt"
        raise InputError(f"{folder}: no {what} (none is committed); run `slm-fast repro` again, in a new folder")
    settings = about["settings"]
    options = LearnOptions(epochs=settings["epochs"], seed=seed)
    setup = Setup(about["backbone"], (), settings["max_length"], options, settings["max_new_tokens"])
    method = method_of(spec)[1](setup)
    assert isinstance(method, Finetune)
    restore(folder, method)
    backbone = method.model.backbone
    backbone.model.to(getattr(torch, dtype))
    return backbone


def hugging_face(backbone: Backbone, batch_size: int) -> HFLM:
    model, tokenizer = backbone.model.eval(), backbone.tokenizer
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def answered(model: Any, data: Path, limit: int | None) -> list[dict[str, Any]]:
    """One line per score of lm-eval."""
    found = evaluate(
        model,
        [PREFIX + name for name in SETS],
        folder=TASKS,
        metadata={"data": str(data / "zeroshot")},
        limit=limit,
    )
    shares = model.shares() if isinstance(model, StoreLM) else {}
    lines = []
    for score in scores(found):
        routed = f"{1 - shares[score.task].get(BARE, 0):.4f}" if score.task in shares else ""
        lines.append(
            {
                "set": score.task.removeprefix(PREFIX),
                "metric": score.metric,
                "value": f"{score.value:.4f}",
                "stderr": "" if score.stderr is None else f"{score.stderr:.4f}",
                "rows": found["n-samples"][score.task]["effective"],
                "routed": routed,
            }
        )
    return lines


def ways_of(run: Path, about: Mapping[str, Any], abstain: float | None) -> list[tuple[str, int, Path | None]]:
    """What to evaluate: a name, a seed and a cell's folder, None for the bare backbone."""
    ways: list[tuple[str, int, Path | None]] = [("bare", 0, None)]
    for spec, seed, folder in cells_of(run, about):
        ways.append((spec, seed, folder))
        if abstain is not None and (folder / "store").is_dir():
            ways.append((f"{spec}, abstain {abstain:g}", seed, folder))
    return ways


def model_of(about: Mapping[str, Any], way: str, seed: int, folder: Path | None, batch_size: int, dtype: str) -> Any:
    """The lm-eval model of a way. Raises InputError for a method that is no model on its own."""
    if folder is None:
        return hugging_face(Backbone.load(about["backbone"], dtype=dtype), batch_size)
    spec, _, share = way.partition(", abstain ")
    if (folder / "store").is_dir():
        slm = ScalableLM.from_pretrained(folder / "store", backbone=about["backbone"], dtype=dtype)
        return StoreLM(slm=slm, batch_size=batch_size, abstain=float(share) if share else False)
    return hugging_face(whole_model(about, spec, seed, folder, dtype), batch_size)


def parser() -> argparse.ArgumentParser:
    found = Parser("python -m benchmarks.continual.zeroshot", __doc__)
    found.add_argument("run", type=Path, metavar="RUN", help="folder written by `slm-fast repro`")
    found.add_argument("--data", type=Path, default=Path("data"), help="folder that contains zeroshot/")
    found.add_argument("--limit", type=at_least(1), help="rows per set, at most; default: all")
    found.add_argument("--batch-size", type=at_least(1), default=8)
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that all models answer in")
    about = "for slm_fast's stores, also let the bare backbone answer rows farther off than this share of training rows"
    found.add_argument("--abstain", type=float, nargs="?", const=0.99, metavar="SHARE", help=about)
    found.add_argument("--output", type=output_file, help="CSV to write; default: RUN/zeroshot.csv")
    return found


def work(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lines, kept and new."""
    path = options.run / "run.json"
    if not path.is_file():
        raise InputError(f"{options.run}: no run.json in it; expected the folder of a `slm-fast repro`")
    about = json.loads(path.read_text())
    if Backbone.load(about["backbone"]).kind != "causal":
        raise InputError(
            f"{options.run}: its backbone is {about['backbone']!r}; only decoders such as LLaMA are scored"
        )
    missing = [name for name in SETS if not (options.data / "zeroshot" / name / "test.jsonl.gz").is_file()]
    if missing:
        raise InputError(f"--data: {options.data / 'zeroshot' / missing[0] / 'test.jsonl.gz'}: no such file")
    suffix = "" if options.dtype == "float32" else f", {options.dtype}"
    lines = []
    for way, seed, folder in ways_of(options.run, about, options.abstain):
        kept = options.run / "zeroshot" / f"{way}, seed {seed}, {options.limit or 'all'} rows{suffix}.json"
        if not kept.exists():
            try:
                model = model_of(about, way, seed, folder, options.batch_size, options.dtype)
            except InputError as error:
                print(f"zeroshot: {error}; left out", file=sys.stderr)
                continue
            found = answered(model, options.data, options.limit)
            kept.parent.mkdir(exist_ok=True)
            write(kept, json.dumps(found).encode())
            print(f"zeroshot: {way}, seed {seed}: answered", file=sys.stderr)
        own = {"stream": about["stream"]["name"], "backbone": about["backbone"], "method": way, "seed": seed}
        own["dtype"] = options.dtype
        lines += [{**own, **line} for line in json.loads(kept.read_text())]
    return lines


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        lines = work(options)
    except SlmError as error:
        print(f"zeroshot: error: {error}", file=sys.stderr)
        return error.status
    write_csv(options.output or options.run / "zeroshot.csv", lines)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
