"""`run.json`: what all methods and seeds of a RUN share. A call that differs in it is refused. Several commands may add
to one RUN at a time."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.continual.cell import stages_of
from benchmarks.continual.streams import Stream
from benchmarks.machine import describe
from slm_fast import InputError, Task, WorkError
from slm_fast.files import locked, write

FORMAT = 1
LOCK = ".lock"
OURS = {LOCK, "run.json.part"}  # what a RUN may have before it has a run.json
SETTINGS = ("train", "test", "epochs", "max_length", "max_new_tokens", "unseen", "bertscore", "autocast")


def described(options: argparse.Namespace, stream: Stream, data: Mapping[str, str]) -> dict[str, Any]:
    """The contents of run.json. data: the SHA-256 of each drawing's rows (`digest_of`)."""
    return {
        "format": FORMAT,
        "stream": {"name": Path(options.stream).stem, "tasks": list(stream.tasks)},
        "backbone": options.backbone,
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "data": dict(data),
    }


def digest_of(*splits: Mapping[str, Task]) -> str:
    """SHA-256 of all rows, by split and task."""
    found = hashlib.sha256()
    for tasks in splits:
        for name, task in tasks.items():
            rows = [(row.instruction, row.text, row.target) for row in task.rows]
            found.update(json.dumps([name, rows]).encode())
    return found.hexdigest()


@contextmanager
def alone(folder: Path, patience: float = 0) -> Iterator[None]:
    """Keep other commands from changing this folder inside the block; it is created if missing.

    Raises WorkError if another one still does after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, patience) as held:
        if not held:
            raise WorkError(f"{folder}: another command is writing to it; try again when it has ended")
        yield


def opened(run: Path, about: Mapping[str, Any], titles: Mapping[str, Mapping[str, Any]]) -> None:
    """Create the RUN, or check that it has the same stream, rows and settings. Then describe its methods.

    Args:
        titles: folder of each method -> contents of its about.json.

    Raises InputError if they differ, WorkError if it cannot be read.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is a file, expected a folder")
    there = {file.name for file in run.iterdir()} if run.exists() else set()
    if there - OURS and "run.json" not in there:
        raise InputError(f"{run}: not empty, and no run of this benchmark; name another folder")
    with alone(run, patience=30):
        _agree(run, about)
        for folder, title in titles.items():
            (run / folder).mkdir(exist_ok=True)
            write(run / folder / "about.json", (json.dumps(title) + "\n").encode())


def _agree(run: Path, about: Mapping[str, Any]) -> None:
    path = run / "run.json"
    if not path.exists():
        _save(path, about, {"machine": describe(), "date": time.strftime("%Y-%m-%d")})
        return
    try:
        known = json.loads(path.read_text())
        version = known["format"]
    except (ValueError, KeyError, TypeError):
        raise WorkError(f"{path}: damaged; name another folder, or delete this one to start again") from None
    if version != FORMAT:
        raise WorkError(f"{path}: of format {version!r}, this version reads {FORMAT}; name another folder")
    before, now = _flat(known), _flat(about)
    differing = next((name for name, value in now.items() if before.get(name, value) != value), None)
    if differing and any(stages_of(file.parent) for file in run.glob("*/seed*/stages.jsonl")):
        raise InputError(_refusal(run, differing, before[differing], now[differing]))
    if differing or before != now:  # nothing is done yet, or there are rows of a further drawing
        data = {} if differing else known.get("data", {})
        kept = {name: known[name] for name in ("machine", "date") if name in known}
        _save(path, {**about, "data": {**data, **about["data"]}}, kept)


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting by the name that an error message gives it."""
    given = {"autocast": False} | about.get("settings", {})  # runs from before --autocast lack it
    settings = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    data = {f"rows of drawing {name}": value for name, value in about.get("data", {}).items()}
    stream = about.get("stream", {})
    names = {"--stream": stream.get("name"), "tasks": stream.get("tasks"), "--backbone": about.get("backbone")}
    return names | settings | data


def _refusal(run: Path, name: str, before: object, now: object) -> str:
    if name.startswith("rows"):
        return f"{run}: learned from other rows; name another folder"
    return f"{run}: made {_said(name, before)}, called {_said(name, now)}; name another folder"


def _said(name: str, value: object) -> str:
    if value is None or value is False:
        return f"without {name}"
    if value is True:
        return f"with {name}"
    return f"with {name} {', '.join(map(str, value)) if isinstance(value, list) else value}"


def _save(path: Path, about: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    write(path, (json.dumps({**about, **measured}, indent=1) + "\n").encode())
