"""An fsspec file system that serves a folder as shelf://, records reads and lets tests inject faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem
from stores import contents

from slm_fast.remote_store import RemoteStore
from slm_fast.schema import task_path
from slm_fast.store import Store


class Shelf(AbstractFileSystem):
    """A file system that can only read whole files.

    Attributes:
        asked: paths of all reads.
        before: called with the path before each read.
    """

    protocol = "shelf"
    folder: ClassVar[Path]
    asked: ClassVar[list[str]]
    before: ClassVar[Callable[[str], object]]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        assert start is None is end
        self.asked.append(path)
        Shelf.before(path)
        return (self.folder / path).read_bytes()


URL = "shelf://store"


def put_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register shelf:// with a cache of the test's own; returns the folder behind `URL`."""
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setenv("SLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(RemoteStore, "pause", 0.0)
    Shelf.folder, Shelf.asked, Shelf.before = tmp_path / "shelf", [], staticmethod(lambda _: None)
    return tmp_path / "shelf" / "store"


def path_of(name: str, store: Path) -> str:
    """Path of a task's file, relative to its store."""
    return task_path(name, Store.open(store).files[name])


def brought(url: str = URL) -> dict[str, bytes]:
    """Open the store at a URL and load it: name -> content of each task's file."""
    return contents(RemoteStore.open(url).load())


def asked() -> list[str]:
    """Paths read since the last call, relative to the store."""
    paths, Shelf.asked = Shelf.asked, []
    return [path.removeprefix("store/") for path in paths]


def whenever(act: Callable[[str], object]) -> None:
    """Call `act` with the path before each read from now on. If it raises, the read fails with that error."""
    Shelf.before = staticmethod(act)
