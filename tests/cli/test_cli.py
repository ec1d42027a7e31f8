"""End-to-end tests of the command line with real files and the packaged MiniLM."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from command import one_line, slm_fast

from slm_fast import demo

TASKS = ("help_desk", "recipe_steps")


def demo_file(name: str, split: str) -> Path:
    return Path(demo.__file__).parent / f"{name}.{split}.csv"


def tree(store: Path) -> dict[str, bytes]:
    files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.name not in (".lock", ".keys")]
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two demo tasks, learned with `slm-fast learn`."""
    path = tmp_path_factory.mktemp("cli") / "store"
    files = [f"--task={name}={demo_file(name, 'train')}" for name in TASKS]
    done = slm_fast("learn", path, "--backbone", "minilm", "--epochs", 4, "--max-length", 24, *files)
    assert done.returncode == 0, done.stderr
    return path


def test_learning_makes_a_store_that_verifies_and_lists_its_tasks(store: Path):
    assert slm_fast("verify", store).returncode == 0
    listed = json.loads(slm_fast("tasks", store, "--json").stdout)
    assert list(listed) == sorted(TASKS)
    assert listed["recipe_steps"]["labels"] == ["bake", "chop", "fry", "season"]


def test_predict_answers_a_stream_in_order_keeps_ids_and_names_the_task(store: Path):
    lines = [
        {"id": "a", "text": "My laptop does not connect to the office wifi."},
        {"text": "Bake the loaf in a hot oven until golden."},
        {"id": 7, "text": "I forgot my password and my account is locked."},
        {"text": "Fry the onions in hot oil."},
    ]
    done = slm_fast("predict", store, stdin="\n".join(map(json.dumps, lines)))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == ["a", 2, 7, 4]
    assert [answer["task"] for answer in answers] == ["help_desk", "recipe_steps"] * 2
    assert answers[0]["label"] == "network"
    for answer in answers:
        assert 0 < answer["score"] <= 1
        assert sum(step["weight"] for step in answer["route"]) == pytest.approx(1, abs=1e-4)


def test_bad_rows_are_marked_the_rest_is_answered_and_the_status_is_1(store: Path, tmp_path: Path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"text": "Chop the leeks."}\n{"id": "x", "label": "none"}\nnot json\n{"text": ""}\n\xff\xfe\n\n'
        b'{"id": "last", "text": "Season with salt and pepper."}\n'
    )
    done = slm_fast("predict", store, "--input", source, "--output", output)
    one_line(done, 1, "4 rows failed")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [1, "x", 3, 4, 5, "last"]
    assert ["error" in answer for answer in answers] == [False, True, True, True, True, False]
    assert [answer["task"] for answer in answers if "task" in answer] == ["recipe_steps"] * 2
    assert "UTF-8" in answers[4]["error"]


def test_strict_stops_at_the_first_bad_row(store: Path):
    done = slm_fast("predict", store, "--strict", stdin='{"text": "Chop."}\n{}\n{"text": "Fry."}\n')
    one_line(done, 1, "id 2")
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(("given", "many"), [("2", 2), ("all", 4), ("99", 4)])
def test_predict_reports_the_probabilities_of_as_many_labels_as_asked(store: Path, given: str, many: int):
    line = json.dumps({"text": "Fry the onions in hot oil."})
    done = slm_fast("predict", store, "--task", "recipe_steps", "--top-k", given, stdin=line)
    assert done.returncode == 0, done.stderr
    (answer,) = map(json.loads, done.stdout.splitlines())
    chances = answer["probabilities"]
    assert len(chances) == many
    assert next(iter(chances)) == answer["label"] == "fry"
    assert list(chances.values()) == sorted(chances.values(), reverse=True)
    assert many < 4 or sum(chances.values()) == pytest.approx(1, abs=1e-4)


def test_predict_refuses_a_number_of_labels_that_is_none(store: Path):
    one_line(slm_fast("predict", store, "--top-k", "few", stdin="{}"), 2, "--top-k", "expected a number or all")
    one_line(slm_fast("predict", store, "--top-k", 0, stdin="{}"), 2, "--top-k: expected at least 1, got 0")


def test_predict_does_not_overwrite_unless_told_to(store: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    one_line(slm_fast("predict", store, "--output", output, stdin='{"text": "Fry."}\n'), 2, "out.jsonl", "--overwrite")
    assert output.read_text() == "precious\n"
    done = slm_fast("predict", store, "--output", output, "--overwrite", stdin='{"text": "Fry."}\n')
    assert (done.returncode, done.stderr) == (0, f"rows answered: 1; rows in {output}: 1\n")
    assert slm_fast("predict", store, stdin='{"text": "Fry."}\n').stderr == ""
    assert json.loads(output.read_text())["task"] == "recipe_steps"


@pytest.mark.parametrize("wrong", [("--batch-size", "0"), ("--abstain", "7"), ("--task", "nonesuch"), ("--top-p", "2")])
def test_a_wrong_option_leaves_the_output_that_is_there(wrong: tuple[str, str], store: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    done = slm_fast("predict", store, "--output", output, "--overwrite", *wrong, stdin='{"text": "Fry."}\n')
    one_line(done, 2)
    assert output.read_text() == "precious\n"


def test_an_input_that_is_the_output_is_refused(store: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Fry."}\n')
    one_line(slm_fast("predict", store, "--input", path, "--output", path, "--overwrite"), 2, "is the input")
    assert path.read_text() == '{"text": "Fry."}\n'


def test_a_compressed_input_that_breaks_off_is_answered_up_to_there(store: Path, tmp_path: Path):
    source, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    rng = random.Random(0)
    lines = [json.dumps({"id": i, "text": f"Fry {rng.random()}"}) for i in range(40)]
    source.write_bytes(gzip.compress("\n".join(lines).encode())[:-40])
    one_line(slm_fast("predict", store, "--input", source, "--output", output), 1, "breaks off")
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids == list(range(len(ids)))


def test_an_id_that_cannot_be_written_is_an_error_of_its_row(store: Path):
    done = slm_fast("predict", store, stdin='{"id": "\\ud800", "text": "Fry."}\n{"id": NaN, "text": "Fry."}\n')
    assert done.returncode == 1
    assert ["error" in json.loads(line) for line in done.stdout.splitlines()] == [True, True]


def test_a_long_text_is_truncated_and_says_so(store: Path):
    done = slm_fast("predict", store, stdin=json.dumps({"text": "Fry the onions. " * 60}))
    assert json.loads(done.stdout)["truncated"] is True


def test_evaluate_prints_accuracy_and_routing(store: Path):
    files = [f"--task={name}={demo_file(name, 'test')}" for name in TASKS]
    result = json.loads(slm_fast("evaluate", store, "--json", *files).stdout)
    assert set(result["accuracy"]) == set(result["routing"]) == set(TASKS)
    assert min(result["routing"].values()) > 0.8
    assert result["average"] > 0.5


def test_forget_leaves_the_store_as_if_the_task_had_never_been_learned_and_merge_brings_it_back(
    store: Path, tmp_path: Path
):
    whole = tree(store)
    for name in TASKS:
        assert slm_fast("merge", tmp_path / name, store).returncode == 0
        (other,) = set(TASKS) - {name}
        assert slm_fast("forget", tmp_path / name, other).returncode == 0
        assert not any(f"tasks/{other}/" in path for path in tree(tmp_path / name))
    merged = tmp_path / "merged"
    assert slm_fast("merge", merged, tmp_path / TASKS[1], tmp_path / TASKS[0]).returncode == 0
    assert tree(merged) == whole
    one_line(slm_fast("forget", merged, "nonesuch"), 2, "nonesuch", *TASKS)


def test_verify_names_a_damaged_file_and_nothing_opens_it(store: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    assert slm_fast("merge", copy, store).returncode == 0
    damaged = next((copy / "tasks" / "help_desk").iterdir())
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    one_line(slm_fast("verify", copy), 1, damaged.name, "damaged")
    one_line(slm_fast("predict", copy, stdin='{"text": "Fry."}\n'), 1, damaged.name)


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (("learn", "NEW", "--task", "a=missing.csv", "--backbone", "minilm"), 2, ("missing.csv", "no such file")),
        (("learn", "NEW", "--task", "a=FILE"), 2, ("--backbone",)),
        (("learn", "NEW", "--task", "../a=FILE", "--backbone", "minilm"), 2, ("../a",)),
        (("learn", "NEW", "--task", "a=FILE", "--task", "a=FILE", "--backbone", "minilm"), 2, ("given twice",)),
        (("learn", "NEW", "--task", "FILE", "--backbone", "minilm"), 2, ("NAME=FILE",)),
        (("learn", "NEW", "--task", "a=FILE", "--backbone", "no/such-model"), 2, ("no/such-model",)),
        (("learn", "NEW", "--task", "a=FILE", "--backbone", "minilm", "--k", "0"), 2, ("k:", "at least 1")),
        (("learn", "NEW", "--task", "a=FILE", "--backbone", "minilm", "--targets", "gate"), 2, ("'gate'", "query")),
        (("learn", "NEW", "--task", "a=ONE_CLASS", "--backbone", "minilm"), 1, ("at least two labels",)),
        (("learn", "NEW", "--task", "a=NO_LABEL", "--backbone", "minilm"), 1, ("line 3", "label")),
        (("learn", "STORE", "--task", "help_desk=FILE"), 2, ("help_desk", "already")),
        (("learn", "STORE", "--task", "a=FILE", "--router", "dtkr"), 2, ("--router", "gaussian")),
        (("evaluate", "STORE", "--task", "help_desk=OTHER_LABELS"), 1, (".csv: line 2: label 'x' is not one of",)),
        (("evaluate", "STORE", "--task", "nonesuch=FILE"), 2, ("nonesuch", "help_desk")),
        (("predict", "STORE", "--input", "missing.jsonl"), 2, ("missing.jsonl",)),
        (("predict", "NEW"), 2, ("not a store",)),
        (("predict", "STORE", "--task", "nonesuch"), 2, ("nonesuch",)),
        (("tasks", "NEWER"), 1, ("format 99",)),
        (("bogus",), 2, ("bogus",)),
        (("predct", "STORE"), 2, ("'predct'", "; did you mean predict? (see slm-fast --help)")),
        (("predict", "STORE", "--head", "winer"), 2, ("--head: invalid choice: 'winer'", "; did you mean winner?")),
        (("predict", "STORE", "--frobnicate"), 2, ("--frobnicate (see slm-fast predict --help)",)),
        (("predict", "STORE", "--inpt", "x"), 2, (": --inpt x; did you mean --input? (see slm-fast predict --help)",)),
        (("predict", "STORE", "more"), 2, ("unrecognized arguments: more (see slm-fast predict --help)",)),
        (
            ("learn", "NEW", "--tsk", "a=FILE"),
            2,
            ("unrecognized arguments: --tsk; did you mean --task? (see",),
        ),
        (("--threads", "3", "predict", "STORE"), 2, ("before the verb: --threads; options come after it",)),
        (("learn", "NEW", "--tsk=a"), 2, ("unrecognized arguments: --tsk=a; did you mean --task?",)),
        (("learn", "NEW", "--epoch", "1"), 2, ("arguments are required: --task",)),
        (("predict", "STORE", "--input", "a", "--input=b"), 2, ("argument --input: given twice (see slm-fast",)),
        (("predict", "STORE", "--output", "a", "--output=b"), 2, ("argument --output: given twice (see slm-fast",)),
        (("learn", "NEW", "--task", "a=FILE", "--epochs", "1", "--epochs", "0"), 2, ("epochs: expected",)),
        (("bench", "opz", "--fast"), 2, ("invalid choice: 'opz'", "; did you mean ops?")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_each_mistake_gets_one_line_and_its_status_and_loses_nothing(
    arguments: tuple[str, ...], status: int, parts: tuple[str, ...], store: Path, tmp_path: Path
):
    files = {
        "ONE_CLASS": "text,label\none,a\ntwo,a\n",
        "NO_LABEL": "text,label\none,a\ntwo,\n",
        "OTHER_LABELS": "text,label\none,x\ntwo,y\n",
    }
    names = {
        "STORE": store,
        "NEW": tmp_path / "new",
        "FILE": demo_file("help_desk", "train"),
        "NEWER": tmp_path / "newer",
    }
    for name, content in files.items():
        names[name] = tmp_path / f"{name}.csv"
        names[name].write_text(content)
    names["NEWER"].mkdir()
    (names["NEWER"] / "manifest.json").write_text('{"format": 99, "model": {}, "tasks": {}}')
    before = tree(store)
    words = [argument.partition("=") for argument in arguments]
    given = [str(names.get(a, a)) + eq + str(names.get(b, b)) for a, eq, b in words]
    one_line(slm_fast(*given, stdin='{"text": "Fry."}\n'), status, *parts)
    assert tree(store) == before


def test_the_installed_command_runs_in_a_process_of_its_own_and_survives_a_closed_pipe(store: Path):
    command = f"{sys.executable} -m slm_fast.cli tasks {store} | head -n 1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_doctor_says_which_backends_and_backbones_are_ready():
    done = slm_fast("doctor")
    assert done.returncode == 0
    assert "backend reference" in done.stdout
    assert "weights verified" in done.stdout


def test_doctor_fails_without_the_native_operators_and_says_the_cost_and_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slm_fast.ops.dispatch.NATIVE_MISSING", "slm_fast._C did not load; build it with `pip`")
    done = slm_fast("doctor")
    one_line(done, 1, "did not load; build it with `pip`", "slower")
    assert "backend native" in done.stdout
