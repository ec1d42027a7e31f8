"""`ScalableLM`: adding tasks, atomic changes, threads, probabilities and files."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import (
    FAMILIES,
    easy,
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    two_tasks,
)

from slm_fast import InputError, PredictOptions, ScalableLM, Task, WorkError
from slm_fast.store import Store


@pytest.fixture
def slm() -> ScalableLM:
    made = make_slm("bert")
    return knows(made, *two_tasks(made))


# Tasks


def test_tasks_taken_in_answer_as_where_they_were_learned(slm: ScalableLM, tmp_path: Path) -> None:
    other = make_slm("bert")
    other.save_pretrained(tmp_path / "store")
    other.add(list(slm.learned.values()))
    assert other.predict(mixed()) == slm.predict(mixed())
    assert sorted(Store.open(tmp_path / "store").files) == ["farm", "sea"]


def test_a_task_of_a_taken_name_or_of_another_shape_is_not_taken_in(slm: ScalableLM) -> None:
    before = slm.predict(mixed())
    with pytest.raises(InputError, match="'sea'"):
        slm.add(slm.learned["sea"])
    misfit = random_task(make_slm("bert", taps=(0,)), "sky")
    with pytest.raises(WorkError, match="sky"):
        slm.add(misfit)
    assert slm.tasks == ["farm", "sea"]
    assert slm.predict(mixed()) == before


def full(*_: object, **__: object) -> None:
    raise WorkError("the disk is full")


def test_forgetting_that_cannot_be_committed_changes_nothing(slm: ScalableLM, tmp_path: Path, monkeypatch) -> None:
    slm.save_pretrained(tmp_path / "store")
    before = slm.predict(mixed())
    monkeypatch.setattr(Store, "commit", full)
    with pytest.raises(WorkError, match="the disk is full"):
        slm.forget("sea")
    assert slm.tasks == slm.model.pool.names == slm.model.router.names == ["farm", "sea"]
    assert slm.predict(mixed()) == before


def test_a_learned_task_whose_commit_fails_is_kept_and_can_be_committed(slm: ScalableLM, tmp_path: Path) -> None:
    slm.save_pretrained(tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit", full)
        with pytest.raises(WorkError, match="the disk is full; sky: kept in memory, and `save_pretrained` commits it"):
            slm.learn(easy("sky", rows=8), epochs=1)
    assert slm.tasks == slm.model.pool.names == slm.model.router.names == ["farm", "sea", "sky"]
    assert sorted(Store.open(tmp_path / "store").files) == ["farm", "sea"]
    slm.learn(easy("city", rows=8), epochs=1)
    assert sorted(Store.open(tmp_path / "store").files) == ["city", "farm", "sea"]
    answers = slm.predict(mixed())
    slm.save_pretrained(tmp_path / "store")
    assert reopened(tmp_path / "store").predict(mixed()) == answers


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_a_model_that_learned_and_forgot_answers_bit_for_bit_as_one_opened_from_its_store(
    router: str, tmp_path: Path
) -> None:
    slm = make_slm("bert", router=router)
    slm.save_pretrained(tmp_path / "store")
    for name, rank in (("sea", 2), ("city", 5), ("farm", 3)):
        slm.learn(easy(name, rows=16), epochs=1, rank=rank)
    slm.forget("city")
    slm.learn(easy("sky", rows=16), epochs=1, rank=2)
    fresh = make_slm("bert", router=router)
    fresh.add(Store.open(tmp_path / "store").load())
    reopened = make_slm("bert", router=router)
    knows(reopened, *Store.open(tmp_path / "store").load())
    expected = reopened.predict(mixed())
    assert slm.predict(mixed()) == expected
    assert fresh.predict(mixed()) == expected


# Threads


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_from_several_threads_are_answered_as_one_after_the_other(name: str) -> None:
    slm = make_slm(name)
    knows(slm, *(random_task(slm, topic) for topic in ("farm", "sea")))
    texts = mixed(3)
    expected = slm.predict(texts, max_new_tokens=4)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: slm.predict(texts, max_new_tokens=4), range(12)))
    assert all(answers == expected for answers in found)


def test_tasks_change_between_calls_of_other_threads_and_never_within_one(slm: ScalableLM) -> None:
    sky = random_task(slm, "sky", labels=("maybe", "yes"))
    with_two = slm.predict(mixed())
    slm.add(sky)
    with_three = slm.predict(mixed())
    slm.forget("sky")

    def come_and_go(_: int) -> None:
        slm.add(sky)
        slm.forget("sky")

    with ThreadPoolExecutor(3) as threads:
        changes = threads.submit(lambda: [come_and_go(i) for i in range(10)])
        found = list(threads.map(lambda _: slm.predict(mixed()), range(12)))
        changes.result()
    assert all(answers in (with_two, with_three) for answers in found)


# Probabilities


def test_probabilities_are_the_distribution_whose_best_label_is_the_answer(slm: ScalableLM) -> None:
    whole = slm.predict(mixed(), top_k=None)
    for answer, best, two in zip(whole, slm.predict(mixed()), slm.predict(mixed(), top_k=2), strict=True):
        probabilities = answer.probabilities
        assert probabilities is not None
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-5)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert next(iter(probabilities.items())) == (answer.label, answer.score)
        assert best.probabilities == {answer.label: answer.score}
        assert two.probabilities == dict(list(probabilities.items())[:2])
        assert replace(two, probabilities=None) == replace(answer, probabilities=None)


def test_of_equally_probable_labels_the_first_in_the_alphabet_is_the_answer() -> None:
    slm = make_slm("bert")
    task = random_task(slm, "sea", labels=("a", "b", "c"))
    assert task.head is not None
    knows(slm, replace(task, head=(torch.zeros_like(task.head[0]), torch.zeros_like(task.head[1]))))
    for top_k in (1, 2, None):
        (answer,) = slm.predict(["sea1 sea2"], top_k=top_k)
        assert answer.probabilities is not None
        assert list(answer.probabilities) == ["a", "b", "c"][: top_k or 3]


def test_a_text_has_no_distribution() -> None:
    slm = make_slm("llama")
    knows(slm, random_task(slm, "sea"))
    assert slm.predict(["sea1"], max_new_tokens=2, top_k=None)[0].probabilities is None


# Files


def lines_of(texts: list[str]) -> str:
    return "".join(json.dumps({"id": f"row {i}", "text": text}) + "\n" for i, text in enumerate(texts))


def test_a_file_is_answered_as_its_rows_are(slm: ScalableLM, tmp_path: Path) -> None:
    texts = mixed()
    (tmp_path / "in.jsonl").write_text(lines_of(texts))
    done = slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", PredictOptions(top_k=2))
    assert (done.before, done.answered, done.failed) == (0, len(texts), 0)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for i, (record, answer) in enumerate(zip(found, slm.predict(texts, top_k=2), strict=True)):
        assert record["id"] == f"row {i}"
        assert (record["task"], record["label"]) == (answer.task, answer.label)
        assert record["score"] == pytest.approx(answer.score, abs=1e-6)
        assert list(record["probabilities"]) == list(answer.probabilities or {})


def test_streams_are_answered_too_and_bad_rows_counted(slm: ScalableLM) -> None:
    sink = io.StringIO()
    source = io.BytesIO(lines_of(mixed(2)).encode() + b"no json\n")
    done = slm.predict_file(source, sink)
    assert (done.answered, done.failed) == (5, 1)
    assert [("error" in json.loads(line)) for line in sink.getvalue().splitlines()] == [False] * 4 + [True]
    with pytest.raises(WorkError, match=r"^-: id 1: not JSON"):
        slm.predict_file(io.BytesIO(b"no json\n"), io.StringIO(), strict=True)


def test_a_file_that_is_not_there_is_a_wrong_call(slm: ScalableLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        slm.predict_file(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_without_a_store_does_not_go_on_with_anybodys_output(slm: ScalableLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines_of(mixed()))
    slm.save_pretrained(tmp_path / "store")
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    other = make_slm("bert")
    knows(other, *two_tasks(other))
    with pytest.raises(InputError, match=r"out\.jsonl: already exists; --overwrite replaces it"):
        other.predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_what_is_no_task_rows_path_or_option_is_a_wrong_call_that_says_what_is_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slm = make_slm("bert")
    knows(slm, random_task(slm, "farm"))
    task = Task("z", [("a", "b"), ("c", "d")])
    for call, said in (
        (lambda: slm.learn([("a", "b")]), "task: expected a Task, got a list; Task"),
        (lambda: slm.learn(task, valid=[("a", "b")]), "valid: expected a Task, got a list"),
        (lambda: slm.learn(task, {"epochs": 1}), "options: expected LearnOptions, got a dict"),
        (lambda: slm.knows("farm"), "task: expected a Task, got a str; Task"),
        (lambda: slm.knows(task, {"epochs": 1}), "options: expected LearnOptions, got a dict"),
        (lambda: slm.add("st"), "learned: expected values of another model's `learned`, got a str"),
        (lambda: slm.add(5), "learned: expected values of another model's `learned`, got a int"),
        (lambda: slm.add([slm.learned]), "learned: expected values of another model's `learned`, got a mappingproxy"),
        (lambda: slm.forget(["farm"]), "name: expected a task's name, got ['farm']"),
        (lambda: slm.share("out", tasks=5), "tasks: expected a name, or several, got 5"),
        (lambda: slm.share("out", tasks=[["farm"]]), "tasks: expected a name, or several, got [['farm']]"),
        (lambda: slm.share("out", tasks=[1, "a"]), "task 1: not learned; tasks: farm"),
        (lambda: slm.evaluate([("farm", [])]), "tasks: expected {name: a file or rows}, got a list"),
        (lambda: slm.predict(["a"], task=3), "task: expected a name, or one for each row, got 3"),
        (lambda: slm.predict([], task="nope"), "task 'nope': not learned"),
        (lambda: slm.predict_file(["a"], "o.jsonl"), "source: expected a path or a stream, got a list"),
        (lambda: slm.predict_file(io.BytesIO(), 4), "sink: expected a path or a stream, got a int"),
        (lambda: Task.from_file("t", 3), "source: expected a path or a binary stream, got a int"),
        (lambda: Task.from_file("t", io.StringIO("text,label\n")), "source: expected a path or a binary stream"),
        (lambda: slm.save_pretrained(""), "store: expected the path of a folder, got ''"),
        (lambda: ScalableLM.from_pretrained(None), "store: expected the path of a folder, got None"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(said)
    assert slm.tasks == ["farm"]
    assert list(tmp_path.iterdir()) == []


PAIRS = [("sea1", "yes"), ("sea2", "no")]


@pytest.mark.parametrize(
    ("flag", "call"),
    [
        ("overwrite", lambda slm, folder, no: slm.predict_file(folder / "in.csv", folder / "out.jsonl", overwrite=no)),
        ("strict", lambda slm, folder, no: slm.predict_file(folder / "in.csv", folder / "out.jsonl", strict=no)),
        ("with_task_id", lambda slm, folder, no: slm.evaluate({"sea": PAIRS}, with_task_id=no)),
        ("free_text", lambda slm, folder, no: Task("x", PAIRS, free_text=no)),
        ("free_text", lambda slm, folder, no: Task.from_rows("x", PAIRS, free_text=no)),
        ("training", lambda slm, folder, no: Task("x", PAIRS, training=no)),
        ("training", lambda slm, folder, no: Task.from_rows("x", PAIRS, training=no)),
        ("training", lambda slm, folder, no: Task.from_file("x", folder / "in.csv", training=no)),
    ],
)
def test_a_flag_is_true_or_false_and_nothing_is_done_before_that_is_sure(slm, tmp_path: Path, flag: str, call) -> None:
    (tmp_path / "in.csv").write_text("text,label\nsea1,yes\nsea2,no\n")
    (tmp_path / "out.jsonl").write_text("precious\n")
    for no in ("no", 0, [], *([] if flag == "free_text" else [None])):
        with pytest.raises(InputError) as caught:
            call(slm, tmp_path, no)
        assert str(caught.value) == f"{flag}: expected True or False, got {no!r}"
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
