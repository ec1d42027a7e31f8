"""Tests of `slm-fast lm-eval` with the store of a tiny LLaMA and a custom task file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from command import one_line, slm_fast
from models import make_model, make_tokenizer, one_thread, random_task, toy_task  # noqa: F401

from slm_fast import ScalableLM
from slm_fast.integrations.lm_eval import BARE

TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
CHOICE = "doc_to_choice: ['yes', 'no']\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
WRITTEN = (
    "doc_to_target: label\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}answer :"
    make_model("llama").save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    slm = ScalableLM.from_backbone(str(folder / "llama"))
    slm.add([random_task(slm, "sea"), random_task(slm, "farm")])
    slm.save_pretrained(folder / "store")
    rows = [row for topic in ("sea", "farm", "sea") for row in toy_task(topic, rows=4).rows]
    lines = [json.dumps({"text": row.text, "label": row.target}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    for kind, more in (("multiple_choice", CHOICE), ("generate_until", WRITTEN)):
        text = TASK.format(rows=folder / "rows.jsonl", cache=folder / "cache", kind=kind)
        (folder / f"{kind}.yaml").write_text(text + more)
    return folder


def call(place: Path, *more: object, kind: str = "multiple_choice"):
    return slm_fast("lm-eval", place / "store", "--tasks", place / f"{kind}.yaml", *more)


def test_a_task_file_is_answered_and_the_shares_of_tasks_are_shown(place):
    done = call(place, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    texts = [json.loads(line)["text"] for line in (place / "rows.jsonl").read_text().splitlines()]
    tasks = [answer.task for answer in ScalableLM.from_pretrained(place / "store").predict(texts, max_new_tokens=1)]
    shares = {name: tasks.count(name) / 12 for name in ("farm", "sea")}
    assert found["routed"]["own"] == pytest.approx(shares)
    assert min(shares.values()) > 0
    assert found["n-samples"]["own"]["effective"] == 12
    done = call(place)
    assert done.returncode == 0, done.stderr
    assert f"{found['results']['own']['acc,none']:.4f}" in done.stdout
    assert f"farm {100 * shares['farm']:.1f} %" in done.stdout


def test_batch_sizes_chats_the_bare_model_and_written_answers(place):
    numbers = {}
    for name, more in {
        "one": ("--batch-size", 1),
        "many": ("--batch-size", 16),
        "told": ("--given-task", "farm"),
        "bare": ("--bare",),
        "chat": ("--chat", "--system", "the sea1", "--limit", 3),
    }.items():
        done = call(place, "--json", "--samples", *more)
        assert done.returncode == 0, done.stderr
        numbers[name] = json.loads(done.stdout)
    assert numbers["one"]["results"] == numbers["many"]["results"]
    assert numbers["told"]["routed"]["own"] == {"farm": 1.0}
    assert numbers["bare"]["routed"]["own"] == {BARE: 1.0}
    asked = numbers["chat"]["samples"]["own"][0]["arguments"][0][0]
    assert asked.startswith("the sea1 ")
    assert asked.endswith(" answer :")
    assert len(numbers["chat"]["samples"]["own"]) == 3
    written = json.loads(call(place, "--json", "--samples", kind="generate_until").stdout)
    assert set(written["results"]["own"]) >= {"exact_match,none"}
    assert all(len(row["resps"][0][0].split()) <= 3 for row in written["samples"]["own"])


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--tasks", ","), ("--tasks", "got none")),
        (("--batch-size", "0"), ("--batch-size", "expected auto, or a number from 1 on")),
        (("--shots", "-1"), ("--shots", "at least 0")),
        (("--metadata", "data"), ("--metadata 'data'", "KEY=VALUE")),
        *((("--limit", limit), ("--limit", "above 0", limit)) for limit in ("0", "-1", "nan", "inf")),
        (("--samples",), ("--samples", "--json")),
        (("--system", "x"), ("--system", "--chat")),
        (("--given-task", "sky"), ("task 'sky'", "farm, sea")),
        (("--task-folder", "/nowhere"), ("/nowhere", "no such folder")),
        (("--task-folder", __file__), (__file__, "is a file, expected a folder")),
    ],
)
def test_a_call_that_cannot_be_right_is_one_line(place, more, parts):
    one_line(call(place, *more), 2, *parts)


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("rows.jsonl", "none.jsonl", ("cannot be loaded: its data has no rows",)),
        ("metric: acc", "metric: nope", ("cannot be loaded: nope not found",)),
        ("['yes', 'no']", "'{{text}}'", ("cannot be loaded: doc_to_choice: ", "a list such as ['yes', 'no']")),
        ("['yes', 'no']", "'{{label}}'", ("doc_to_choice: ", "malformed node", "a list such as")),
        ("{{text}}", "{{nope}}", ("cannot be loaded: doc_to_text: UndefinedError: 'nope' is undefined",)),
        ("{{text}}", "{{['a', 'b'][n]}}", ("cannot be evaluated: doc_to_text: UndefinedError",)),
    ],
)
def test_a_broken_task_file_is_named_with_its_reason(place, tmp_path, before, after, parts):
    rows = [{"text": "the sea1", "label": "yes", "n": n} for n in (0, 1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "none.jsonl").write_text("")
    text = TASK.format(rows=tmp_path / "rows.jsonl", cache=tmp_path / "cache", kind="multiple_choice") + CHOICE
    assert before in text
    (tmp_path / "own.yaml").write_text(text.replace(before, after))
    done = slm_fast("lm-eval", place / "store", "--tasks", f"{place / 'multiple_choice.yaml'},{tmp_path / 'own.yaml'}")
    *bar, last = done.stderr.strip().splitlines()
    assert (done.returncode, [line for line in bar if "it/s" not in line]) == (1, [])
    assert "own.yaml' cannot be" in last
    assert all(part in last for part in parts), last
    assert " at 0x" not in last


def test_more_shots_than_rows_are_one_line(place):
    done = call(place, "--shots", 99)
    assert done.returncode == 1
    assert "yaml' cannot be evaluated: ValueError: Sample larger than population" in done.stderr.splitlines()[-1]


def test_damaged_files_and_missing_packages_are_one_line(place, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: missing.jsonl}\n")
    done = slm_fast("lm-eval", place / "store", "--tasks", tmp_path / "bad.yaml")
    one_line(done, 1, "bad.yaml", "cannot be loaded")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("slm_fast.cli.lm_eval.find_spec", lambda name: None)
    one_line(call(place), 2, "pip install 'slm-fast[lm-eval]'")


def test_a_gguf_option_needs_its_folder(place):
    one_line(call(place, "--gguf", "x.gguf"), 2, "--gguf 'x.gguf'", "needs --backbone")
    one_line(call(place, "--backbone", place, "--gguf", "x.bin"), 2, "ends in .gguf")
    one_line(call(place, "--backbone", place, "--gguf", "x.gguf"), 2, "no such file")
