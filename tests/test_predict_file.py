"""`predict_file`: inputs, outputs, resuming, refusals, `finish_reason` and NaN scores."""

from __future__ import annotations

import io
import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from models import (
    FAMILIES,
    GENERATORS,
    farm_and_sea,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    mixed_texts,
    one_thread,  # noqa: F401
    random_task,
    two_tasks,
)

from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.resume import run_file
from slm_fast.windows import WINDOW

TEXTS = ["sea1 sea2", "farm3, farm4", "the question"]


@pytest.fixture
def slm() -> ScalableLM:
    slm = make_slm("bert")
    farm_and_sea(slm)
    return slm


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# Inputs


def test_every_format_that_is_learned_from_is_answered_too(slm: ScalableLM, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "x"} for text in TEXTS]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f'"{text}",x\n' for text in TEXTS))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = []
    for suffix in ("csv", "jsonl", "parquet"):
        done = slm.predict_file(tmp_path / f"t.{suffix}", tmp_path / f"{suffix}.out")
        assert (done.answered, done.failed) == (3, 0)
        found.append([{**answer, "id": None} for answer in answers(tmp_path / f"{suffix}.out")])
    assert found[0] == found[1] == found[2]
    assert [answer["task"] for answer in found[0]] == [answer.task for answer in slm.predict(TEXTS)]


@pytest.mark.parametrize("name", ["fifo", "/dev/fd"])
def test_a_pipe_is_a_source(slm: ScalableLM, tmp_path: Path, name: str) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    sink = io.StringIO()
    if name == "fifo":
        source = tmp_path / "rows"
        os.mkfifo(source)
        writer = threading.Thread(target=source.write_bytes, args=(data,))
        writer.start()
        slm.predict_file(source, sink)
        writer.join()
    else:
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        slm.predict_file(f"/dev/fd/{reading}", sink)
        os.close(reading)
    found = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [answer["task"] for answer in found] == [answer.task for answer in slm.predict(TEXTS)]


class Waits(io.StringIO):
    """A text sink that releases a semaphore whenever it is flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = threading.Semaphore(0)

    def flush(self) -> None:
        self.flushed.release()


def test_a_program_that_waits_for_each_answer_gets_it(slm: ScalableLM) -> None:
    reading, writing = os.pipe()
    sink, found = Waits(), []
    with os.fdopen(reading, "rb") as source:
        work = threading.Thread(target=lambda: found.append(slm.predict_file(source, sink)))
        work.start()
        for i, text in enumerate(TEXTS, 1):
            os.write(writing, json.dumps({"text": text}).encode() + b"\n")
            assert sink.flushed.acquire(timeout=60)
            assert len(sink.getvalue().splitlines()) == i
        os.close(writing)
        work.join(60)
    assert found[0].answered == 3


def test_a_fast_pipe_is_answered_in_the_windows_of_a_file(slm: ScalableLM, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in mixed_texts(WINDOW + 50))
    (tmp_path / "in.jsonl").write_text(lines)
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / "file.jsonl")
    with os.popen(f"cat {tmp_path / 'in.jsonl'}") as source:
        slm.predict_file(source.buffer, tmp_path / "pipe.jsonl")
    assert (tmp_path / "pipe.jsonl").read_bytes() == (tmp_path / "file.jsonl").read_bytes()


# Resuming


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_files_of_other_formats_and_of_long_texts_are_taken_up_again(suffix: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("slm_fast.windows.WINDOW_TEXT", 700)
    monkeypatch.setattr("slm_fast.windows.WINDOW", 40)
    slm = make_slm("bert")
    farm_and_sea(slm)
    slm.save_pretrained(tmp_path / "store")
    texts = [text + "\n" * (i % 3) + "." for i, text in enumerate(mixed_texts(150))]
    source, whole, part = tmp_path / f"in.{suffix}", tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    if suffix == "csv":
        source.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source)
    else:
        source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    slm.predict_file(source, whole)
    data = whole.read_bytes()
    for size in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1, len(data)):
        part.write_bytes(data[:size])
        run_file(part).write_bytes(run_file(whole).read_bytes())
        done = slm.predict_file(source, part)
        assert part.read_bytes() == data
        assert done.before + done.answered == 150
        assert done.before == data[:size].count(b"\n")


def test_an_interrupted_run_is_not_taken_up_with_another_way_of_reading(slm: ScalableLM, tmp_path: Path) -> None:
    slm.save_pretrained(tmp_path / "store")
    (tmp_path / "in.csv").write_text("text\nsea1\n")
    slm.predict_file(tmp_path / "in.csv", tmp_path / "out")
    slm.predict_file(tmp_path / "in.csv", tmp_path / "out")
    with pytest.raises(InputError, match="was begun without delimiter, not with delimiter ','"):
        slm.predict_file(tmp_path / "in.csv", tmp_path / "out", delimiter=",")


def test_a_run_that_wrote_nothing_is_taken_up_by_the_same_call_only(slm: ScalableLM, tmp_path: Path) -> None:
    slm.save_pretrained(tmp_path / "store")
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"sea1"\n')
    for _ in range(2):
        assert slm.predict_file(source, sink, shard=(1, 2)).answered == 0
    with pytest.raises(InputError, match=r"out.jsonl: was begun with shard '1/2', not '2/2'; --overwrite"):
        slm.predict_file(source, sink, shard=(2, 2))
    with pytest.raises(InputError, match=r"out.jsonl: already exists; --overwrite"):
        slm.predict_file(io.BytesIO(b'"sea1"\n'), sink)
    assert sink.read_bytes() == b""
    assert slm.predict_file(source, sink, shard=(2, 2), overwrite=True).answered == 1
    sink.write_bytes(b"")
    source.write_bytes(b"PK\x03\x04")
    with pytest.raises(WorkError, match="is a zip archive"):
        slm.predict_file(source, sink, overwrite=True)
    source.write_text('"sea1"\n')
    assert slm.predict_file(source, sink).answered == 1  # a call that failed before its first row is in nobody's way
    sink.unlink()  # what is left of a run whose output was removed is in nobody's way
    assert slm.predict_file(source, sink).answered == 1


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.json"])
def test_a_named_column_that_no_row_has_is_a_wrong_call_and_nothing_is_written(
    slm: ScalableLM, tmp_path: Path, name: str
) -> None:
    source, sink = tmp_path / name, tmp_path / "out"
    rows = [{"q": "sea1", "n": i} for i in range(1500)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    source.write_text({".csv": "q,n\nsea1,2\nfarm1,3\n", ".jsonl": lines, ".json": json.dumps(rows)}[source.suffix])
    for how, said in (({"text": "nope"}, "no column 'nope'; columns: 'q', 'n'"), ({"delimiter": ","}, "no 'text'")):
        with pytest.raises(InputError, match=rf"{name}: (line|row) [12]: {said}"):
            slm.predict_file(source, sink, **how)
    assert list(tmp_path.iterdir()) == [source]
    assert slm.predict_file(source, sink, text="q").failed == 0


def test_rows_that_lack_a_named_column_where_others_have_it_are_bad_rows(slm: ScalableLM, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('no json\n{"text": "sea1"}\n{"q": "sea1"}\n')
    done = slm.predict_file(source, tmp_path / "out", text="q")
    assert (done.answered, done.failed) == (3, 2)
    assert done.first_error is not None
    assert done.first_error.startswith(f"{source}: id 1: not JSON")
    assert slm.predict_file(source, io.StringIO(), text="q") == done
    assert slm.predict_file(io.BytesIO(b'"sea1"\n'), io.StringIO(), text="q").failed == 1


@pytest.mark.parametrize("shard", ["1/2", 5, 0, (), (1, 2, 3), (0, 2), (3, 2), (1.0, 2), (True, 2), ("1", "2"), {1: 2}])
def test_a_shard_that_is_none_is_a_wrong_call(slm: ScalableLM, tmp_path: Path, shard: object) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    with pytest.raises(InputError) as caught:
        slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", shard=shard)
    assert str(caught.value) == f"shard: expected (i, n), integers with i from 1 to n, got {shard!r}"
    assert not (tmp_path / "out.jsonl").exists()
    for one in ((1, 1), [1, 1], (np.int64(1), np.int64(1))):
        assert slm.predict_file(tmp_path / "in.jsonl", io.StringIO(), shard=one).answered == 1


# Outputs


@pytest.mark.parametrize(
    "name", ["o.csv", "o.CSV", "o.csv.gz", "o.tsv", "o.parquet.gz", "o.json", "o.xlsx", "o.jsonl.zst"]
)
def test_a_name_that_promises_another_format_is_refused(slm: ScalableLM, tmp_path: Path, name: str) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    with pytest.raises(InputError, match=r"answers are written as JSON Lines, not as \.\w+; name it \.jsonl"):
        slm.predict_file(tmp_path / "in.jsonl", tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["o.jsonl", "o.ndjson", "o.txt", "o", "v1.2", "o.out"])
def test_any_other_name_gets_json_lines(slm: ScalableLM, tmp_path: Path, name: str) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / name)
    assert answers(tmp_path / name)[0]["id"] == 1


def test_folders_and_streams_of_the_other_kind_are_refused_in_one_line(slm: ScalableLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    for source, sink, said in (
        (tmp_path, tmp_path / "o", "is a folder"),
        (tmp_path / "in.jsonl", tmp_path, "is a folder"),
        (tmp_path / "in.jsonl", tmp_path / "no" / "o", "no such folder"),
        (tmp_path / "in.jsonl", tmp_path / "in.jsonl" / "o", "in.jsonl is a file, expected a folder"),
        (tmp_path / "no", tmp_path / "o", "no such file"),
        (tmp_path / "in.jsonl", tmp_path / "o\0", "not a path"),
        (io.StringIO('"sea1"'), tmp_path / "o", "source: expected a binary stream"),
        (tmp_path / "in.jsonl", io.BytesIO(), "sink: expected a text stream"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            slm.predict_file(source, sink)
        assert "\n" not in str(caught.value)


def test_a_pipe_and_a_device_are_sinks(slm: ScalableLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    os.mkfifo(tmp_path / "out")
    reader = threading.Thread(target=lambda: found.append((tmp_path / "out").read_bytes()))
    found: list[bytes] = []
    reader.start()
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out")
    reader.join(60)
    assert json.loads(found[0])["id"] == 1
    assert slm.predict_file(tmp_path / "in.jsonl", "/dev/null").answered == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_names_the_file(slm: ScalableLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    with pytest.raises(WorkError, match=r"^/dev/full: cannot be written: No space left on device"):
        slm.predict_file(tmp_path / "in.jsonl", "/dev/full")
    sink = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(WorkError, match=r"^the output: cannot be written: No space left on device"):
        slm.predict_file(tmp_path / "in.jsonl", sink)
    with suppress(OSError):
        sink.close()


# Texts cut at max_new_tokens


@pytest.mark.parametrize("options", [{}, {"sample": True, "temperature": 0.3}])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_text_that_ended_is_the_same_with_more_room_and_one_that_was_cut_goes_on(name: str, options: dict) -> None:
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    texts, reasons = mixed_texts(20), set()
    longer = slm.predict(texts, max_new_tokens=40, **options)
    for most in (1, 3, 20):
        for answer, other in zip(slm.predict(texts, max_new_tokens=most, **options), longer, strict=True):
            same = (answer.text, answer.score) == (other.text, pytest.approx(other.score, abs=1e-6))
            assert answer.finish_reason == ("stop" if same else "length")
            reasons.add(answer.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("name", GENERATORS)
def test_texts_of_a_beam_search_say_it_too(name: str) -> None:
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    reasons = []
    for most in (1, 40):
        reasons += [answer.finish_reason for answer in slm.predict(mixed_texts(20), max_new_tokens=most, beams=2)]
    assert set(reasons) == {"stop", "length"}
    assert reasons[:20].count("length") >= reasons[20:].count("length")


def test_only_cut_texts_are_marked_in_the_output(tmp_path: Path) -> None:
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    texts = mixed_texts(20)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=6)
    expected = slm.predict(texts, max_new_tokens=6)
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    for found, answer in zip(answers(tmp_path / "out.jsonl"), expected, strict=True):
        marks = {"finish_reason": "length", "max_new_tokens": 6} if answer.finish_reason == "length" else {}
        assert {name: found[name] for name in ("finish_reason", "max_new_tokens") if name in found} == marks


def test_a_label_of_a_head_has_no_finish_reason(slm: ScalableLM) -> None:
    assert slm.predict(["sea1"])[0].finish_reason is None


# NaN scores


@pytest.mark.parametrize("options", [{}, {"sample": True}, {"beams": 2}, {"beams": 2, "sample": True}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_score_that_is_not_a_number_is_an_error_of_its_row(name: str, options: dict) -> None:
    slm = ScalableLM.from_backbone(make_model(name), tokenizer=make_tokenizer(name))
    knows(slm, *two_tasks(slm))
    model = slm.model.backbone.model
    # NaN in a layer above the taps: queries remain finite, but scores become NaN.
    last = {"bert": "encoder.layer.2.output.dense", "t5": "decoder.block.1.layer.2.DenseReluDense.wo"}
    module = model.get_submodule(last.get(name, "model.layers.2.mlp.down_proj"))
    getattr(module, "base", module).weight.fill_(torch.nan)
    sink = io.StringIO()
    done = slm.predict_file(io.BytesIO(b'"sea1"\n"farm1"\n'), sink, max_new_tokens=2, **options)
    assert (done.answered, done.failed) == (2, 2)
    found = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [answer.get("error") for answer in found] == ["its score is not a number"] * 2
    with pytest.raises(WorkError, match="row 1: its score is not a number"):
        slm.predict(["sea1"], max_new_tokens=2, **options)


# One snapshot of the tasks


def test_a_file_is_answered_by_the_tasks_there_were_when_the_call_began(slm: ScalableLM) -> None:
    texts = mixed_texts(2 * WINDOW + 10)
    data = "".join(json.dumps(text) + "\n" for text in texts)
    expected, sink = io.StringIO(), io.StringIO()
    slm.predict_file(io.BytesIO(data.encode()), expected)

    class Changes(io.StringIO):
        """A sink at whose first flush another thread removes one task and adds another."""

        def flush(self) -> None:
            if "sea" in slm.tasks and not sink.getvalue():
                sink.write(self.getvalue())
                other = threading.Thread(target=change)
                other.start()
                other.join()

    def change() -> None:
        slm.forget("sea")
        slm.add(random_task(slm, "city", scale=3.0))
        assert slm.tasks == ["city", "farm"]

    changing = Changes()
    slm.predict_file(io.BytesIO(data.encode()), changing)
    assert changing.getvalue() == expected.getvalue()
    assert slm.tasks == ["city", "farm"]
    assert {answer.task for answer in slm.predict(texts[:50])} <= {"city", "farm"}


def test_scores_are_written_as_json_has_numbers(slm: ScalableLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"sea1"\n')
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert math.isfinite(answers(tmp_path / "out.jsonl")[0]["score"])
