"""Tests of the command line in a shell: closed or full streams, encodings, interrupts, out of memory, long lists."""

from __future__ import annotations

import errno
import io
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from command import one_line, slm_fast
from forks import forked, run_without
from models import beside_its_backbone, make_model, make_tokenizer, one_thread, random_task  # noqa: F401

from slm_fast import cli
from slm_fast.cli.arguments import with_share
from slm_fast.errors import InputError, WorkError

CLI = [sys.executable, "-m", "slm_fast.cli"]
LINE = '{"id": "é", "text": "sea1 sea2"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shell")
    many = tuple(f"label {i}" for i in range(5000))
    beside_its_backbone(
        folder,
        lambda slm: [
            random_task(slm, "sea", labels=("Rückgabe", "配送")),
            random_task(slm, "farm" + "m" * 60, labels=many),
        ],
    )
    (folder / "in.jsonl").write_text(LINE, "utf-8")
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    return folder / "store"


# Standard streams


def test_a_program_that_waits_for_its_answer_gets_it_and_an_interrupt_ends_the_wait_in_one_line(
    interruptible, store: Path
):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*CLI, "predict", str(store)], **pipes) as process:
        for i in range(2):
            process.stdin.write(LINE.encode())
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 120)[0], i
            assert json.loads(os.read(process.stdout.fileno(), 1 << 16))["id"] == "é"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"slm-fast: error: interrupted\n"
        assert process.wait(60) == 130


def test_interrupts_after_the_first_add_nothing_to_its_line(interruptible, store: Path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*CLI, "predict", str(store)], **pipes) as process:
        process.stdin.write(LINE.encode())
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 120)[0]
        process.send_signal(signal.SIGINT)
        said = process.stderr.readline()
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        assert said + process.stderr.read() == b"slm-fast: error: interrupted\n"
        assert process.wait(60) in (130, -signal.SIGINT)


def test_closed_streams_are_no_traceback(store: Path):
    command = f"{' '.join(CLI)} predict {store} <&- >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_no_traceback(folder: Path, tmp_path: Path, closed: str):
    source = [] if closed == "stdin" else ["--input", str(folder / "in.jsonl")]
    process = forked(run_without, closed, tmp_path, ["predict", str(folder / "store"), *source])
    process.join(120)
    assert process.exitcode == 0
    lost = "slm-fast: warning: standard output is closed: the output is lost\n"
    assert (tmp_path / "stderr").read_text() == (lost if closed == "stdout" else "")
    assert ((tmp_path / "stdout").read_text() == "") == (closed != "stderr")


def test_without_standard_streams_each_verb_still_says_what_it_can(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["predict", str(store)]) == 0
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["tasks", str(store), "--json"]) == 0
    assert capsys.readouterr().err == "slm-fast: warning: standard output is closed: the output is lost\n"


def test_standard_output_that_is_full_is_one_line(store: Path, tmp_path: Path, monkeypatch, capsys):
    class Full(io.FileIO):
        """A file on a full disk: writes fail with ENOSPC until its file descriptor is redirected to a device."""

        def write(self, data: Any) -> int | None:
            if stat.S_ISREG(os.fstat(self.fileno()).st_mode):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    for arguments in (["tasks", str(store)], ["predict", str(store), "--input", str(store.parent / "in.jsonl")]):
        with io.TextIOWrapper(io.BufferedWriter(Full(tmp_path / "out", "w")), encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert cli.main(arguments) == 1
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert said.startswith("slm-fast: error: ")
            assert "output: cannot be written: No space left on device" in said


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-16"])
def test_output_is_utf8_whatever_the_locale(store: Path, monkeypatch: pytest.MonkeyPatch, encoding: str):
    for arguments in (
        ["predict", str(store), "--input", str(store.parent / "in.jsonl"), "--task", "sea"],
        ["tasks", str(store)],
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert cli.main(arguments) == 0
        said = raw.getvalue().decode("utf-8")
        assert ("é" in said) if arguments[0] == "predict" else ("Rückgabe, 配送" in said)


def test_a_line_of_standard_error_never_fails_to_be_encoded(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="utf-8"))
    assert cli.main(["tasks", "störe\udcff"]) == 2
    sys.stderr.flush()
    assert raw.getvalue().startswith("slm-fast: error: störe\\udcff: not a store".encode())


# Errors and interrupts


def raising(error: BaseException) -> Callable[[object], NoReturn]:
    def run(_: object) -> NoReturn:
        raise error

    return run


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class PanicException(BaseException):
    """Named like pyo3's exception for a panic in Rust code."""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (caused(ImportError("numpy"), KeyboardInterrupt()), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "not enough memory: CUDA out of memory. Tried"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 5\nat c10"),
            1,
            "not enough memory: [enforce]",
        ),
        (RuntimeError("std::bad_alloc"), 1, "not enough memory: std::bad_alloc"),
        (RuntimeError("can't start new thread"), 1, "not enough memory: can't start new thread"),
        (PanicException("ThreadPoolBuildError { kind: IOError"), 1, "not enough memory: ThreadPoolBuildError"),
        (PanicException("PyObject pointer is null"), 1, "not enough memory: PyObject pointer is null"),
        (
            caused(ValueError("load"), OSError(errno.ENOMEM, "allocate memory")),
            1,
            "not enough memory: [Errno 12]",
        ),
        (OSError(errno.ENOENT, "gone", "x"), 1, "x: gone"),
        (WorkError("two\nlines"), 1, "two lines"),
        (InputError("k: wrong"), 2, "k: wrong"),
    ],
    ids=repr,
)
def test_what_ends_a_call_is_one_line(error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slm_fast.cli.demo.run", raising(error))
    one_line(slm_fast("demo"), status, f"slm-fast: error: {said}")


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), caused(ValueError("a"), KeyError("b"))])
def test_a_bug_is_a_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slm_fast.cli.demo.run", raising(bug))
    with pytest.raises(type(bug)):
        slm_fast("demo")


def test_an_interrupt_of_the_first_imports_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "slm_fast.cli.shell":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "slm_fast.cli.shell")
    monkeypatch.delattr(cli, "shell")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert cli.main(["tasks"]) == 130
    assert capsys.readouterr().err == "slm-fast: error: interrupted\n"


# Options


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("predict --abstain STORE", "predict --abstain=0.99 STORE"),
        ("predict --abstain 0.95 STORE", "predict --abstain 0.95 STORE"),
        ("predict STORE --abstain", "predict STORE --abstain=0.99"),
        ("predict --abstain --bare STORE", "predict --abstain=0.99 --bare STORE"),
        ("predict --abstain=1 STORE", "predict --abstain=1 STORE"),
        ("tasks STORE", "tasks STORE"),
        ("", ""),
    ],
)
def test_abstain_takes_a_number_and_never_the_store(given: str, meant: str):
    assert with_share(given.split()) == meant.split()


def test_abstain_before_the_store_opens_it(store: Path):
    before, after = (slm_fast("predict", *words, stdin=LINE) for words in (("--abstain", store), (store, "--abstain")))
    assert before.returncode == 0
    assert before.stdout == after.stdout != ""


def test_a_share_to_abstain_beyond_one_is_refused_in_the_words_of_the_command_line(store: Path):
    for share in ("95", "-0.1", "nan"):
        done = slm_fast("predict", store, f"--abstain={share}", stdin=LINE)
        one_line(done, 2, f"--abstain: expected a number from 0 to 1, got '{share}'")


def test_options_that_change_nothing_are_said(store: Path):
    done = slm_fast("predict", store, "--top-p", 0.5, "--max-new-tokens", 3, "--top-k", 2, stdin=LINE)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "slm-fast: warning: --max-new-tokens has no effect: an encoder-only backbone writes no text",
        "slm-fast: warning: --top-p has no effect: an encoder-only backbone writes no text",
    ]


def test_options_that_a_bare_model_or_an_evaluation_ignores_are_said(store: Path, tmp_path: Path):
    done = slm_fast("predict", store, "--bare", "--abstain", "--head", "winner", "--task", "sea", stdin=LINE)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "slm-fast: warning: --bare: an encoder-only backbone has no answer of its own; every row's is empty",
        "slm-fast: warning: --abstain has no effect: with --bare no task answers",
        "slm-fast: warning: --head has no effect: with --bare no task answers",
        "slm-fast: warning: --task has no effect: with --bare no task answers",
    ]
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nsea1,sea\n")
    done = slm_fast("evaluate", store, "--task", f"sea={rows}", "--distance", "--bare", "--with-task-id")
    assert "slm-fast: warning: --distance has no effect: it goes with predict" in done.stderr
    assert "slm-fast: warning: --with-task-id has no effect: with --bare no task answers" in done.stderr


def test_an_invalid_option_is_named_as_it_was_typed(store: Path):
    one_line(slm_fast("predict", store, "--batch-tokens", 0, stdin=LINE), 2, "error: --batch-tokens: expected at least")
    one_line(slm_fast("predict", store, "--top-p=2", stdin=LINE), 2, "error: --top-p: expected")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--input", "FOLDER"), ("is a folder, expected a file",)),
        (("--output", "FOLDER"), ("is a folder, expected a file",)),
        (("--output", "out.csv"), ("out.csv", "JSON Lines", ".jsonl")),
    ],
)
def test_a_wrong_path_is_found_before_the_model_is_loaded(
    arguments: tuple[str, ...], parts: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("slm_fast.cli.predict.open_store", raising(AssertionError("loaded")))
    given = [str(folder) if word == "FOLDER" else word for word in arguments]
    one_line(slm_fast("predict", folder / "store", *given, stdin=LINE), 2, *parts)


def test_merge_prefers_a_store_that_is_merged_only(store: Path, tmp_path: Path):
    one_line(slm_fast("merge", tmp_path / "new", store, "--prefer", tmp_path), 2, "prefer: expected one of")


# Long lists


def test_names_are_whole_and_labels_few_where_no_terminal_is(store: Path):
    lines = slm_fast("tasks", store).stdout.splitlines()
    assert any("farm" + "m" * 60 in line for line in lines)
    (listed,) = (line for line in lines if "5,000 labels" in line)
    assert "5,000 labels: label 0, label 1, label 2, " in listed
    assert " and 4980 more" in listed
    assert len(listed) < 600
