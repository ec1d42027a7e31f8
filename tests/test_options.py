"""Options: they show in signatures and to type checkers, and invalid ones raise InputError."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest

from slm_fast import InputError, LearnOptions, ModelConfig, PredictOptions, ScalableLM
from slm_fast.options import LearnKeywords, ModelKeywords, PredictKeywords, combine

KINDS = ((ModelConfig, ModelKeywords), (LearnOptions, LearnKeywords), (PredictOptions, PredictKeywords))


@pytest.mark.parametrize(("kind", "keywords"), KINDS)
def test_the_keywords_are_the_fields_of_their_types(kind: type, keywords: type) -> None:
    assert {field.name: field.type for field in fields(kind)} == {
        name: annotation.__forward_arg__ for name, annotation in keywords.__annotations__.items()
    }


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_options_have_few_fields(kind: type) -> None:
    assert len(fields(kind)) <= (14 if kind is ModelConfig else 13)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("from_backbone", ModelConfig),
        ("learn", LearnOptions),
        ("predict", PredictOptions),
        ("predict_stream", PredictOptions),
        ("predict_file", PredictOptions),
        ("evaluate", PredictOptions),
    ],
)
def test_a_method_shows_the_options_it_takes_with_their_defaults(method: str, kind: type) -> None:
    parameters = inspect.signature(getattr(ScalableLM, method)).parameters
    for field in fields(kind):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field.name].default == field.default
    assert not [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]


def test_keywords_change_the_options_given() -> None:
    given = PredictOptions(seed=3, beams=2)
    assert combine(PredictOptions, given, {"beams": 5}) == PredictOptions(seed=3, beams=5)
    assert combine(PredictOptions, None, {}) == PredictOptions()
    assert given == PredictOptions(seed=3, beams=2)


def test_an_unknown_keyword_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"^ranks: unknown option; options: epochs, batch_size, learning_rate, rank,"):
        combine(LearnOptions, None, {"ranks": 3})


@pytest.mark.parametrize(
    ("method", "given", "own", "meant"),
    [
        ("from_backbone", "tokeniser", ("tokenizer", "dtype", "device"), "tokenizer"),
        ("learn", "patiense", ("valid", "patience", "on_step", "progress"), "patience"),
        ("predict", "tasks", ("text", "task", "progress"), "task"),
        ("predict_stream", "tops", ("text", "task"), "top_p"),
        ("predict_file", "overwriting", ("task", "shard", "strict", "overwrite"), "overwrite"),
        ("evaluate", "with_task_ids", ("with_task_id", "progress"), "with_task_id"),
        ("evaluate", "zzzz", ("with_task_id",), None),
    ],
)
def test_an_unknown_keyword_is_named_with_all_that_the_method_takes_and_the_nearest(method, given, own, meant) -> None:
    slm = object.__new__(ScalableLM)
    arguments = [{}, None][: {"predict_file": 2}.get(method, 1)]
    with pytest.raises(InputError) as caught:
        getattr(slm, method)(*arguments, **{given: 1})
    names, _, meant_here = str(caught.value).partition("options: ")[2].partition("; did you mean ")
    assert str(caught.value).startswith(f"{given}: unknown option; options: ")
    assert {*own} < {*names.split(", ")}
    assert not {"rows", "options", "changes", "task"} & {*names.split(", ")} - {*own}
    assert meant_here == (f"{meant}?" if meant else "")


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        *(
            (LearnOptions, name, value, "expected an integer")
            for name in ("rank", "batch_size")
            for value in ("8", 8.0, True, None)
        ),
        *((PredictOptions, "seed", value, "expected an integer, got") for value in (None, 1.5, "0", float("nan"))),
        (PredictOptions, "seed", 2**70, "expected at most 9,223,372,036,854,775,807"),
        (PredictOptions, "batch_size", "8", "expected an integer or None, got '8'"),
        (PredictOptions, "batch_size", 0, "expected at least 1, got 0"),
        (PredictOptions, "max_new_tokens", 10**9, "expected at most 1,048,576"),
        (PredictOptions, "temperature", 1e-40, "expected a number from 0.0001 to 10000, got 1e-40"),
        (PredictOptions, "temperature", "1", "expected a number"),
        (PredictOptions, "temperature", float("nan"), "expected a number"),
        (PredictOptions, "top_p", 0, "expected more than 0 and at most 1, got 0"),
        (PredictOptions, "top_p", None, "expected more than 0"),
        (PredictOptions, "abstain", "0.9", "expected True, False or a number from 0 to 1, got '0.9'"),
        (PredictOptions, "abstain", 1.5, "expected True, False or a number from 0 to 1, got 1.5"),
        (PredictOptions, "sample", "yes", "expected True or False, got 'yes'"),
        (PredictOptions, "head", ["mixed"], "expected 'mixed' or 'winner'"),
        (LearnOptions, "learning_rate", "1e-3", "expected more than 0 and at most 1, got '1e-3'"),
        (LearnOptions, "weight_decay", 10**400, "expected a number from 0 to 1e+38"),
        (LearnOptions, "learning_rate", 0, "expected more than 0"),
        (LearnOptions, "epochs", 10**9, "expected at most 1,000,000"),
        (LearnOptions, "joint", 1, "expected True or False, got 1"),
        *(
            (LearnOptions, "warm_start", value, "expected True, False or a task's name, got")
            for value in (None, 1, ["sea"])
        ),
        (LearnOptions, "warmup", -0.1, "expected a number from 0 to 1"),
        (ModelConfig, "k", "2", "expected an integer or None"),
        (ModelConfig, "k", 2**31, "expected at most 1,024"),
        (ModelConfig, "taps", 3, "expected a list, got 3"),
        (ModelConfig, "taps", (1, "3"), "expected a layer's number from 0 on, got '3'"),
        (ModelConfig, "targets", "query", "expected a list, got 'query'"),
        (ModelConfig, "targets", (1,), "expected words, got 1"),
        (ModelConfig, "temperature", 0, "expected a number from"),
        (ModelConfig, "router", None, "expected 'gaussian' or 'dtkr', got None"),
    ],
)
def test_an_option_of_another_type_or_beyond_sense_is_named(kind: type, name: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        kind(**{name: value})
    assert str(caught.value).startswith(f"{name}: {said}")


def test_numbers_of_numpy_become_pythons() -> None:
    options = LearnOptions(rank=np.int64(4), learning_rate=np.float32(0.5), joint=np.bool_(True))
    assert [type(value) for value in (options.rank, options.learning_rate, options.joint)] == [int, float, bool]
    assert options == LearnOptions(rank=4, learning_rate=0.5, joint=True)
    assert ModelConfig(taps=[np.int64(1), 3], targets=["query"]) == ModelConfig(taps=(1, 3), targets=("query",))
