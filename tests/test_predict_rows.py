"""Input rows: truncation, streams and invalid rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from models import (
    FAMILIES,
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    two_tasks,
)

from slm_fast import InputError, WorkError
from slm_fast.windows import WINDOW

# Truncation


@pytest.mark.parametrize("name", FAMILIES)
def test_over_long_rows_are_cut_and_say_so(name):
    slm = make_slm(name, max_length=16)
    knows(slm, *two_tasks(slm))
    long, longer = (" ".join(["sea1"] * n) for n in (30, 60))
    answers = slm.predict([long, "sea1", longer], max_new_tokens=3)
    assert [answer.truncated for answer in answers] == [True, False, True]
    assert (answers[0].label, answers[0].text) == (answers[2].label, answers[2].text)


def test_the_instruction_counts_towards_the_length():
    slm = make_slm("llama", max_length=16)
    knows(slm, *two_tasks(slm))
    row = {"instruction": " ".join(["word1"] * 10), "input": "sea1 sea2 sea3 sea4 sea5"}
    assert slm.predict([row], max_new_tokens=2)[0].truncated
    assert not slm.predict([row["input"]], max_new_tokens=2)[0].truncated


# Streams


def test_a_stream_reads_no_more_than_two_windows_ahead():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    read = itertools.count()

    def endless() -> Iterator[str]:
        for i in itertools.cycle(range(20)):
            next(read)
            yield f"sea{i} sea{(i * 3) % 20}"

    stream = slm.predict_stream(endless(), batch_size=256)
    assert next(read) == 0  # nothing is read before the first prediction is requested
    first = [next(stream) for _ in range(5)]
    assert next(read) <= 2 * WINDOW + 1
    expected = slm.predict([f"sea{i} sea{(i * 3) % 20}" for i in range(5)])
    assert [(a.task, a.label) for a in first] == [(a.task, a.label) for a in expected]


def test_a_stream_answers_as_predict_does():
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    assert list(slm.predict_stream(iter(mixed()), max_new_tokens=3)) == slm.predict(mixed(), max_new_tokens=3)


def test_an_unknown_option_of_a_stream_is_refused_when_it_is_made():
    slm = make_slm("bert")
    with pytest.raises(InputError, match="beam: unknown option"):
        slm.predict_stream(["sea1"], beam=3)


# Named columns


def test_the_input_column_may_be_named():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    expected = slm.predict(mixed())
    rows = [{"body": text, "other": "x"} for text in mixed()]
    assert slm.predict(rows, text="Body") == expected
    assert list(slm.predict_stream(iter(rows), text="body")) == expected
    assert slm.predict_proba(rows, text="body").tolist() == slm.predict_proba(mixed()).tolist()


def test_a_named_column_that_the_first_row_lacks_is_a_wrong_call_and_one_that_another_lacks_a_bad_row():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    for answer in (slm.predict, slm.predict_proba, lambda rows, text: list(slm.predict_stream(rows, text=text))):
        with pytest.raises(InputError, match="row 1: no column 'nope'; columns: 'body'"):
            answer([{"body": "sea1"}], text="nope")
        with pytest.raises(WorkError, match="row 2: no column 'body'; columns: 'text'"):
            answer([{"body": "sea1"}, {"text": "sea2"}], text="body")


def test_an_unknown_option_is_reported_before_a_bad_row():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    for answer in (slm.predict, slm.predict_proba, slm.predict_stream):
        with pytest.raises(InputError, match="label: unknown option"):
            answer([{"body": "sea1"}], label="queue")


# Invalid rows and options


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "sea1"}, r"no 'text' \(nor 'instruction' and 'input'\); fields: 'words'"),
        ({}, "fields: none"),
        ("", "empty text"),
        ("   ", "empty text"),
        ({"instruction": "", "input": " "}, "empty input"),
        ({"text": 3}, "'text': expected a string, got 3"),
        (7, "expected a text or an object with 'text'"),
        (None, "expected a text or an object with 'text'"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, message):
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(WorkError, match=message) as caught:
        slm.predict(["sea1", row])
    assert "\n" not in str(caught.value)


def test_a_bad_row_among_many_says_which_it_is():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(WorkError, match="row 3"):
        slm.predict(["sea1", "sea2", {"words": "sea3"}, "sea4"])


def test_a_stream_gives_the_answers_before_a_bad_row():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    stream = slm.predict_stream(["sea1 sea2", "sea3 sea4", {"words": "sea5"}, "sea6"])
    assert [next(stream).task, next(stream).task] == [answer.task for answer in slm.predict(["sea1 sea2", "sea3 sea4"])]
    with pytest.raises(WorkError, match="row 3"):
        next(stream)


def test_a_single_text_is_not_taken_for_a_list_of_letters():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    for single in ("sea1", {"text": "sea1"}):
        with pytest.raises(InputError, match="rows: expected an iterable of rows, got "):
            slm.predict(single)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"head": "both"}, "head: expected 'mixed' or 'winner', got 'both'"),
        ({"abstain": 1.5}, r"abstain: expected True, False or a number from 0 to 1, got 1\.5"),
        ({"temperature": 0.0, "sample": True}, "temperature: expected .* got 0"),
        ({"temperature": -1.0, "sample": True}, "temperature: expected .* got -1"),
        ({"top_p": 1.5, "sample": True}, r"top_p: expected .* got 1\.5"),
        ({"tokens": 3}, "tokens: unknown option; options: batch_size, batch_tokens, max_new_tokens"),
    ],
)
def test_an_option_that_cannot_be_right_is_named(options, message):
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    with pytest.raises(InputError, match=message) as caught:
        slm.predict(["sea1"], **options)
    assert "\n" not in str(caught.value)


def test_a_failed_batch_leaves_the_model_ready_for_the_next():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    expected = slm.predict(mixed())
    layer = slm.model.backbone.layers[2]

    def fail(*_):
        raise MemoryError("no room")

    hook = layer.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        slm.predict(mixed())
    hook.remove()
    assert slm.predict(mixed()) == expected


def test_predicting_leaves_no_trace_in_the_model_or_the_global_generator():
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    before = {name: tensor.clone() for name, tensor in slm.model.backbone.model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    slm.predict(mixed(), max_new_tokens=3)
    assert torch.equal(torch.rand(3), expected)
    after = slm.model.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
