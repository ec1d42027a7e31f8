"""Which rows share a batch, how many may wait, and which part of an unfinished text is final and can be streamed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_fast.data import Row
from slm_fast.errors import InputError
from slm_fast.model import Reading
from slm_fast.server.jobs import Ask, Job, Piece, Refused
from slm_fast.server.options import ServeOptions
from slm_fast.server.queue import PADDING, Room, Waiting
from slm_fast.server.text import TextStream, cut_at


def pieces_of(lengths: list[int]) -> list[Piece]:
    job = Job(Ask([Row("a")] * len(lengths)), SimpleNamespace(), lambda: None)
    return [Piece(job, i, i, length, Reading([0] * length, False, None)) for i, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1200), st.integers(0, 2**31))
def test_batches_hold_every_row_once_within_the_budget_the_oldest_first(
    lengths: list[int], budget: int, seed: int
) -> None:
    waiting, rng = Waiting(budget), random.Random(seed)
    pieces = pieces_of(lengths)
    for piece in pieces:
        waiting.add(piece.number % 2, piece)
    cancelled = [piece for piece in pieces if rng.random() < 0.2]
    assert all(waiting.remove(piece.number % 2, piece) for piece in cancelled)
    assert not any(waiting.remove(piece.number % 2, piece) for piece in cancelled)
    left = [piece.number for piece in pieces if piece not in cancelled]
    assert waiting.rows == len(left)
    while left:
        group, batch = waiting.take()
        numbers = [piece.number for piece in batch]
        assert left[0] in numbers
        assert {number % 2 for number in numbers} == {group}
        longest, tokens = max(piece.length for piece in batch), sum(piece.length for piece in batch)
        assert longest * len(batch) <= budget or len(batch) == 1
        assert longest * len(batch) - tokens <= max(PADDING, longest * len(batch) // 4)
        left = [number for number in left if number not in numbers]
        assert waiting.rows == len(left)
    assert waiting.take() == (None, [])


def test_a_few_short_rows_that_wait_go_together_at_once_and_not_with_a_long_one() -> None:
    waiting = Waiting(2048)
    for piece in pieces_of([8, 9, 200, 10, 12]):
        waiting.add("a", piece)
    assert [piece.length for piece in waiting.take()[1]] == [8, 9, 10, 12]
    assert [piece.length for piece in waiting.take()[1]] == [200]


def test_room_is_taken_for_all_rows_of_a_request_or_for_none() -> None:
    room = Room(4, 100, 10.0)
    room.reserve(3, 60)
    for rows, tokens in ((2, 1), (1, 41)):
        with pytest.raises(Refused) as refused:
            room.reserve(rows, tokens)
        assert (refused.value.status, refused.value.retry_after) == (429, 1)
        assert (room.rows, room.tokens) == (3, 60)
    with pytest.raises(Refused) as refused:
        room.reserve(5, 1)
    assert refused.value.status == 413


def test_who_would_wait_beyond_the_deadline_is_refused_and_told_when_to_come_again() -> None:
    room = Room(1000, 1_000_000, 10.0)
    assert room.wait == 0
    room.note(500, 1.0)
    room.reserve(10, 4000)
    assert room.wait == pytest.approx(8.0)
    room.reserve(10, 1500)
    with pytest.raises(Refused) as refused:
        room.reserve(1, 1)
    assert (refused.value.status, refused.value.retry_after) == (429, 6)
    for _ in range(50):
        room.note(2000, 1.0)  # throughput has risen
    room.reserve(1, 1)


def test_options_that_cannot_be_are_named() -> None:
    for name, value in (("inputs", 0), ("inputs", 1.5), ("queue_rows", True), ("deadline", -1), ("body", "2")):
        with pytest.raises(InputError, match=name):
            ServeOptions(**{name: value})
    assert ServeOptions(drain=0).queue_tokens is None


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [("one two", ["two"], "one"), ("one", ["two"], None), ("a. b\nc", ["\n", "."], "a"), ("two", ["two"], "")],
)
def test_a_text_is_cut_before_its_first_stop_text(text: str, stops: list[str], found: str | None) -> None:
    assert cut_at(text, stops) == found


def test_what_follows_a_text_that_has_changed_is_sent_all_the_same() -> None:
    stream = TextStream(lambda tokens: " ".join(map(str, tokens)))
    assert stream.so_far([1, 2]) == "1 2"
    assert stream.end("1, 3 and 4") == ", 3 and 4"


@example("a bb", ["bb"])
@given(st.text("ab \n🐟é", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=2))
def test_parts_of_a_text_are_the_text_and_hold_no_part_of_a_stop_text(text: str, stops: list[str]) -> None:
    data = list(text.encode())

    def decode(tokens) -> str:
        return bytes(tokens).decode(errors="replace").strip()

    stream, parts, whole = TextStream(decode, stops), [], decode(data)
    for end in range(1, len(data) + 1):
        cut = cut_at(decode(data[:end]), stops)
        if cut is not None:
            whole = cut
            break
        parts.append(stream.so_far(data[:end]))
    parts.append(stream.end(whole))
    assert "".join(parts) == whole
