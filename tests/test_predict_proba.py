"""`predict_proba`: the conventions of scikit-learn, and torch dtypes given as strings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import (
    farm_and_sea,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    two_tasks,
)
from sklearn.metrics import log_loss

from slm_fast import InputError, ScalableLM

pytestmark = pytest.mark.usefixtures("few_features")


@pytest.fixture(scope="module")
def slm() -> ScalableLM:
    slm = make_slm("bert", features=32)
    return knows(slm, *two_tasks(slm))  # farm: no, yes; sea: maybe, no, yes


def test_columns_are_all_tasks_labels_and_hold_what_predict_gives(slm):
    texts = mixed()
    found = slm.predict_proba(texts)
    assert slm.classes_ == ["maybe", "no", "yes"]
    assert (found.shape, found.dtype) == ((len(texts), 3), np.float32)
    assert found.sum(1) == pytest.approx(np.ones(len(texts)), abs=1e-6)
    for row, answer in zip(found, slm.predict(texts, top_k=None), strict=True):
        assert slm.classes_[row.argmax()] == answer.label
        known = answer.probabilities or {}
        assert row == pytest.approx([known.get(label, 0) for label in slm.classes_], abs=1e-7)
    targets = [slm.classes_[i % 3] for i in range(len(texts))]
    least = np.finfo(np.float32).eps  # scikit-learn clips probabilities to [eps, 1 - eps]
    said = -np.log(
        [row[slm.classes_.index(target)] for row, target in zip(found.clip(least, 1 - least), targets, strict=True)]
    ).mean()
    assert log_loss(targets, found, labels=slm.classes_) == pytest.approx(said, rel=1e-4)


@pytest.mark.parametrize("task", ["farm", "sea"])
def test_a_given_task_has_its_own_labels_for_columns(slm, task):
    texts = mixed()
    found, labels = slm.predict_proba(texts, task=task), slm.learned[task].labels
    assert found.shape == (len(texts), len(labels))
    assert found.sum(1) == pytest.approx(np.ones(len(texts)), abs=1e-6)
    assert [labels[i] for i in found.argmax(1)] == [answer.label for answer in slm.predict(texts, task=task)]


def test_tasks_given_for_each_row_leave_all_labels_for_columns(slm):
    names = ["farm", "sea"] * 4
    found = slm.predict_proba(mixed()[:8], task=names)
    for row, name, answer in zip(found, names, slm.predict(mixed()[:8], task=names, top_k=None), strict=True):
        assert {label for label, p in zip(slm.classes_, row, strict=True) if p} <= set(slm.learned[name].labels)
        assert row == pytest.approx([answer.probabilities.get(label, 0) for label in slm.classes_], abs=1e-7)


def test_a_task_forgotten_meanwhile_is_still_a_column():
    slm = make_slm("bert", features=32)
    knows(slm, *two_tasks(slm))
    expected = slm.predict_proba(["sea1 sea2"])

    def rows():
        slm.forget("sea")
        yield "sea1 sea2"

    assert np.array_equal(slm.predict_proba(rows()), expected)
    assert slm.predict_proba(["sea1 sea2"]).shape == (1, 2)


def test_no_rows_abstention_and_options(slm):
    assert slm.predict_proba([]).shape == (0, 3)
    answers = slm.predict(["word7 " * 12, *mixed()], abstain=0.5)
    found = slm.predict_proba(["word7 " * 12, *mixed()], abstain=0.5, top_k=1)
    assert [bool(row.any()) for row in found] == [answer.task is not None for answer in answers]
    assert not found[0].any()
    with pytest.raises(InputError, match="heads: unknown option"):
        slm.predict_proba(mixed(), heads="winner")
    with pytest.raises(InputError, match="task 'sky': not learned; tasks: farm, sea"):
        slm.predict_proba(mixed(), task="sky")


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_backbone_that_writes_has_no_probabilities_of_labels(name):
    slm = make_slm(name, features=32)
    knows(slm, random_task(slm, "sea"))
    assert slm.classes_ == []
    with pytest.raises(InputError, match="predict_proba: this backbone writes its answers and weighs no labels"):
        slm.predict_proba(["sea1"])


def test_without_tasks_there_are_no_classes():
    slm = make_slm("bert", features=32)
    assert slm.classes_ == []
    with pytest.raises(InputError, match=r"no task is learned yet: .*; learn a task first"):
        slm.predict_proba(["sea1"])


def test_a_dtype_may_be_torchs_own(tmp_path):
    make_model("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save_pretrained(tmp_path / "bert")
    words, own = (
        ScalableLM.from_backbone(str(tmp_path / "bert"), dtype=dtype, features=32)
        for dtype in ("bfloat16", torch.bfloat16)
    )
    assert own.model.backbone.dtype == torch.bfloat16
    for slm in (words, own):
        farm_and_sea(slm)
    assert np.array_equal(words.predict_proba(mixed()), own.predict_proba(mixed()))
    own.save_pretrained(tmp_path / "store")
    assert ScalableLM.from_pretrained(tmp_path / "store", dtype=torch.float16).model.backbone.dtype == torch.float16
    model = make_model("bert")
    assert (
        ScalableLM.from_backbone(model, tokenizer=make_tokenizer("bert"), dtype=torch.float32, features=32).tasks == []
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "torch.bfloat16", "float99", 16, None])
def test_another_dtype_is_a_wrong_call(dtype):
    with pytest.raises(InputError, match=r"^dtype: expected one of auto, float32, bfloat16, float16, got "):
        ScalableLM.from_backbone("minilm", dtype=dtype)
