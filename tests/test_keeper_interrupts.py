"""A model whose change is interrupted agrees with its store after the next refresh, and undoes nothing in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupt import broken_off
from models import (
    knows,
    make_slm,
    one_thread,  # noqa: F401
    reopened,
    two_tasks,
)
from shelf import URL

from slm_fast import ScalableLM, keeper, model
from slm_fast.errors import SlmWarning
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask

pytestmark = pytest.mark.usefixtures("few_features")

# Change: whether the store has the task "sea" before it, what another process does, what is interrupted
CHANGES: dict[str, tuple[bool, Callable[[Store, LearnedTask], object], Callable[[ScalableLM, LearnedTask], object]]] = {
    "add": (False, lambda store, sea: None, lambda slm, sea: slm.add(sea)),
    "forget": (True, lambda store, sea: None, lambda slm, sea: slm.forget("sea")),
    "learned elsewhere": (False, lambda store, sea: store.commit(add=[sea]), lambda slm, sea: slm.refresh()),
    "forgotten elsewhere": (True, lambda store, sea: store.commit(remove=["sea"]), lambda slm, sea: slm.refresh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_interrupted_anywhere_is_taken_over_by_the_next_refresh(change: str, tmp_path: Path) -> None:
    has_sea, elsewhere, act = CHANGES[change]
    slm = make_slm("bert", features=32)
    farm, sea = two_tasks(slm)
    knows(slm, farm).save_pretrained(tmp_path)

    def begin() -> None:
        store = Store.open(tmp_path)
        if ("sea" in store.files) != has_sea:
            store.commit(add=[sea] if has_sea else [], remove=[] if has_sea else ["sea"])
        slm.refresh()
        assert slm.tasks == sorted(store.files)
        elsewhere(store, sea)

    begin()
    outcomes = set()
    for _ in broken_off(lambda: act(slm, sea), keeper, model):
        files = Store.open(tmp_path).files
        outcomes.add("sea" in files)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlmWarning)
            slm.refresh()
            assert slm.tasks == sorted(files)
            slm.save_pretrained(tmp_path)
        assert Store.open(tmp_path).files == files
        begin()
    assert outcomes == ({False, True} if change in ("add", "forget") else {not has_sea})


def test_forgetting_a_task_of_a_url_that_is_interrupted_anywhere_can_be_done_again(shelf: Path, cache: Path) -> None:
    slm = make_slm("bert", features=32)
    knows(slm, *two_tasks(slm)).save_pretrained(shelf)
    found = [reopened(URL)]
    for _ in broken_off(lambda: found[-1].forget("sea"), keeper, model):
        again = found[-1]
        again.refresh()
        if "sea" in again.tasks:
            again.forget("sea")
        again.refresh()
        assert again.tasks == ["farm"]
        found.append(reopened(URL))
    assert len(found) > 5
