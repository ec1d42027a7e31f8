"""A commit that is killed or fails at any file-system call leaves no sum that includes a task not in the manifest."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stores import (
    A,
    B,
    C,
    D,
    broken_anywhere,
    contents,
    die,
    fail,
    kept,
    make_task,
    same,
    summed,
    summed_store,
    version,
)

from slm_fast.kept_sum import SumFile
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask


@pytest.fixture(autouse=True)
def kept_from_two_tasks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "unsummed", 2)


CHANGES: dict[str, tuple[Callable[[Store], None], tuple[LearnedTask, ...]]] = {
    "add": (lambda store: store.commit(add=[C, D], summed=summed(A, B, C, D)), (A, B, C, D)),
    "remove": (lambda store: store.commit(remove=["a"]), (B,)),
    "remove, the sum given": (lambda store: store.commit(remove=["a"], summed=summed(B)), (B,)),
    "both": (lambda store: store.commit(add=[C, D], remove=["a"], summed=summed(B, C, D)), (B, C, D)),
}


@pytest.fixture
def begin() -> Iterator[Path]:
    """A store with a sum, on tmpfs if possible: the test repeats commits many times, and the disk does not matter."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        summed_store(Path(folder) / "begin", A, B)
        yield Path(folder) / "begin"


@pytest.mark.parametrize(("change", "act"), [*((change, die) for change in CHANGES), ("add", fail), ("remove", fail)])
def test_a_commit_broken_anywhere_leaves_no_sum_of_a_task_that_the_manifest_does_not_name(
    begin: Path, change: str, act: Callable[[], object]
) -> None:
    work, after = CHANGES[change]
    old, new = contents([A, B]), contents(after)
    outcomes, sums, n = set(), set(), 0
    for n, path in enumerate(broken_anywhere(begin, work, act), 1):
        store = Store.open(path)
        there = SumFile(path / ".sum", store.about).tasks()
        assert there is not None
        assert there <= set(store.files.values()), n
        found = kept(path)
        names = {name for name, digest in store.files.items() if digest in there}
        assert found is None or same(found.total, summed(*(t for t in (A, B, C, D) if t.name in names))[1])
        assert version(path) in (old, new)
        outcomes.add(version(path) == new)
        sums.add(frozenset(names))
        assert store.verify() == []
        store.commit(add=[make_task("z")])
        assert store.leftovers() == []
        assert not (path / ".sum.part").exists()
    assert outcomes == {False, True}
    assert frozenset("ab") in sums
    if change != "add":  # in `add` only the last call puts the new sum in place
        assert len(sums) > 1
    assert n > 10
