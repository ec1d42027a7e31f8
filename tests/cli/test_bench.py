"""Tests of `slm-fast bench` and `slm-fast repro`, with a clone of the repository and without one."""

from __future__ import annotations

import runpy
from functools import partial

import pytest
from command import one_line, slm_fast

from slm_fast import InputError
from slm_fast.cli.bench import BENCHMARKS, REPRO, repro, run


@pytest.mark.parametrize(("module", "of"), [("speed/inference", partial(run, "inference")), ("continual/run", repro)])
def test_they_run_in_the_current_folder_with_their_arguments_and_give_their_status(
    module, of, capfd, tmp_path, monkeypatch
):
    file = tmp_path / "clone" / "benchmarks" / f"{module}.py"
    file.parent.mkdir(parents=True)
    for package in (file.parents[1], file.parent):
        (package / "__init__.py").touch()
    file.write_text("import os, sys\nprint(os.getcwd(), sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert of(["--rows", "7"], tmp_path / "clone") == 3
    assert capfd.readouterr().out == f"{tmp_path} ['--rows', '7']\n"


def test_without_the_repository_it_says_where_the_benchmarks_are(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(InputError, match=f"bench {name}: .*clone") as caught:
            run(name, [], tmp_path)
        assert "\n" not in str(caught.value)


def test_an_unknown_benchmark_is_a_wrong_call():
    one_line(slm_fast("bench", "nonesuch"), 2, "nonesuch", "inference")


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        *((module, [f"slm-fast bench {name}"]) for name, (module, _) in BENCHMARKS.items()),
        (REPRO, ["usage: slm-fast repro", "--stream"]),
    ],
    ids=[*BENCHMARKS, "repro"],
)
def test_every_benchmark_is_here_and_says_how_it_is_called(module, parts, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:  # in this process, where most imports are already loaded
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not stop.value.code
    said = capsys.readouterr().out
    assert all(part in said for part in parts)


def test_repro_without_the_repository_says_where_it_is(tmp_path):
    with pytest.raises(InputError, match=r"repro: .*clone it"):
        repro(["RUN"], tmp_path)
