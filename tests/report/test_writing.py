"""Writing a report: an output that cannot be is refused before any work, and other files are never replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from command import one_line, slm_fast
from made_runs import make_run

from slm_fast import InputError
from slm_fast.report import run_report, save


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", seeds=1, methods=["slm"])


def test_an_output_in_no_folder_is_a_wrong_call_and_nothing_is_written(run: Path, tmp_path: Path):
    one_line(slm_fast("report", run, "--output", tmp_path / "none" / "p.html"), 2, "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slm_fast.report.writing.find_spec", lambda name: None)
    one_line(
        slm_fast("report", run, "--output", tmp_path / "p.html"), 2, "matplotlib", "slm-fast[report]", "--no-files"
    )
    assert list(tmp_path.iterdir()) == []
    assert slm_fast("report", run, "--output", tmp_path / "p.html", "--no-files").returncode == 0


@pytest.mark.parametrize("name", ["run.json", "slm/about.json", "slm/seed0/stages.jsonl"])
def test_a_file_that_is_no_page_is_never_replaced(run: Path, name: str):
    before = (run / name).read_bytes()
    one_line(slm_fast("report", run, "--output", run / name, "--no-files"), 2, str(run / name), "not an HTML page")
    with pytest.raises(InputError, match="not an HTML page"):
        save(run_report([run]), run / name)
    assert (run / name).read_bytes() == before


def test_an_earlier_report_and_an_empty_file_are_replaced(run: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    page.touch()
    save(run_report([run]), page, files=True)
    first = page.read_bytes()
    save(run_report([run], command="again"), page, files=True)
    assert first.startswith(b"<!DOCTYPE html>")
    assert page.read_bytes() != first


def test_what_is_no_regular_file_is_left_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    one_line(slm_fast("report", run, "--output", "pipe"), 2, "pipe: is not a regular file")
    one_line(slm_fast("report", run, "--output", "-"), 2, "-: a report is not written to standard output")
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir() == ["pipe"]


@pytest.mark.parametrize("name", ["methods.csv", "numbers.json"])
def test_a_folder_of_other_files_is_not_written_to(run: Path, name: str, tmp_path: Path):
    (tmp_path / "page_files").mkdir()
    (tmp_path / "page_files" / name).write_text("precious\n")
    one_line(slm_fast("report", run, "--output", tmp_path / "page.html"), 2, "page_files", "not a report's folder")
    assert [path.name for path in tmp_path.rglob("*.*")] == [name]
    assert (tmp_path / "page_files" / name).read_text() == "precious\n"


@pytest.mark.parametrize("whole", range(3))
def test_a_report_cut_off_anywhere_is_written_again(run: Path, whole: int, tmp_path: Path, monkeypatch):
    written = []

    def cut_off(path: Path, data: bytes) -> None:
        if len(written) == whole:
            path.with_name(f"{path.name}.part").write_bytes(data[:9])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("slm_fast.report.writing.write", cut_off)
        one_line(slm_fast("report", run, "--output", tmp_path / "page.html"), 1, "No space left")
    assert slm_fast("report", run, "--output", tmp_path / "page.html").returncode == 0
