"""Tests of the zero-shot benchmark of a run's final models: lm-eval's prompts, learned weights and result rows."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager
from models import make_model, make_tokenizer, one_thread, toy_task  # noqa: F401

from benchmarks.continual import run, zeroshot
from benchmarks.continual.run_file import described, opened
from benchmarks.tables import read_csv
from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.backbone import Backbone
from slm_fast.integrations.harness import evaluate, scores
from slm_fast.integrations.lm_eval import StoreLM

ROWS = {
    "arc_easy": [
        ("sea1 sea2 ?", ["sea3 word1", "farm4", "word5"], 0),
        ("farm7 word2", ["word1", "sea9", "the question", "no"], 3),
        ("the sea5 ?", ["yes", "no maybe"], 1),
    ],
    "arc_challenge": [("the question", ["yes", "no", "maybe"], 2)],
    "piqa": [("word1 farm2", ["sea1 the sea2", "farm3"], 1), ("farm1", ["the sea4", "answer"], 0)],
    "winogrande": [("the farm1 was near sea2 because _ was yes .", ["farm1", "sea2"], 1)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        path = folder / "zeroshot" / name / "test.jsonl.gz"
        path.parent.mkdir(parents=True)
        lines = [json.dumps(dict(zip(("question", "choices", "answer"), row, strict=True))) for row in rows]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run of two tasks with a tiny LLaMA: three methods are done, a fourth was stopped after the first task."""
    folder = tmp_path_factory.mktemp("run")
    make_model("llama").save_pretrained(folder / "llama")
    make_tokenizer("llama").save_pretrained(folder / "llama")
    for name in ("sea", "farm"):
        for split in ("train", "test"):
            rows = toy_task(name, rows=16, seed=len(split), instruction="the question :").rows
            lines = [json.dumps({"instruction": r.instruction, "input": r.text, "output": r.target}) for r in rows]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines))
    stream = folder / "own.yaml"
    tasks = "".join(f"  {name}: {{train: {name}.train.jsonl, test: {name}.test.jsonl}}\n" for name in ("sea", "farm"))
    stream.write_text(f"rows: 16\ntasks:\n{tasks}")
    options = ["--stream", str(stream), "--backbone", str(folder / "llama"), "--seeds", "1", "--epochs", "2"]
    options += ["--max-new-tokens", "2"]
    path = folder / "run"
    opened(path, described(run.parser().parse_args([str(path), *options]), run.stream_of(str(stream)), {}), {})
    for method in ("slm", "finetune", "prompt"):
        assert run.main([str(path), *options, "--methods", method, "--cell"]) == 0
    stopped = path / "replay" / "seed1"
    stopped.mkdir(parents=True)
    first = (path / "slm" / "seed1" / "stages.jsonl").read_text().splitlines()[0]
    (stopped / "stages.jsonl").write_text(first + "\n")
    return path


def go(done: Path, data: Path, *more: str) -> list[dict[str, str]]:
    assert zeroshot.main([str(done), "--data", str(data), *more]) == 0
    return read_csv(done / "zeroshot.csv")


def test_a_line_for_each_method_and_number_and_what_is_done_is_kept(done, data, capsys):
    lines = go(done, data, "--abstain")
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("zeroshot")] == [
        f"zeroshot: {done / 'replay' / 'seed1'}: not done; left out",
        "zeroshot: bare, seed 0: answered",
        "zeroshot: finetune, seed 1: answered",
        "zeroshot: method 'prompt': is no model on its own; slm, finetune, replay, ewc, joint are; left out",
        "zeroshot: slm, seed 1: answered",
        "zeroshot: slm, abstain 0.99, seed 1: answered",
    ]
    ways = ("bare", "finetune", "slm", "slm, abstain 0.99")
    numbers = {(name, metric) for name in ROWS for metric in ("acc", "acc_norm")} - {("winogrande", "acc_norm")}
    expected = {(way, *number) for way in ways for number in numbers}
    assert {(line["method"], line["set"], line["metric"]) for line in lines} == expected
    assert len(lines) == len(expected)
    assert {line["rows"] for line in lines if line["set"] == "arc_easy"} == {"3"}
    assert {line["routed"] for line in lines if line["method"] == "slm"} == {"1.0000"}
    assert {line["routed"] for line in lines if line["method"] in ("bare", "finetune")} == {""}
    assert all(float(line["routed"]) <= 1 for line in lines if "abstain" in line["method"])
    go(done, data, "--abstain")
    assert "answered" not in capsys.readouterr().err


def test_a_whole_model_has_the_weights_that_its_method_kept(done):
    about = json.loads((done / "run.json").read_text())
    folder = done / "finetune" / "seed1"
    backbone = zeroshot.whole_model(about, "finetune", 1, folder)
    kept = torch.load(folder / "state.pt", weights_only=True)["state"]["model"]
    weight = "model.layers.1.mlp.up_proj.weight"
    learned = next(value for name, value in kept.items() if name.endswith(weight))
    torch.testing.assert_close(backbone.model.get_submodule("model.layers.1.mlp.up_proj").weight, learned)
    assert not torch.equal(learned, make_model("llama").get_submodule("model.layers.1.mlp.up_proj").weight)
    with pytest.raises(InputError, match="is no model on its own"):
        zeroshot.whole_model(about, "separate", 1, folder)


def test_a_run_without_its_weights_is_not_answered_by_untrained_ones(done, tmp_path):
    about = json.loads((done / "run.json").read_text())
    for spec, missing in (("finetune", "state.pt"), ("slm", "store"), ("replay:share=0.1", "state.pt")):
        with pytest.raises(InputError, match=rf"^{tmp_path}: no {missing} \(none is committed\); run `slm-fast repro`"):
            zeroshot.model_of(about, spec, 1, tmp_path, 2, "float32")


def test_all_models_answer_in_the_dtype_that_was_asked_for(done, data):
    about = json.loads((done / "run.json").read_text())
    for way, seed, folder in (("bare", 0, None), *zeroshot.cells_of(done, about)):
        if way != "prompt":
            model = zeroshot.model_of(about, way, seed, folder, 2, "bfloat16")
            backbone = model.slm.model.backbone.model if isinstance(model, StoreLM) else model.model
            assert {weight.dtype for weight in backbone.parameters()} == {torch.bfloat16}
    go(done, data, "--limit", "1")
    lines = go(done, data, "--limit", "1", "--dtype", "bfloat16")
    assert {line["dtype"] for line in lines} == {"bfloat16"}
    assert len(list((done / "zeroshot").glob("*, 1 rows.json"))) == 3
    assert len(list((done / "zeroshot").glob("*, 1 rows, bfloat16.json"))) == 3


def test_the_two_ways_to_ask_a_bare_backbone_agree(done, data):
    about = json.loads((done / "run.json").read_text())
    slm = ScalableLM.from_pretrained(done / "slm" / "seed1" / "store")
    theirs = zeroshot.hugging_face(Backbone.load(about["backbone"]), 2)
    found = [zeroshot.answered(model, data, None) for model in (StoreLM(slm=slm, bare=True, batch_size=3), theirs)]
    assert [{**line, "routed": ""} for line in found[0]] == found[1]


def official(name: str) -> dict:
    """lm-eval's own configuration of the task."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    if name != "winogrande":
        return yaml.safe_load((folder / {"piqa": "piqa/piqa.yaml"}.get(name, "arc/arc_easy.yaml")).read_text())
    spec = importlib.util.spec_from_file_location("theirs", folder / "winogrande" / "preprocess_winogrande.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {f"doc_to_{what}": getattr(module, f"doc_to_{what}") for what in ("text", "target", "choice")}
    return {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}], **functions}


def their_row(name: str, question: str, choices: list[str], answer: int) -> dict:
    """A row in the format of the data set that lm-eval's task reads."""
    if name.startswith("arc"):
        return {"question": question, "choices": {"text": choices, "label": list("ABCD")[: len(choices)]}} | {
            "answerKey": "ABCD"[answer]
        }
    if name == "piqa":
        return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": answer}
    return {"sentence": question, "option1": choices[0], "option2": choices[1], "answer": str(answer + 1)}


@pytest.mark.parametrize("name", zeroshot.SETS)
def test_prompts_choices_and_answers_are_those_of_lm_evals_own_tasks(name, data):
    rows = [their_row(name, *row) for row in ROWS[name]]
    config = {key: value for key, value in official(name).items() if not key.endswith("_split") and key != "tag"}
    config |= {"task": f"their_{name}", "test_split": "test"}
    config["custom_dataset"] = lambda **_: {"test": Dataset.from_list(rows)}
    manager = TaskManager(include_defaults=False)
    theirs = manager.load([config])["tasks"][f"their_{name}"]
    told = {"data": str(data / "zeroshot")}
    own = TaskManager(include_path=str(zeroshot.TASKS), include_defaults=False, metadata=told)
    ours = own.load([f"local_{name}"])["tasks"][f"local_{name}"]
    for task in (ours, theirs):
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
    assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]
    assert len(ours.instances) == sum(len(choices) for _, choices, _ in ROWS[name])
    right = [
        [(-1.0 - (i.idx != row[2]), False) for i in ours.instances if i.doc_id == n] for n, row in enumerate(ROWS[name])
    ]
    for n, (mine, other) in enumerate(zip(ours.test_docs(), theirs.test_docs(), strict=True)):
        found = ours.process_results(mine, right[n])
        assert found == theirs.process_results(other, right[n])
        assert found["acc"] == 1.0


def test_what_is_missing_is_said_in_one_line(done, data, tmp_path, capsys):
    calls = [
        ([str(tmp_path), "--data", str(data)], 2, "no run.json in it"),
        ([str(done), "--data", str(tmp_path)], 2, "arc_easy/test.jsonl.gz: no such file"),
    ]
    for call, status, said in calls:
        assert zeroshot.main(call) == status
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    (tmp_path / "run.json").write_text(json.dumps({"backbone": "minilm"}))
    assert zeroshot.main([str(tmp_path), "--data", str(data)]) == 2
    assert "its backbone is 'minilm'; only decoders such as LLaMA are scored" in capsys.readouterr().err
    with pytest.raises(WorkError, match="no method has learned the whole stream"):
        zeroshot.cells_of(tmp_path, {"stream": {"tasks": ["a"]}})
    slm = ScalableLM.from_pretrained(done / "slm" / "seed1" / "store")
    with pytest.raises(WorkError, match=r"local_piqa.*cannot be loaded: ValueError: tell these tasks where"):
        evaluate(StoreLM(slm=slm), ["local_piqa"], folder=zeroshot.TASKS)


def test_the_harness_takes_patterns_shots_and_limits(done, data):
    slm = ScalableLM.from_pretrained(done / "slm" / "seed1" / "store")
    told = {"data": str(data / "zeroshot")}
    found = evaluate(StoreLM(slm=slm), ["local_arc_*"], folder=zeroshot.TASKS, metadata=told, limit=2, samples=True)
    assert {score.task for score in scores(found)} == {"local_arc_easy", "local_arc_challenge"}
    assert found["n-samples"]["local_arc_easy"] == {"original": 3, "effective": 2}
    assert len(found["samples"]["local_arc_easy"]) == 2
    assert found["model"]["routed"].keys() == {"local_arc_easy", "local_arc_challenge"}
