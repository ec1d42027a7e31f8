"""Fuzz test of `predict_file`: each random input line gets an answer or an error. 300 lines in `make test`,
5,000 in `make fuzz`."""

from __future__ import annotations

import functools
import io
import json

import pytest
from effort import EARNEST, times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import farm_and_sea, make_slm

from slm_fast import ScalableLM

LINES, TOGETHER = times(300, 5000), 25

text = st.text(st.characters(codec=None), max_size=40)  # including lone surrogates
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["text", "input", "instruction", "id", "label", "output", "task"])
row = st.dictionaries(names, value | st.sampled_from(["sea1 sea2", "farm3 good0"]), max_size=4)
written = (row | value).map(lambda found: json.dumps(found).encode())
damaged = st.tuples(written, st.integers(0, 40), st.binary(max_size=3)).map(
    lambda found: found[0][: found[1]] + found[2] + found[0][found[1] :]
)
odd = st.sampled_from(
    [b"", b" ", b"[" * 5000, b'{"id": 1e999, "text": "a"}', b'{"text": "a", "text": "b"}', b"\xef\xbb\xbf"]
)
line = (written | damaged | st.binary(max_size=30) | odd).map(lambda found: found.replace(b"\n", b""))


@functools.cache
def model() -> ScalableLM:
    slm = make_slm("bert")
    farm_and_sea(slm)
    return slm


def strict(line: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


@settings(
    max_examples=-(-LINES // TOGETHER),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not EARNEST,
)
@given(lines=st.lists(line, min_size=TOGETHER, max_size=TOGETHER))
def test_every_line_that_is_not_blank_is_answered_or_has_its_error(lines: list[bytes]) -> None:
    first = b'{"id": "first", "text": "sea1 sea2"}'
    sink = io.StringIO()
    done = model().predict_file(io.BytesIO(b"\n".join([first, *lines])), sink, format="jsonl")
    found = [strict(line) for line in sink.getvalue().split("\n")[:-1]]
    assert len(found) == done.answered == 1 + sum(bool(line.strip()) for line in lines)
    assert done.failed == sum("error" in answer for answer in found)
    assert all(("error" in answer) != ("task" in answer) for answer in found)
    assert found[0]["id"] == "first"
    for answer in found:
        if "task" in answer:
            assert answer["score"] == pytest.approx(0.5, abs=0.5)
