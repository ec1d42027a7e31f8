"""Prediction options that have no effect are told of, in Python as on the command line."""

from __future__ import annotations

import io
import warnings

import pytest
from models import knows, make_slm, random_task

from slm_fast import ScalableLM
from slm_fast.errors import SlmWarning

EMPTY = "bare: an encoder-only backbone has no answer of its own; every row's is empty"
NO_TEXT = "has no effect: an encoder-only backbone writes no text"
NO_LABELS = "has no effect: a backbone that writes its answers weighs no labels"
NO_TASK = "has no effect: with bare=True no task answers"


@pytest.fixture(scope="module", params=["bert", "llama"])
def slm(request: pytest.FixtureRequest) -> ScalableLM:
    made = make_slm(request.param, features=32)
    return knows(made, random_task(made, "sea", labels=("no", "yes")))


ENCODER = (
    ({}, []),
    ({"top_k": 2, "head": "winner", "abstain": True}, []),
    ({"sample": True, "temperature": 0.7}, [f"sample {NO_TEXT}", f"temperature {NO_TEXT}"]),
    ({"bare": True, "abstain": 0.9}, [EMPTY, f"abstain {NO_TASK}"]),
    ({"bare": True, "task": "sea"}, [EMPTY, f"task {NO_TASK}"]),
)
WRITER = (
    ({"max_new_tokens": 1}, []),
    ({"sample": True, "temperature": 0.7, "seed": 3}, []),
    ({"temperature": 0.7}, ["temperature has no effect: it goes with sample=True"]),
    ({"top_k": 5, "head": "winner"}, [f"head {NO_LABELS}", f"top_k {NO_LABELS}"]),
    ({"bare": True, "distance": True, "task": "sea"}, [f"distance {NO_TASK}", f"task {NO_TASK}"]),
)


def test_options_without_effect_are_told_of_once_where_the_call_is(slm: ScalableLM) -> None:
    for options, said in ENCODER if slm.model.backbone.kind == "encoder" else WRITER:
        more = {"max_new_tokens": 1} if slm.model.backbone.kind == "causal" else {}
        for call in (
            lambda **given: slm.predict(["sea1"], **given),
            lambda **given: list(slm.predict_stream(["sea1"], **given)),
            lambda **given: slm.predict_file(io.BytesIO(b'{"text": "sea1"}'), io.StringIO(), **given),
        ):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                call(**{**more, **options})
            told = [one for one in found if issubclass(one.category, SlmWarning)]
            assert [str(one.message) for one in told] == said
            assert {one.filename for one in told} <= {__file__}


def test_an_evaluation_of_the_bare_backbone_says_that_it_measures_no_task(slm: ScalableLM) -> None:
    with pytest.warns(SlmWarning) as found:
        slm.evaluate({"sea": [("sea1", "yes")]}, bare=True, with_task_id=True, max_new_tokens=1, progress=False)
    told = {str(one.message) for one in found}
    assert f"with_task_id {NO_TASK}" in told
    assert (EMPTY in told) == (slm.model.backbone.kind == "encoder")
