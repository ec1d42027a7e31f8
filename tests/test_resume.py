"""Resuming an interrupted `slm-fast predict`: a repeated call gives the bytes of an uninterrupted run."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from command import one_line, slm_fast
from effort import times
from forks import forked, run_command
from models import beside_its_backbone, make_model, make_tokenizer, one_thread, random_task, sentence  # noqa: F401

from slm_fast.resume import run_file
from slm_fast.windows import WINDOW

ROWS = 2 * WINDOW + 200


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    return beside_its_backbone(
        folder, lambda slm: [random_task(slm, topic, labels=(topic, "no", "yes")) for topic in ("farm", "sea")]
    )


@pytest.fixture(scope="module")
def source(store: Path) -> Path:
    """Rows of various lengths, with some blank and some invalid lines."""
    rng = random.Random(0)
    lines = []
    for i in range(ROWS):
        row: Any = {"id": f"row-{i}", "text": sentence(rng.choice(("sea", "farm")), rng, words=rng.randint(1, 20))}
        lines.append("not json" if i % 500 == 70 else json.dumps(row if i % 3 else {"text": row["text"]}))
        lines += [""] * (i % 700 == 5)
    path = store.parent / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(store: Path, source: Path) -> bytes:
    output = store.parent / "whole.jsonl"
    done = predict(store, source, output)
    one_line(done, 1, "5 rows failed")
    assert len(output.read_bytes().splitlines()) == ROWS
    return output.read_bytes()


def arguments(store: Path, source: Path, output: Path, *more: object) -> list[str]:
    return [str(a) for a in ("predict", store, "--input", source, "--output", output, "--threads", 1, *more)]


def predict(store: Path, source: Path, output: Path, *more: object):
    return slm_fast(*arguments(store, source, output, *more))


def test_killed_at_random_points_and_resumed_it_ends_as_if_nothing_had_been(store, source, whole, tmp_path):
    rng, sizes = random.Random(1), set()
    for point in range(times(8, 40)):
        output = tmp_path / f"{point}.jsonl"
        process = forked(run_command, arguments(store, source, output))
        enough = (0, 1, len(whole) // 3, len(whole) // 2)[point // 2 % 4]
        while process.is_alive() and not (run_file(output).exists() and output.stat().st_size >= enough):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2) if point % 2 else 0)  # not only just after a window was written
        process.kill()
        process.join()
        sizes.add(output.stat().st_size)
        again = forked(run_command, arguments(store, source, output))
        again.join()
        assert again.exitcode == 1
        assert output.read_bytes() == whole
    assert len(sizes - {0, len(whole)}) >= 2


def test_cut_off_anywhere_it_goes_on_behind_the_last_whole_row(store, source, whole, tmp_path):
    rng, output = random.Random(2), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.run").write_bytes(run_file(store.parent / "whole.jsonl").read_bytes())
    for size in (0, 1, len(whole) - 1, len(whole), *(rng.randrange(len(whole)) for _ in range(6))):
        output.write_bytes(whole[:size])
        one_line(predict(store, source, output), 1, "5 rows failed")
        assert output.read_bytes() == whole


def test_a_compressed_output_is_resumed_too(store, source, whole, tmp_path):
    output, rng = tmp_path / "out.jsonl.gz", random.Random(3)
    assert predict(store, source, output).returncode == 1
    data = output.read_bytes()
    assert gzip.decompress(data) == whole
    for size in (5, len(data) - 3, len(data), *(rng.randrange(len(data)) for _ in range(3))):
        output.write_bytes(data[:size])
        assert predict(store, source, output).returncode == 1
        assert output.read_bytes() == data


def test_a_finished_run_is_left_as_it_is(store, source, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    predict(store, source, output)
    before = output.stat().st_mtime_ns
    one_line(predict(store, source, output), 1, "5 rows failed", f"; first: {source}: id 72: not JSON")
    assert (output.stat().st_mtime_ns, output.read_bytes()) == (before, whole)


def test_another_call_is_refused_and_says_what_differs_and_overwrite_starts_afresh(store, source, whole, tmp_path):
    output, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    other.write_text('{"text": "sea1 sea2"}\n')
    predict(store, source, output)
    one_line(predict(store, other, output), 2, "out.jsonl", "another input", "--overwrite")
    one_line(predict(store, source, output, "--head", "winner"), 2, "head 'mixed', not 'winner'")
    one_line(predict(store, source, output, "--batch-tokens", 99), 2, "batch_tokens 2048, not 99")
    one_line(predict(store, source, output, "--task", "sea"), 2, "was begun without task, not with task 'sea'")
    one_line(predict(store, source, output, "--top-k", "all"), 2, "was begun with top_k 1, not 'all'")
    assert slm_fast("merge", tmp_path / "fewer", store).returncode == 0
    assert slm_fast("forget", tmp_path / "fewer", "sea").returncode == 0
    one_line(predict(tmp_path / "fewer", source, output), 2, "another store")
    assert output.read_bytes() == whole
    assert predict(store, other, output, "--overwrite").returncode == 0
    assert len(output.read_bytes().splitlines()) == 1
    one_line(predict(store, source, output), 2, "another input")


def test_an_output_that_is_no_runs_is_not_touched(store, source, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text('{"precious": 1}\n')
    one_line(predict(store, source, output), 2, "out.jsonl", "--overwrite")
    assert output.read_text() == '{"precious": 1}\n'


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_another_file_where_the_run_is_described_is_not_touched(store, source, tmp_path, more):
    output = tmp_path / "out.jsonl"
    run_file(output).write_bytes(source.read_bytes())
    one_line(predict(store, source, output, *more), 2, "out.jsonl.run: is in the way")
    one_line(slm_fast("predict", store, "--output", output, *more, stdin='"sea1"\n'), 2, "out.jsonl.run")
    assert run_file(output).read_bytes() == source.read_bytes()
    assert not output.exists()


def test_two_at_once_do_not_write_one_output(store, source, tmp_path):
    from slm_fast.resume import Output

    output = tmp_path / "out.jsonl"
    with Output(output, {"input": "x"}, overwrite=False):
        one_line(predict(store, source, output), 1, "out.jsonl", "another process")
    assert output.read_bytes() == b""


def test_strict_stops_at_the_same_row_when_it_is_run_again(store, source, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        one_line(predict(store, source, output, "--strict"), 1, "not JSON")
        assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:71])


def test_standard_input_cannot_be_resumed_and_says_so(store, tmp_path):
    output = tmp_path / "out.jsonl"
    run = ("predict", store, "--output", output)
    assert slm_fast(*run, stdin='{"text": "sea1"}\n').returncode == 0
    assert not run_file(output).exists()
    one_line(slm_fast(*run, stdin='{"text": "sea1"}\n'), 2, "--overwrite")
