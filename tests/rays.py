"""Finds the processes of Ray actors, so that tests can kill them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def actors(name: str) -> list[int]:
    """PIDs of all Ray actors of this class that are descendants of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()) and _is_ours(int(folder.name)):
                found.append(int(folder.name))
    return found


def _is_ours(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False
