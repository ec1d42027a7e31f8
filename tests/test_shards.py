"""`slm-fast predict --shard i/n`: the concatenated outputs of all shards are the whole file's, byte for byte."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from command import one_line, slm_fast
from models import beside_its_backbone, make_model, make_tokenizer, one_thread, random_task, sentence  # noqa: F401

from slm_fast import windows

WINDOW = 40  # rows; small, so that a file of five windows takes little time


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", WINDOW)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    return beside_its_backbone(
        folder, lambda slm: [random_task(slm, topic, labels=(topic, "no", "yes")) for topic in ("farm", "sea")]
    )


def lines(rows: int) -> list[str]:
    """Rows of various lengths, with and without IDs, and some blank and some invalid lines."""
    rng, found = random.Random(0), []
    for i in range(rows):
        text = sentence(rng.choice(("sea", "farm")), rng, words=rng.randint(1, 20))
        found.append("not json" if i % 50 == 7 else json.dumps({"id": f"r{i}", "text": text} if i % 3 else text))
        found += [""] * (i % 60 == 5)
    return found


def source_of(folder: Path, rows: int) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines(rows)))
    return path


def predict(store: Path, source: Path, output: Path, *more: object):
    return slm_fast("predict", store, "--input", source, "--output", output, "--threads", 1, *more)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("rows", "parts"), [(4 * WINDOW + 7, 3), (WINDOW, 1), (2 * WINDOW, 2), (3, 2), (0, 2)])
def test_the_parts_joined_are_the_whole(store: Path, tmp_path: Path, rows: int, parts: int, suffix: str) -> None:
    source = source_of(tmp_path, rows)
    predict(store, source, tmp_path / f"whole{suffix}")
    sizes = []
    for part in range(1, parts + 1):
        output = tmp_path / f"{part}{suffix}"
        predict(store, source, output, "--shard", f"{part}/{parts}")
        data = output.read_bytes()
        sizes.append(len((gzip.decompress(data) if suffix.endswith("gz") else data).splitlines()))
    joined = b"".join((tmp_path / f"{part}{suffix}").read_bytes() for part in range(1, parts + 1))
    assert joined == (tmp_path / f"whole{suffix}").read_bytes()
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= WINDOW + 7  # rows are distributed evenly


def test_long_texts_end_windows_of_parts_as_they_do_of_the_whole(store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_TEXT", 900)
    source = source_of(tmp_path, 100)
    predict(store, source, tmp_path / "whole.jsonl")
    for part in (1, 2, 3, 4):
        predict(store, source, tmp_path / f"{part}.jsonl", "--shard", f"{part}/4")
    parts = [(tmp_path / f"{part}.jsonl").read_bytes() for part in (1, 2, 3, 4)]
    assert b"".join(parts) == (tmp_path / "whole.jsonl").read_bytes()
    assert all(parts)


def test_a_part_that_was_cut_off_is_taken_up_where_it_stopped(store: Path, tmp_path: Path) -> None:
    source, output, rng = source_of(tmp_path, 4 * WINDOW + 7), tmp_path / "out.jsonl", random.Random(1)
    predict(store, source, output, "--shard", "2/2")
    whole = output.read_bytes()
    for size in (0, 1, len(whole), *(rng.randrange(len(whole)) for _ in range(4))):
        output.write_bytes(whole[:size])
        one_line(predict(store, source, output, "--shard", "2/2"), 1, "rows failed")
        assert output.read_bytes() == whole
    one_line(predict(store, source, output, "--shard", "1/2"), 2, "out.jsonl: was begun with shard '2/2', not '1/2'")
    one_line(predict(store, source, output), 2, "out.jsonl: was begun with shard '2/2', not without")


def test_where_a_file_breaks_off_the_last_part_says_so(store: Path, tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"{line}\n" for line in lines(4 * WINDOW)).encode(), mtime=0)
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(whole[: 2 * len(whole) // 3])
    said = predict(store, source, tmp_path / "whole.jsonl").stderr
    assert "in.jsonl.gz: cannot be read: breaks off after line" in said
    first, last = (predict(store, source, tmp_path / f"{i}.jsonl", "--shard", f"{i}/2") for i in (1, 2))
    assert first.returncode == 1  # because of invalid rows, not of the truncated input
    assert "breaks off" not in first.stderr
    assert "1 row failed" in first.stderr
    assert last.stderr == said
    joined = (tmp_path / "1.jsonl").read_bytes() + (tmp_path / "2.jsonl").read_bytes()
    assert joined == (tmp_path / "whole.jsonl").read_bytes()
    assert joined


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/2", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(store: Path, tmp_path: Path, shard: str) -> None:
    done = predict(store, source_of(tmp_path, 1), tmp_path / "out.jsonl", f"--shard={shard}")
    assert done.returncode == 2
    assert f"argument --shard: expected I/N such as 1/4, I from 1 to N, got '{shard}'" in done.stderr


def test_a_part_of_a_pipe_is_refused(store: Path, tmp_path: Path) -> None:
    one_line(slm_fast("predict", store, "--shard", "1/2", stdin='"sea1"\n'), 2, "shard: needs a file to read")
