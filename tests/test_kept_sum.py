"""The tasks' sum, cached beside the manifest: same bits as without it, and no trace of forgotten tasks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import bits, make_slm, mixed_texts, one_thread, random_task, reopened  # noqa: F401
from stores import (
    ABOUT,
    A,
    B,
    C,
    D,
    contents,
    edit_manifest,
    kept,
    make_task,
    same,
    store_of,
    summed,
    summed_store,
    version,
)

import slm_fast.sketch
from slm_fast import ScalableLM
from slm_fast.errors import InputError, WorkError
from slm_fast.exact_sum import ExactSum
from slm_fast.files import locked
from slm_fast.kept_sum import KeptSum, SumFile
from slm_fast.mapped_task import LATER
from slm_fast.store import Store
from slm_fast.task_file import digest_of, task_to_bytes

NAMES = ("city", "farm", "sea", "sky")


@pytest.fixture(autouse=True)
def kept_from_two_tasks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "unsummed", 2)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# The file


@pytest.mark.parametrize("width", [1, 2, 7, 130, 181])
@pytest.mark.parametrize("kind", ["zeros", "small", "large", "even", "mixed"])
def test_a_sum_comes_back_to_the_last_bit(tmp_path: Path, width: int, kind: str) -> None:
    draw = np.random.default_rng(width)
    numbers = width * (width + 1) // 2

    def plane() -> torch.Tensor:
        bits = {"zeros": 0, "small": 5, "large": 62, "even": 20, "mixed": 40}[kind]
        found = draw.integers(-(2**bits) + 1, 2**bits, numbers) << (30 if kind == "even" else 0)
        return torch.from_numpy(found >> draw.integers(0, 40, numbers) if kind == "mixed" else found)

    file, opening = SumFile(tmp_path / ".sum", ABOUT), {"ab" * 32: "cd" * 32, "01" * 32: "ef" * 32}
    there = KeptSum(opening, ExactSum(plane(), plane()))
    file.write(there)
    found = file.read()
    assert found is not None
    assert same(found.total, there.total)
    assert found.opening == opening
    assert file.tasks() == set(opening)
    if kind in ("small", "zeros"):
        assert file.path.stat().st_size < 2000 + 32 * width + 2 * numbers


def test_one_flipped_bit_anywhere_or_a_file_cut_short_is_no_sum(tmp_path: Path) -> None:
    summed_store(tmp_path, A, B)
    data = (tmp_path / ".sum").read_bytes()
    assert kept(tmp_path) is not None
    for at in range(0, len(data), 7):
        flip(tmp_path / ".sum", at)
        assert kept(tmp_path) is None
        assert version(tmp_path) == contents([A, B])
        (tmp_path / ".sum").write_bytes(data)
    for size in (0, 1, 79, 80, 100, len(data) - 1):
        (tmp_path / ".sum").write_bytes(data[:size])
        assert kept(tmp_path) is None
        assert version(tmp_path) == contents([A, B])
        assert len(Store.open(tmp_path).verify()) == 1


def test_a_sum_of_another_kind_of_model_is_none(tmp_path: Path) -> None:
    summed_store(tmp_path, A, B)
    other = {**ABOUT, "config": {**ABOUT["config"], "k": 3}}
    assert SumFile(tmp_path / ".sum", other).read() is None


# Opening


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four tasks with their cached sum, for a router with random features."""
    slm, path = make_slm("bert", features=32), tmp_path_factory.mktemp("large") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "unsummed", 2)
        slm.save_pretrained(path)
        slm.add([random_task(slm, name) for name in NAMES])
    assert kept(path) is not None
    return path


@pytest.fixture
def path(large: Path, tmp_path: Path) -> Path:
    shutil.copytree(large, tmp_path / "store")
    return tmp_path / "store"


def assert_as_without_a_sum(path: Path, *slms: ScalableLM) -> None:
    """Assert that these models, and the store opened with its caches, equal bit for bit the store opened without."""
    opened = reopened(path)
    for name in (".sum", ".keys"):
        (path / name).unlink(missing_ok=True)
    expected = reopened(path)
    for slm in (opened, *slms):
        assert slm.tasks == expected.tasks
        assert same(slm.model.router.scatter, expected.model.router.scatter)
        for one, other in zip(bits(slm), bits(expected), strict=True):
            assert torch.equal(one, other)
        for name in slm.tasks:
            assert task_to_bytes(slm.learned[name]) == task_to_bytes(expected.learned[name])


def test_a_store_opened_with_a_sum_is_to_the_bit_the_one_opened_without(path: Path) -> None:
    store = Store.open(path)
    store.load()
    assert store.kept.summed is not None
    assert (store.kept.summed() or [None])[0] == set(NAMES)
    assert_as_without_a_sum(path)


def test_opening_keeps_a_sum_where_there_is_none_and_adds_what_is_newer(path: Path) -> None:
    (path / ".sum").unlink()
    reopened(path)
    found = kept(path)
    assert found is not None
    assert found.opening.keys() == set(Store.open(path).files.values())
    slm = reopened(path)
    slm.add(random_task(slm, "word"))  # one new task is below `Store.unsummed`: the sum stays as it is
    again = kept(path)
    assert again is not None
    assert again.opening == found.opening
    store = Store.open(path)
    store.load()
    assert store.kept.summed is not None
    assert (store.kept.summed() or [None])[0] == set(NAMES)
    assert_as_without_a_sum(path, slm)


def test_tasks_learned_and_forgotten_by_several_leave_the_bits_of_a_fresh_store(path: Path) -> None:
    slm, other = reopened(path), reopened(path)
    slm.add([random_task(slm, "word"), random_task(slm, "aword")])
    other.forget("farm")
    other.add(random_task(slm, "farm2"))
    slm.forget("word")
    other.refresh()
    assert slm.tasks == other.tasks
    assert_as_without_a_sum(path, slm, other)


def test_the_sum_after_forgetting_is_to_the_byte_that_of_a_store_that_never_knew_the_task(tmp_path: Path) -> None:
    never = summed_store(tmp_path / "never", A, C)
    for name, given in (("alone", None), ("given", summed(A, C))):
        store = summed_store(tmp_path / name, A, B, C)
        store.commit(remove=["b"], summed=given)
        assert (store.path / ".sum").read_bytes() == (never.path / ".sum").read_bytes()
        store.commit(remove=["a", "c"])
        assert not (store.path / ".sum").exists()


def test_a_task_whose_file_is_damaged_is_forgotten_and_the_sum_with_it(tmp_path: Path) -> None:
    store = summed_store(tmp_path, A, B, C)
    flip(store.file("b"), -1)
    store.commit(remove=["b"])
    assert not (tmp_path / ".sum").exists()
    assert version(tmp_path) == contents([A, C])


def test_who_may_not_write_or_must_wait_opens_all_the_same(path: Path) -> None:
    (path / ".sum").unlink()
    with locked(path / ".lock", 0) as held:
        assert held
        reopened(path)
    assert not (path / ".sum").exists()


def test_a_store_of_the_papers_router_keeps_no_sum(tmp_path: Path) -> None:
    slm = make_slm("bert", router="dtkr")
    slm.save_pretrained(tmp_path)
    slm.add([random_task(slm, name) for name in NAMES])
    assert reopened(tmp_path).tasks == list(NAMES)
    assert not (tmp_path / ".sum").exists()


def test_a_sum_that_names_a_task_that_the_manifest_does_not_is_neither_used_nor_kept(tmp_path: Path) -> None:
    store = summed_store(tmp_path, A, B)
    edit_manifest(tmp_path, lambda manifest: manifest["tasks"].pop("b"))
    opened = Store.open(tmp_path)
    assert [task.name for task in opened.load()] == ["a"]
    assert opened.kept.summed() is None
    assert (tmp_path / ".sum") in opened.leftovers()
    store.commit(add=[C])
    assert not (tmp_path / ".sum").exists()


# Sampled tasks


@pytest.fixture
def of_two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample two tasks for covariance and centre: sky and city, whose names have the lowest SHA-256; sea's is next."""
    monkeypatch.setattr(slm_fast.sketch, "SAMPLED", 2)
    monkeypatch.setattr(slm_fast.sketch, "ALL", 2)


def names_in_sum(path: Path) -> set[str]:
    there = SumFile(path / ".sum", Store.open(path).about).tasks()
    return {name for name, digest in Store.open(path).files.items() if digest in (there or ())}


def test_a_sum_of_all_tasks_as_earlier_versions_wrote_it_opens_right_and_is_made_anew(
    path: Path, of_two_tasks: None
) -> None:
    assert names_in_sum(path) == set(NAMES)
    assert Store.open(path).verify() == []
    slm = reopened(path)
    assert names_in_sum(path) == {"city", "sky"}
    assert_as_without_a_sum(path, slm)


def test_what_enters_and_leaves_the_sample_alone_changes_the_sum(path: Path, of_two_tasks: None) -> None:
    slm = reopened(path)
    before = slm.model.router.scatter
    data = (path / ".sum").read_bytes()
    slm.add(random_task(slm, "word"))
    slm.forget("farm")
    assert slm.model.router.scatter is before
    assert (path / ".sum").read_bytes() == data
    slm.forget("sky")
    assert names_in_sum(path) == {"city", "sea"}  # sky is removed from it at once
    assert Store.open(path).verify() == []
    assert_as_without_a_sum(path, slm)


def test_a_task_that_left_the_sample_is_in_the_sum_until_it_is_forgotten(
    path: Path, of_two_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "unsummed", 3)
    slm = reopened(path)
    slm.forget("sky")
    slm.add(random_task(slm, "sky"))  # sea leaves the sample again, but two changed tasks are below `Store.unsummed`
    assert names_in_sum(path) == {"city", "sea"}
    other = reopened(path)
    assert other.model.router.sketch.parts.keys() == {"city", "sky"}
    Store.open(path).commit(remove=["sea"])
    assert "sea" not in names_in_sum(path)
    assert Store.open(path).verify() == []
    other.refresh()
    slm.refresh()
    assert_as_without_a_sum(path, slm, other)


# Data read on first use


def test_what_answering_needs_not_is_checked_when_it_is_used_first(path: Path) -> None:
    file = Store.open(path).file("farm")
    begin = file.read_bytes().rindex(reopened(path).learned["farm"].router["factor"].numpy().tobytes())
    flip(file, begin)
    slm, texts = reopened(path), mixed_texts(12)
    answers = slm.predict(texts)
    assert {answer.task for answer in answers} >= {"farm", "sea"}
    part = slm.learned["farm"].router
    assert set(part) >= {"factor", "sample"}
    for name in ("sample", "factor", "factor"):
        with pytest.raises(WorkError, match=rf"{file}: damaged: SHA-256") as caught:
            part[name]
        assert "\n" not in str(caught.value)
    assert "factor" in part
    for answer in slm.predict(texts, distance=True):
        assert (answer.distance == float("inf")) == (answer.task == "farm")
    [line] = Store.open(path).verify()
    assert str(file) in line
    slm.forget("farm")  # its contribution to the sum is found from the other tasks
    assert_as_without_a_sum(path, slm)


@pytest.mark.parametrize("name", ["mean", "head.weight", "values", "header", "sample_mean"])
def test_what_answering_needs_is_checked_when_the_store_is_opened(path: Path, name: str) -> None:
    task, file = reopened(path).learned["farm"], Store.open(path).file("farm")
    data = file.read_bytes()
    if name == "header":
        at = data.index(b'"labels') if b'"labels' in data else data.index(b"labels")
    else:
        found = {"values": next(iter(task.values.values()))[0], "head.weight": task.head and task.head[0]}
        tensor = found[name] if name in found else task.router[name]
        assert tensor is not None
        at = data.index(tensor.numpy().tobytes())
    flip(file, at)
    with pytest.raises(WorkError, match=rf"{file}: damaged: SHA-256"):
        reopened(path)
    with pytest.warns(UserWarning, match="left out"):
        assert "farm" not in reopened(path, skip_damaged=True).tasks


def test_a_file_that_was_taken_away_is_named(path: Path) -> None:
    file = Store.open(path).file("farm")
    file.unlink()
    with pytest.raises(WorkError, match=rf"{file}: cannot be read"):
        reopened(path)


def test_a_task_forgotten_elsewhere_is_whole_until_the_model_hears_of_it(path: Path) -> None:
    expected = contents(Store.open(path).load())
    slm = reopened(path)
    Store.open(path).commit(remove=["farm", "sea"])
    assert {name: task_to_bytes(slm.learned[name]) for name in NAMES} == expected
    slm.refresh()
    assert slm.tasks == ["city", "sky"]
    assert_as_without_a_sum(path, slm)


def test_tasks_read_later_are_those_read_whole(path: Path) -> None:
    mapped = {task.name: task for task in Store.open(path).load()}
    for name, task in mapped.items():
        whole, _ = Store.open(path).read(name)
        assert (task.rank, task.slots, task.labels, task.options) == (
            *(whole.rank, whole.slots),
            *(whole.labels, whole.options),
        )
        assert task.router.keys() == whole.router.keys()
        assert task.values.keys() == whole.values.keys()
        assert len(task.router) == len(whole.router)
        assert len(task.values) == len(whole.values)
        assert set(LATER) & set(whole.router) == {"factor", "exponent", "diagonal", "sample"}
        assert all(torch.equal(task.router[own], whole.router[own]) for own in whole.router)
        with pytest.raises(KeyError):
            task.values["no such module"]


# Verify and merge


def test_verify_finds_a_sum_that_is_another(tmp_path: Path) -> None:
    store = summed_store(tmp_path, A, B)
    assert store.verify() == []
    right = kept(tmp_path)
    assert right is not None
    wrong = ExactSum.of([torch.full((10,), 2.0**-56)], right.total)
    names = {**right.opening, "ab" * 32: "cd" * 32}
    other = dict.fromkeys(right.opening, "00" * 32)
    for forged in (KeptSum(right.opening, wrong), KeptSum(names, right.total), KeptSum(other, right.total)):
        SumFile(tmp_path / ".sum", ABOUT).write(forged)
        [line] = store.verify()
        assert line.startswith(f"{tmp_path / '.sum'}: a cache that is damaged or not of")
    (tmp_path / ".sum").unlink()
    assert store.verify() == []


def test_merging_adds_the_sums_of_sources_that_are_taken_whole(tmp_path: Path) -> None:
    e, f = make_task("e"), make_task("f")
    stores = [summed_store(tmp_path / "one", A, B), summed_store(tmp_path / "other", C, D)]
    overlapping = summed_store(tmp_path / "overlapping", A, e)
    store = store_of(tmp_path / "dest", f)
    store.merge([*stores, overlapping])
    found = kept(store.path)
    assert found is not None
    assert found.opening.keys() == {digest_of(task) for task in (A, B, C, D)}
    assert same(found.total, summed(A, B, C, D)[1])
    assert store.verify() == []
    assert version(store.path) == contents([A, B, C, D, e, f])


def test_a_name_that_is_taken_or_missing_leaves_the_sum_as_it_was(tmp_path: Path) -> None:
    store = summed_store(tmp_path, A, B)
    data = (tmp_path / ".sum").read_bytes()
    for change in ({"add": [make_task("a", slots=2)]}, {"remove": ["nobody"]}):
        with pytest.raises(InputError):
            store.commit(**change)
    assert (tmp_path / ".sum").read_bytes() == data
