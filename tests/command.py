"""Runs the command line in this process."""

from __future__ import annotations

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import pytest

from slm_fast import cli


def slm_fast(*arguments: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run the command in this process; returns what subprocess.run would: status and decoded output."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            status = cli.main(list(map(str, arguments)))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def one_line(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("slm-fast")
    for part in parts:
        assert part in lines[0]
