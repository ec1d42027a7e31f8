"""Tests of `slm-fast import` and `slm-fast export` with PEFT adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import one_line, slm_fast
from models import make_model, make_tokenizer, one_thread  # noqa: F401
from peft_adapters import edit, loaded, logits_of, texts, write_adapter

LABELS = ["blue", "grey", "red"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny BERT backbone, a PEFT adapter for it, example texts and labels."""
    folder = tmp_path_factory.mktemp("bert")
    make_model("bert").save_pretrained(folder / "backbone")
    make_tokenizer("bert").save_pretrained(folder / "backbone")
    write_adapter(folder / "adapter", "bert", labels=3, r=5)
    (folder / "examples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("sky")))
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


def imported(bert: Path, store: Path, *more: object, adapter: Path | None = None):
    call = ("import", store, "--adapter", adapter or bert / "adapter", "--name", "sky")
    return slm_fast(*call, "--examples", bert / "examples.jsonl", *more)


def test_an_adapter_becomes_a_task_that_answers_and_goes_out_again(bert: Path, tmp_path: Path) -> None:
    store, backbone = tmp_path / "store", ("--backbone", bert / "backbone")
    done = imported(bert, store, "--labels", bert / "labels.json", "--check", *backbone)
    assert done.returncode == 0, done.stderr
    difference, summary, cost = done.stderr.strip().splitlines()
    assert float(difference.rpartition(" ")[2]) < 1e-4
    assert summary == f"imported sky: 9 layers, rank 5; tasks in {store}: 1"
    assert "extra pass through the lowest 1 of 3 layers" in cost
    rows = texts("sky", 3, seed=1)
    answers = slm_fast(
        "predict", store, "--dtype", "float32", stdin="".join(json.dumps({"text": t}) + "\n" for t in rows)
    )
    model = loaded(bert / "adapter", "bert", labels=3)
    expected = [LABELS[int(logits_of(model, "bert", row)[0].argmax())] for row in rows]
    assert [json.loads(line)["label"] for line in answers.stdout.splitlines()] == expected
    assert slm_fast("verify", store).returncode == 0
    assert "sky" in slm_fast("tasks", store).stdout
    assert slm_fast("export", store, "sky", tmp_path / "out").returncode == 0
    again = loaded(tmp_path / "out", "bert", labels=3)
    for row in rows:
        assert float((logits_of(again, "bert", row) - logits_of(model, "bert", row)).abs().max()) < 1e-4
    one_line(slm_fast("export", store, "sky", tmp_path / "out"), 2, "already exists")
    one_line(slm_fast("export", store, "sky", tmp_path / "one", "--weights", "0.5"), 2, "one slot")
    twice = imported(bert, store, "--labels", bert / "labels.json", "--check")
    assert twice.returncode == 0
    warning, difference, summary = twice.stderr.strip().splitlines()
    assert "already imported" in warning
    assert float(difference.rpartition(" ")[2]) < 1e-4
    assert summary == f"kept sky: 9 layers, rank 5; tasks in {store}: 1"


def test_routes_from_the_embeddings_cost_no_pass_and_nothing_is_said_of_one(bert: Path, tmp_path: Path) -> None:
    done = imported(bert, tmp_path / "store", "--backbone", bert / "backbone", "--taps", "0")
    assert done.returncode == 0
    assert done.stderr == f"imported sky: 9 layers, rank 5; tasks in {tmp_path / 'store'}: 1\n"


def test_top_k_is_idle_on_a_backbone_that_writes_unless_an_imported_task_has_a_head(bert: Path, tmp_path: Path) -> None:
    for part in (make_model("llama"), make_tokenizer("llama")):
        part.save_pretrained(tmp_path / "llama")
    store, line = tmp_path / "store", '{"text": "sky1 sky2"}\n'
    given = ("--backbone", tmp_path / "llama", "--examples", bert / "examples.jsonl")
    for name, labels, said in (("write", None, "--top-k has no effect: a backbone that writes"), ("classify", 3, "")):
        write_adapter(tmp_path / name, "llama", labels=labels)
        done = slm_fast("import", store, "--adapter", tmp_path / name, "--name", name, *given)
        assert done.returncode == 0, done.stderr
        given = given[2:]
        answered = slm_fast("predict", store, "--task", name, "--top-k", 3, "--max-new-tokens", 1, stdin=line)
        assert said in answered.stderr
        assert bool(said) == bool(answered.stderr)
    assert len(json.loads(answered.stdout)["probabilities"]) == 3


def test_what_is_wrong_is_one_line_and_no_store_is_made(bert: Path, tmp_path: Path) -> None:
    store, backbone = tmp_path / "store", ("--backbone", bert / "backbone")
    one_line(imported(bert, store), 2, "a new store needs --backbone")
    one_line(imported(bert, store, *backbone, adapter=tmp_path / "none"), 2, "no such folder")
    write_adapter(tmp_path / "dora", "bert", labels=3)
    edit(tmp_path / "dora", lambda config: config.update(use_dora=True))
    one_line(imported(bert, store, *backbone, adapter=tmp_path / "dora"), 2, "use_dora", "merge_and_unload")
    (tmp_path / "bad.jsonl").write_text('{"text": "sky1"}\n{"nothing": 1}\n')
    call = ("import", store, "--adapter", bert / "adapter", "--name", "sky", "--examples", tmp_path / "bad.jsonl")
    one_line(slm_fast(*call, *backbone), 1, "bad.jsonl: line 2")
    (tmp_path / "t.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "empty.csv").write_text("")
    for file, status, said, more in (
        ("t.csv", 2, "t.csv: line 2: no column 'nope'", ("--text-column", "nope")),
        ("header.csv", 1, "header.csv: ", ()),
        ("empty.csv", 1, "empty.csv: ", ()),
    ):
        one_line(slm_fast(*call[:-1], tmp_path / file, *backbone, *more), status, said)
        learn = ("learn", store, "--task", f"t={tmp_path / file}")
        one_line(slm_fast(*learn, *backbone, *more), status, said)
    one_line(slm_fast("export", store, "sky", tmp_path / "out", "--weights", "a,b"), 2, "--weights", "0.5,0.5")
    assert not store.exists()
