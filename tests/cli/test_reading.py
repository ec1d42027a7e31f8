"""Tests of reading files on the command line: options for columns, encoding, delimiter and labels, and pipes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from command import one_line, slm_fast

from slm_fast.store import Store

ROWS = [("Das Paket fehlt, schon wieder", "Lieferung"), ("Der Bildschirm ist schön kaputt", "Reparatur")] * 4
LEARN = ("--backbone", "minilm", "--epochs", "1", "--max-length", "16")


def export(path: Path, header: str = "Nachricht;Ziel", encoding: str = "cp1252") -> Path:
    path.write_text("\n".join([header, *(f"{text};{label}" for text, label in ROWS)]), encoding)
    return path


def labels(store: Path) -> dict[str, list[str]]:
    return {name: task["labels"] for name, task in json.loads(slm_fast("tasks", store, "--json").stdout).items()}


def test_an_export_is_learned_and_evaluated_with_its_columns_named(tmp_path: Path) -> None:
    path, store = export(tmp_path / "EXPORT.CSV"), tmp_path / "store"
    named = ("--text-column", "nachricht", "--label-column", "ziel")
    done = slm_fast("learn", store, "--task", f"t={path}", "--valid", f"t={path}", *named, *LEARN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"slm-fast: warning: {path}: not UTF-8; read as Windows-1252") == 2
    assert labels(store) == {"t": ["Lieferung", "Reparatur"]}
    done = slm_fast(
        "evaluate", store, "--task", f"t={path}", *named, "--encoding", "cp1252", "--delimiter", ";", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)["accuracy"]) == {"t"}


def test_columns_of_unknown_names_are_listed_with_the_options(tmp_path: Path) -> None:
    path = export(tmp_path / "t.csv", encoding="utf-8")
    done = slm_fast("learn", tmp_path / "store", "--task", f"t={path}", *LEARN)
    one_line(done, 1, f"{path}: line 2: no 'text'", "'Nachricht', 'Ziel'", "--text-column")
    done = slm_fast("learn", tmp_path / "store", "--task", f"t={path}", *LEARN, "--text-column", "Nachrichten")
    one_line(done, 2, "no column 'Nachrichten'")
    done = slm_fast("predict", tmp_path / "store", "--input", path, "--text-column", "nope")
    one_line(done, 2, f"{path}: line 2: no column 'nope'; columns: 'Nachricht', 'Ziel'")  # before a model is looked for
    for wrong, said in ((("--encoding", "utf-9"), "encoding"), (("--delimiter", ";;"), "delimiter")):
        one_line(slm_fast("learn", tmp_path / "store", "--task", f"t={path}", *LEARN, *wrong), 2, said)


def test_tasks_come_from_standard_input_and_from_pipes_each_read_once(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
    pipe, store = tmp_path / "pipe", tmp_path / "store"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(lines,))
    writer.start()
    done = slm_fast("learn", store, "--task", "a=-", "--task", f"b={pipe}", *LEARN, stdin=lines)
    writer.join()
    assert done.returncode == 0, done.stderr
    assert set(labels(store)) == {"a", "b"}
    assert slm_fast("evaluate", store, "--task", "a=-", "--json", stdin=lines).returncode == 0
    one_line(slm_fast("evaluate", store, "--task", "a=-", "--task", "b=-", stdin=lines), 2, "is given twice")


def test_words_for_integer_labels_are_given_by_task(tmp_path: Path) -> None:
    path, words, store = tmp_path / "t.csv", tmp_path / "words.json", tmp_path / "store"
    path.write_text("text,label\na place,2\nb place,0\n")
    words.write_text('["low", "middle", "high"]')
    run = ("learn", store, "--task", f"t={path}", *LEARN)
    one_line(slm_fast(*run, "--labels", f"u={words}"), 2, "--labels 'u': no --task of that name")
    one_line(slm_fast(*run, "--labels", f"t={tmp_path / 'no.json'}"), 2, "no.json: no such file")
    assert slm_fast(*run, "--labels", f"t={words}").returncode == 0
    assert labels(store) == {"t": ["high", "low"]}
    assert slm_fast("evaluate", store, "--task", f"t={path}", "--labels", f"t={words}").returncode == 0


def test_max_length_is_a_new_models_and_later_that_of_learning_alone(tmp_path: Path) -> None:
    path, store = tmp_path / "t.jsonl", tmp_path / "store"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    assert slm_fast("learn", store, "--task", f"a={path}", *LEARN).returncode == 0
    done = slm_fast("learn", store, "--task", f"b={path}", "--epochs", "1", "--max-length", "8")
    assert done.returncode == 0, done.stderr
    assert Store.open(store).about["config"]["max_length"] == 16
