"""Accuracy, routing accuracy and forgetting, compared with direct counts."""

from __future__ import annotations

import pytest
from models import (
    knows,
    make_slm,
    one_thread,  # noqa: F401
    random_task,
    toy_task,
)

from slm_fast import InputError, ScalableLM, Task, WorkError
from slm_fast.evaluate import Evaluation
from slm_fast.measures import forgetting


def two_tasks(name: str, **config) -> ScalableLM:
    slm = make_slm(name, **config)
    return knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])


def fresh(topic: str, rows: int = 20) -> Task:
    return toy_task(topic, rows=rows, seed=6)


@pytest.mark.parametrize("options", [{}, {"head": "winner"}, {"abstain": 0.3}, {"batch_size": 3}])
def test_accuracy_and_routing_are_shares_of_rows(options):
    slm = two_tasks("bert")
    tasks = {"sea": fresh("sea", 20), "farm": fresh("farm", 14)}
    found = slm.evaluate(tasks, **options)
    accuracies = []
    for name, task in tasks.items():
        answers = slm.predict([row.text for row in task.rows], **options)
        right = sum(answer.label == row.target for answer, row in zip(answers, task.rows, strict=True))
        accuracies.append(right / len(task.rows))
        assert found.accuracy[name] == accuracies[-1]
        assert found.routing[name] == sum(answer.task == name for answer in answers) / len(task.rows)
        assert found.routing[name] > 0
    assert found.average == pytest.approx(sum(accuracies) / 2)  # mean over tasks, not rows


def test_with_task_ids_every_row_is_routed_right():
    slm = two_tasks("bert")
    tasks = {"sea": fresh("sea"), "farm": fresh("farm")}
    found = slm.evaluate(tasks, with_task_id=True)
    assert found.routing == {"sea": 1.0, "farm": 1.0}
    for name, task in tasks.items():
        answers = slm.predict([row.text for row in task.rows], task=name)
        right = sum(answer.label == row.target for answer, row in zip(answers, task.rows, strict=True))
        assert found.accuracy[name] == right / len(task.rows)


def test_a_subset_of_the_tasks_may_be_evaluated():
    found = two_tasks("bert").evaluate({"sea": fresh("sea")})
    assert list(found.accuracy) == ["sea"]
    assert found.average == found.accuracy["sea"]


def test_rows_files_and_tasks_are_all_accepted(tmp_path):
    slm = two_tasks("bert")
    task = fresh("sea")
    file = tmp_path / "sea.csv"
    file.write_text("text,label\n" + "".join(f"{row.text},{row.target}\n" for row in task.rows))
    expected = slm.evaluate({"sea": task})
    assert slm.evaluate({"sea": file}) == expected
    assert slm.evaluate({"sea": str(file)}) == expected
    assert slm.evaluate({"sea": [(row.text, row.target) for row in task.rows]}) == expected
    assert slm.evaluate({"sea": [{"text": row.text, "label": row.target} for row in task.rows]}) == expected


def test_a_generated_text_is_right_when_it_equals_the_target():
    slm = make_slm("t5")
    knows(slm, *[random_task(slm, topic, labels=None) for topic in ("farm", "sea")])
    inputs = [row.text for row in fresh("sea", 8).rows]
    texts = [answer.text for answer in slm.predict(inputs, max_new_tokens=3)]
    rows = [
        {"instruction": "", "input": text, "output": answer if i < 6 else "something else"}
        for i, (text, answer) in enumerate(zip(inputs, texts, strict=True))
    ]
    assert slm.evaluate({"sea": rows}, max_new_tokens=3).accuracy == {"sea": 0.75}


def test_test_rows_may_all_have_one_label(tmp_path):
    slm = two_tasks("bert")
    rows = [(row.text, "yes") for row in fresh("sea").rows]
    answers = slm.predict([text for text, _ in rows])
    expected = sum(answer.label == "yes" for answer in answers) / len(rows)
    assert slm.evaluate({"sea": rows}).accuracy == {"sea": expected}


def test_an_unknown_label_is_named_with_its_row_and_the_labels_known():
    slm = two_tasks("bert")
    with pytest.raises(WorkError, match="sea: row 2: label 'maybe' is not one of no, yes"):
        slm.evaluate({"sea": [("sea1", "yes"), ("sea2", "maybe"), ("sea3", "no")]})


def test_an_unknown_label_in_a_file_is_named_with_the_file(tmp_path):
    file = tmp_path / "test.csv"
    file.write_text("text,label\nsea1,yes\n\nsea2,maybe\n")
    with pytest.raises(WorkError, match=r"test\.csv: line 4: label 'maybe' is not one of no, yes$"):
        two_tasks("bert").evaluate({"sea": file})


@pytest.mark.parametrize(
    ("label", "said"), [("0", r"; labels= \(--labels\) names the labels that numbers stand for$"), ("x0", "$")]
)
def test_a_number_among_label_words_is_told_how_it_gets_a_name(tmp_path, label, said):
    file = tmp_path / "test.csv"
    file.write_text(f"text,label\nsea1,{label}\n")
    with pytest.raises(WorkError, match=f"line 2: label '{label}' is not one of no, yes{said}"):
        Task.from_file("sea", file, known=["no", "yes"], training=False)


def test_of_many_or_long_labels_only_the_first_are_listed_and_other_spellings_are_known(tmp_path):
    file = tmp_path / "test.csv"
    file.write_text("text,label\na,1\nb,True\nc,x\n")
    known = ["1.0", "true", "w" * 100, *(f"z{i}" for i in range(50))]
    with pytest.raises(WorkError) as caught:
        Task.from_file("sea", file, known=known, training=False)
    listed = f"1.0, true, {'w' * 40}..., z0, z1 and 48 more"
    assert str(caught.value) == f"{file}: line 4: label 'x' is not one of {listed}"


def test_a_row_without_its_answer_is_named():
    with pytest.raises(WorkError, match="sea: row 2: no 'label'"):
        two_tasks("bert").evaluate({"sea": [("sea1", "yes"), {"text": "sea2"}]})


def test_a_task_that_is_not_learned_is_named():
    with pytest.raises(InputError, match="task 'city': not learned; tasks: farm, sea"):
        two_tasks("bert").evaluate({"sea": fresh("sea"), "city": fresh("city")})


def test_a_task_whose_rows_are_none_is_named():
    with pytest.raises(InputError, match=r"^task 'sea': rows: expected an iterable of rows, got 5$"):
        two_tasks("bert").evaluate({"farm": fresh("farm"), "sea": 5})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.csv: no such file"):
        two_tasks("bert").evaluate({"sea": tmp_path / "missing.csv"})


def test_no_tasks_at_all_is_a_wrong_call():
    with pytest.raises(InputError, match="no tasks given"):
        two_tasks("bert").evaluate({})


def test_the_average_is_over_tasks():
    assert Evaluation({"a": 1.0, "b": 0.5, "c": 0.0}, {}).average == 0.5


# Forgetting


def test_forgetting_is_the_mean_drop_from_each_earlier_tasks_best():
    history = [
        {"a": 0.90},
        {"a": 0.80, "b": 0.70},
        {"a": 0.85, "b": 0.40, "c": 0.60},
        {"a": 0.70, "b": 0.50, "c": 0.75, "d": 0.10},
    ]
    assert forgetting(history) == pytest.approx(
        [
            0.0,
            0.90 - 0.80,
            ((0.90 - 0.85) + (0.70 - 0.40)) / 2,
            ((0.90 - 0.70) + (0.70 - 0.50) + (0.60 - 0.75)) / 3,  # c improved, which counts as negative forgetting
        ]
    )


def test_the_best_before_is_taken_even_when_it_was_not_the_last():
    history = [{"a": 0.2}, {"a": 0.9, "b": 1.0}, {"a": 0.5, "b": 1.0, "c": 1.0}]
    assert forgetting(history) == pytest.approx([0.0, -0.7, ((0.9 - 0.5) + 0.0) / 2])


def test_one_task_forgets_nothing():
    assert forgetting([{"a": 0.3}]) == [0.0]
