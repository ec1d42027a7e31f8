"""Options are visible: in signatures, in help, to type checkers; and one that does not fit is a wrong call."""

from __future__ import annotations

import inspect
from dataclasses import fields

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
def test_no_options_have_more_than_twelve_fields(kind: type) -> None:
    assert len(fields(kind)) <= 12


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
