"""A store of three tasks whose `.keys` is complete, and what such a file may hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from models import bits, make_slm, random_task, reopened

from slm_fast import ScalableLM
from slm_fast.kept_keys import KeysFile
from slm_fast.store import Store

NAMES = ("city", "farm", "sea")


def keyed_store(path: Path) -> Path:
    """A store of three tasks with cached keys, for a router with random features."""
    slm = make_slm("bert", features=32)
    slm.save_pretrained(path)
    slm.add([random_task(slm, name) for name in NAMES])
    reopened(path)
    assert keys_of(path)
    return path


def file_of(store: Store) -> KeysFile:
    return KeysFile(store.path / ".keys", store.about)


def keys_of(path: Path) -> bool:
    """Whether a store's keys are cached and are exactly those of its tasks."""
    store = Store.open(path)
    found = file_of(store).read()
    if found is None or file_of(store).known(found, store.files) is None:
        return False
    return found.rows.keys() == set(store.files.values())


def has_openings_alone(path: Path, *names: str) -> bool:
    """Whether a store's `.keys` has the openings of these tasks, and nothing else."""
    store = Store.open(path)
    found = file_of(store).read()
    if found is None or found.openings.keys() != {store.files[name] for name in names}:
        return False
    size = 128 + sum(4 * 32 + 2 * 8 + len(opening.start) for opening in found.openings.values())
    return (path / ".keys").stat().st_size == size


def assert_same_bits(one: ScalableLM, other: ScalableLM) -> None:
    assert one.tasks == other.tasks
    for here, there in zip(bits(one), bits(other), strict=True):
        assert torch.equal(here, there)


def without_keys(path: Path, into: Path) -> ScalableLM:
    """The model of a copy of the store without caches."""
    shutil.copytree(path, into)
    for name in (".keys", ".sum"):
        (into / name).unlink(missing_ok=True)
    return reopened(into)
