"""Windows of rows: limited by rows and text, kept when reading fails, and returned early when a live input pauses."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import pytest

from slm_fast.data import Row
from slm_fast.errors import WorkError
from slm_fast.windows import WINDOW, WINDOW_TEXT, Feed, Window, is_live, windows_of


def sizes(rows: list) -> list[int]:
    windows = list(windows_of(rows, None))
    assert [row for window in windows for row in window.rows] == rows
    firsts = [window.first for window in windows]
    assert firsts == [sum(len(w.rows) for w in windows[:i]) for i in range(len(windows))]
    return [len(window.rows) for window in windows]


@pytest.mark.parametrize("count", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_short_rows_are_counted(count: int) -> None:
    full, rest = divmod(count, WINDOW)
    assert sizes([Row(str(i)) for i in range(count)]) == [WINDOW] * full + [rest] * (rest > 0)


def test_a_window_ends_with_the_row_that_reaches_its_text() -> None:
    long = Row("x" * (WINDOW_TEXT // 4))
    assert sizes([long] * 9) == [4, 4, 1]
    assert sizes([Row("a"), Row("", None, "y" * WINDOW_TEXT), Row("b")]) == [2, 1]
    assert sizes([WorkError("z" * 99)] * 5) == [5]


def test_each_row_keeps_its_own_task_id() -> None:
    rows = [Row("x" * (WINDOW_TEXT // 2)) for _ in range(5)]
    windows = list(windows_of(rows, ["a", "b", "c", "d", "e"]))
    assert [list(window.task) for window in windows] == [["a", "b"], ["c", "d"], ["e"]]
    assert {window.task for window in windows_of(rows, "one")} == {"one"}


def test_rows_before_a_failure_are_given() -> None:
    def rows() -> Iterator[Row]:
        yield from [Row("a"), Row("b")]
        raise WorkError("breaks off")

    windows = windows_of(rows(), None)
    assert next(windows) == Window(0, [Row("a"), Row("b")])
    with pytest.raises(WorkError, match="breaks off"):
        next(windows)


# Live inputs


def lines(stream: IO[bytes]) -> Iterator[Row]:
    for line in stream:
        if line.startswith(b"!"):
            raise WorkError("breaks off")
        yield Row(line.decode().strip())


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", 0) as sink:
        yield source, sink


def texts(window: Window | None) -> list[str]:
    assert window is not None
    return [row.text for row in window.rows if isinstance(row, Row)]


def within(seconds: float, what: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


def test_what_was_read_is_given_when_the_input_pauses_and_none_where_nothing_is_left(pipe) -> None:
    source, sink = pipe
    with Feed(source, lines) as feed:
        windows = feed.windows("sea")
        for i in range(3):
            sink.write(f"row {i}\n".encode())
            window = next(windows)
            if window is None:  # the input had paused before this line was read
                window = next(windows)
            assert (texts(window), window.first, window.task) == ([f"row {i}"], i, "sea")
            assert next(windows) is None
        sink.write(b"last")
        sink.close()
        assert texts(next(windows)) == ["last"]
        assert list(windows) == []


def test_a_busy_reader_gets_full_windows(pipe) -> None:
    source, sink = pipe
    rows = [str(i) for i in range(2 * WINDOW + 7)]
    writer = threading.Thread(target=lambda: (sink.write("\n".join(rows).encode()), sink.close()))
    with Feed(source, lines) as feed:
        writer.start()
        windows = [window for window in feed.windows(None) if window is not None]
    writer.join()
    assert [text for window in windows for text in texts(window)] == rows
    assert len(windows[0].rows) == WINDOW


def test_lines_that_the_stream_itself_had_read_already_are_not_waited_for(pipe) -> None:
    source, sink = pipe
    sink.write(b"header\nfirst\nsecond\n")
    assert source.readline() == b"header\n"
    with Feed(source, lines) as feed:
        assert texts(next(window for window in feed.windows(None) if window)) == ["first", "second"]


def test_a_failure_comes_after_the_rows_before_it(pipe) -> None:
    source, sink = pipe
    sink.write(b"a\n!\nb\n")
    with Feed(source, lines) as feed:
        windows = (window for window in feed.windows(None) if window is not None)
        assert texts(next(windows)) == ["a"]
        with pytest.raises(WorkError, match="breaks off"):
            next(windows)


def test_closed_it_reads_no_more_and_its_thread_ends(pipe) -> None:
    source, sink = pipe
    before = threading.active_count()
    open_files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    with Feed(source, lines) as feed:
        sink.write(b"a\n")
        assert texts(next(window for window in feed.windows(None) if window)) == ["a"]
    assert within(5, lambda: threading.active_count() == before)
    assert open_files is None or len(os.listdir("/proc/self/fd")) == open_files
    sink.write(b"b\n")
    assert source.readline() == b"b\n"


def test_a_reader_that_is_ahead_waits_with_one_window(pipe) -> None:
    source, sink = pipe
    read: list[Row] = []

    def counted(stream: IO[bytes]) -> Iterator[Row]:
        for row in lines(stream):
            read.append(row)
            yield row

    with Feed(source, counted) as feed:
        sink.write(b"x\n" * 3 * WINDOW)
        assert within(5, lambda: len(read) > WINDOW)
        time.sleep(0.1)
        assert len(read) == WINDOW + 1
        assert len(next(feed.windows(None)).rows) == WINDOW


def test_only_what_may_be_waited_for_is_live(pipe, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (tmp_path / "file").open("rb") as file:
        assert not is_live(file)
    assert not is_live(io.BytesIO())
    assert is_live(pipe[0])
