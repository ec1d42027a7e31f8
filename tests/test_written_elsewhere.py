"""Files written by other programs: pandas, datasets, SetFit, alpaca, ShareGPT, OpenAI, TRL and Label Studio."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pandas
import pytest
from command import one_line, slm_fast

from slm_fast import InputError, Task, WorkError
from slm_fast.data import Row, rows_of_file

FRAME = pandas.DataFrame({"text": ["good; phone", 'a "bad", phone', "Größe\nschlecht"], "label": ["pos", "neg", "neg"]})
ROWS = [Row(text, label) for text, label in FRAME.itertuples(index=False)]
Save = Callable[[Path], object]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> object:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("t.csv", FRAME.to_csv),  # with the index, as a column without a name
        ("t.csv.gz", lambda path: FRAME.to_csv(path, index=False)),
        ("t.tsv", lambda path: FRAME.to_csv(path, sep="\t")),
        ("t.csv", lambda path: FRAME.to_csv(path, sep=";", encoding="utf-8-sig")),  # as for a spreadsheet
        ("t.json", FRAME.to_json),
        ("t.json", lambda path: FRAME.to_json(path, orient="records", indent=2)),
        ("t.json", lambda path: FRAME.to_json(path, orient="split")),
        ("t.json", lambda path: FRAME.to_json(path, orient="table")),
        ("t.jsonl", lambda path: FRAME.to_json(path, orient="records", lines=True)),
        ("t.jsonl.gz", lambda path: FRAME.to_json(path, orient="records", lines=True)),
        ("t.parquet", FRAME.to_parquet),
    ],
)
def test_pandas(tmp_path: Path, name: str, save: Save) -> None:
    save(tmp_path / name)
    assert Task.from_file("phones", tmp_path / name).rows == ROWS


def test_pandas_categories_numbers_and_missing_values(tmp_path: Path) -> None:
    frame = FRAME.assign(label=FRAME.label.astype("category"), stars=[5, 1, None])
    frame.to_parquet(tmp_path / "t.parquet")
    for task in (Task.from_rows("x", frame), Task.from_file("x", tmp_path / "t.parquet")):
        assert task.rows == ROWS
    with pytest.raises(WorkError, match=r"^x: row 3: no 'label'"):
        Task.from_rows("x", frame, text="text", label="stars")
    stars = Task.from_rows("x", frame[:2], text="text", label="stars")
    assert stars.labels == ["1", "5"]  # pandas made them floats, because a value is missing


def classes() -> datasets.Dataset:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    values = {"text": list(FRAME.text), "label": names.str2int(list(FRAME.label))}
    return datasets.Dataset.from_dict(values, features=features)


def test_a_datasets_class_names_are_used_and_kept_in_parquet(tmp_path: Path) -> None:
    dataset = classes()
    assert Task.from_rows("x", dataset).rows == ROWS
    assert Task.from_rows("x", dataset.to_iterable_dataset()).rows == ROWS
    assert (
        Task.from_rows("x", dataset.rename_columns({"text": "body", "label": "mood"}), text="body", label="mood").rows
        == ROWS
    )
    dataset.to_parquet(tmp_path / "t.parquet")
    assert Task.from_file("x", tmp_path / "t.parquet").rows == ROWS


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("t.jsonl", lambda dataset, path: dataset.to_json(path)),
        ("t.json", lambda dataset, path: dataset.to_json(path, lines=False)),
        ("t.csv", lambda dataset, path: dataset.to_csv(path)),
    ],
)
def test_datasets_writes_classes_as_numbers_that_labels_name(tmp_path: Path, name: str, save: Save) -> None:
    save(classes(), tmp_path / name)
    assert [row.target for row in Task.from_file("x", tmp_path / name).rows] == ["1", "0", "0"]
    assert Task.from_file("x", tmp_path / name, labels=["neg", "pos"]).rows == ROWS


def test_a_folder_that_datasets_saved_says_how_it_is_read(tmp_path: Path) -> None:
    classes().save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved: is a folder, expected a file; Task.from_rows\(name, dataset"):
        Task.from_file("x", tmp_path / "saved")
    assert Task.from_rows("x", datasets.load_from_disk(tmp_path / "saved")).rows == ROWS
    with pytest.raises(InputError, match=r": is a folder, expected a file$"):
        Task.from_file("x", tmp_path)


def written(path: Path, rows: list[dict], *, lines: bool) -> Path:
    text = "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=4)
    path.write_text(text)
    return path


def test_setfit(tmp_path: Path) -> None:
    rows = [{"text": "good", "label": 1, "label_text": "pos"}, {"text": "bad", "label": 0, "label_text": "neg"}]
    path = written(tmp_path / "train.jsonl", rows, lines=True)
    assert Task.from_file("x", path).labels == ["0", "1"]
    assert Task.from_file("x", path, label="label_text").labels == ["neg", "pos"]


ALPACA = [
    {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello!"},
]


def test_alpaca(tmp_path: Path) -> None:
    task = Task.from_file("x", written(tmp_path / "alpaca_data.json", ALPACA, lines=False))
    assert task.rows == [Row("1, 2", "3", "Add the numbers."), Row("", "Hello!", "Greet.")]
    assert task.labels is None


@pytest.mark.parametrize("bad", [{"instruction": "Greet.", "input": ""}, {**ALPACA[1], "output": ""}])
def test_an_alpaca_file_with_a_missing_output_names_the_row(tmp_path: Path, bad: dict) -> None:
    path = written(tmp_path / "alpaca_data.json", [ALPACA[0], bad], lines=False)
    done = slm_fast("learn", tmp_path / "store", "--backbone=minilm", f"--task=x={path}")
    one_line(done, 1, f"{path}: row 2: no 'output'")


def test_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    more = [{"from": "system", "value": "Be brief."}, *turns, {"from": "human", "value": "Why?"}]
    rows = [
        {"id": "a_0", "conversations": turns},
        {"id": "b_0", "conversations": [*more, {"from": "gpt", "value": "So."}]},
    ]
    task = Task.from_file("x", written(tmp_path / "sharegpt.json", rows, lines=False))
    several = (("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"))
    assert task.rows == [Row("Hi", "Hello"), Row("User: Hi\nAssistant: Hello\nUser: Why?", "So.", "Be brief.", several)]


def test_openai_fine_tuning(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    rows = [
        {"messages": [system, user, {"role": "assistant", "content": "Hello"}]},
        {"messages": [user, {"role": "assistant", "content": "Yo", "weight": 1}]},
    ]
    task = Task.from_file("x", written(tmp_path / "train.jsonl", rows, lines=True))
    assert task.rows == [Row("Hi", "Hello", "Be brief."), Row("Hi", "Yo")]


# TRL: prompt and completion, as texts or lists of messages


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TRL = [
    {
        "prompt": [said("system", "Be brief."), said("user", "What colour is the sky?")],
        "completion": [said("assistant", "Blue.")],
    },
    {
        "prompt": [said("user", "Hi"), said("assistant", "Yes?"), said("user", "Bye")],
        "completion": [said("assistant", "So long.")],
    },
]
EXPECTED = [
    Row("What colour is the sky?", "Blue.", "Be brief."),
    Row(
        "User: Hi\nAssistant: Yes?\nUser: Bye", "So long.", "", (("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))
    ),
]


def test_trl_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "The sky is", "completion": " blue."}]
    assert Task.from_file("x", written(tmp_path / "t.jsonl", rows, lines=True)).rows == [Row("The sky is", "blue.")]


def test_trl_messages_in_files_and_tables(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(TRL)
    dataset.to_parquet(tmp_path / "t.parquet")
    dataset.to_json(tmp_path / "t.jsonl")
    for task in (
        Task.from_file("x", tmp_path / "t.parquet"),
        Task.from_file("x", tmp_path / "t.jsonl"),
        Task.from_rows("x", dataset),
        Task.from_rows("x", pandas.read_parquet(tmp_path / "t.parquet")),  # in which lists are arrays
        Task.from_rows("x", [{**row, "completion": row["completion"][0]["content"]} for row in TRL]),
    ):
        assert task.rows == EXPECTED
        assert task.labels is None


def test_trl_prompts_alone_are_rows_to_answer(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [{"prompt": row["prompt"]} for row in TRL], lines=True)
    assert rows_of_file(path) == [replace(row, target=None) for row in EXPECTED]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**TRL[0], "completion": []}, r"'prompt': the last turn is not the assistant's"),
        ({"prompt": TRL[0]["prompt"]}, r"'prompt': the last turn is not the assistant's"),
        (
            {**TRL[0], "completion": ["Blue."]},
            r"'prompt': turn 3: expected an object with 'role' and 'content', got 'Blu",
        ),
        ({**TRL[0], "prompt": [{"role": "wizard", "content": "x"}]}, r"'prompt': turn 1: expected a role of system, "),
        ({**TRL[0], "prompt": ["a", "b"]}, r"'prompt': expected a string, got \['a', 'b'\]"),
        ({**TRL[0], "prompt": "Hi"}, r"'completion': expected a word or an integer, got \[\{"),
    ],
)
def test_a_trl_row_that_is_not_understood_is_one_line(row: dict, words: str) -> None:
    with pytest.raises(WorkError, match=rf"^x: row 1: {words}"):
        Task.from_rows("x", [row])


def test_label_studio(tmp_path: Path) -> None:
    """JSON-MIN and CSV exports of a text classification project whose control is called "sentiment"."""
    times = {"created_at": "2024-05-01T10:00:00.0Z", "updated_at": "2024-05-01T10:00:00.0Z", "lead_time": 4.2}
    rows = [
        {"text": row.text, "id": i, "sentiment": row.target, "annotator": 1, "annotation_id": i, **times}
        for i, row in enumerate(ROWS, 1)
    ]
    assert Task.from_file("x", written(tmp_path / "min.json", rows, lines=False)).rows == ROWS
    pandas.DataFrame(rows).to_csv(tmp_path / "export.csv", index=False)
    assert Task.from_file("x", tmp_path / "export.csv").rows == ROWS


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path, name: str) -> None:
    save = {".csv": lambda path: FRAME.to_csv(path, index=False), ".parquet": FRAME.to_parquet}
    lines = lambda path: FRAME.to_json(path, orient="records", lines=True)  # noqa: E731
    save.get(Path(name).suffix, lines)(tmp_path / name)
    options = ["--backbone=minilm", f"--task=x={tmp_path / name}", "--text-column=body"]
    one_line(slm_fast("learn", tmp_path / "store", *options), 2, "no column 'body'; columns: 'text', 'label'")
