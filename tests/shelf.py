"""A file system of fsspec that does what a test tells it to: the folder SHELF as shelf://."""

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
    """Reads whole files and can do nothing else. asked: the paths of all reads. before: called with each."""

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
    """The folder of the store whose URL is `URL`; a cache that is this test's alone."""
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setenv("SLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(RemoteStore, "pause", 0.0)
    Shelf.folder, Shelf.asked, Shelf.before = tmp_path / "shelf", [], staticmethod(lambda _: None)
    return tmp_path / "shelf" / "store"


def path_of(name: str, store: Path) -> str:
    """Of a task's file, in its store."""
    return task_path(name, Store.open(store).files[name])


def brought(url: str = URL) -> dict[str, bytes]:
    """What the store at a URL holds, as a process that opens it finds."""
    return contents(RemoteStore.open(url).load())


def asked() -> list[str]:
    """What was asked for since this was called last."""
    paths, Shelf.asked = Shelf.asked, []
    return [path.removeprefix("store/") for path in paths]


def whenever(act: Callable[[str], object]) -> None:
    """Call `act` with the path before each read from now on; what it raises, reading raises."""
    Shelf.before = staticmethod(act)
