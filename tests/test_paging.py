"""Paged pools, which hold the values of only some tasks on the device: predictions must equal those of a full pool."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from models import FAMILIES, TOPICS, easy, make_slm, one_thread, random_task, reopened, sentence  # noqa: F401
from stores import damage_values

from slm_fast import ScalableLM
from slm_fast.errors import InputError, SlmWarning, WorkError
from slm_fast.memory import bytes_of
from slm_fast.ops import Route
from slm_fast.paging import PagedPool, TooManySlots
from slm_fast.pool import Buffers, Pool, rows_of
from slm_fast.predict import Prediction
from slm_fast.store import Store
from slm_fast.tasks import Adapter, LearnedTask, MappedValues

NAMES = [f"{topic}{i}" for topic in TOPICS for i in range(3)]
SMAPS = Path("/proc/self/smaps")


def some_tasks(slm: ScalableLM, **shape: int) -> list[LearnedTask]:
    return [random_task(slm, name, topic=name[:-1], **shape) for name in NAMES]


def texts(count: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng.choice(TOPICS), rng, words=rng.choice((1, 3, 8, 20))) for _ in range(count)]


def slot_bytes(slm: ScalableLM, rank: int = 4) -> int:
    return 4 * rank * sum(sum(widths) for widths in slm.model.widths.values())


def with_room(name: str, slots: int, tasks: Sequence[LearnedTask], rank: int = 4, **config: object) -> ScalableLM:
    """A model that knows `tasks`, with device memory for the values of `slots` slots of rank `rank`."""
    slm = make_slm(name, **config)
    slm.model._device_memory = slots * slot_bytes(slm, rank)
    slm._set(tasks)
    return slm


def assert_same(here: Sequence[Prediction], there: Sequence[Prediction]) -> None:
    assert [(a.task, a.label, a.text, a.score) for a in here] == [(a.task, a.label, a.text, a.score) for a in there]
    assert [a.route for a in here] == [a.route for a in there]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("slots", [1, 2])
def test_answers_are_to_the_bit_those_with_all_values_there(name: str, slots: int) -> None:
    whole = make_slm(name)
    tasks = some_tasks(whole, slots=slots)
    whole._set(tasks)
    paged = with_room(name, 8, tasks)
    assert isinstance(paged.model.pool, PagedPool)
    assert not isinstance(whole.model.pool, PagedPool)
    for seed in range(3):
        options = {"batch_size": 4, "max_new_tokens": 4}
        assert_same(paged.predict(texts(24, seed), **options), whole.predict(texts(24, seed), **options))
    counts = paged.model.pool.counts
    assert counts.misses > 8
    assert counts.hits > 0


def test_where_all_fit_nothing_is_read_twice() -> None:
    slm = make_slm("bert", k=1)
    tasks = some_tasks(slm)
    assert type(with_room("bert", len(tasks), tasks, k=1).model.pool) is Pool
    paged = with_room("bert", len(tasks) - 1, tasks, k=1)
    rows = [text for text in texts(40) if "sky" not in text]
    answers = paged.predict(rows, batch_size=4)
    used = {task for answer in answers for task in answer.route.tasks}
    before = paged.model.pool.counts.misses
    assert before == len(used) < len(tasks)
    assert_same(paged.predict(rows, batch_size=4), answers)
    assert paged.model.pool.counts.misses == before


def test_the_pages_used_last_stay() -> None:
    slm = make_slm("bert", k=1)
    pool = with_room("bert", 3, some_tasks(slm), k=1).model.pool

    def ask(*slots: int) -> list[int]:
        return pool.rows(Route(torch.tensor(slots)[:, None], torch.ones(len(slots), 1))).slot_ids[:, 0].tolist()

    first = ask(0, 1, 2)
    assert sorted(first) == [0, 1, 2]
    assert ask(0, 2, -1) == [first[0], first[2], -1]
    assert ask(3) == [first[1]]  # evicts the least recently used page
    assert ask(0, 2, 3) == [first[0], first[2], first[1]]
    assert ask(1) == [first[0]]
    assert (pool.counts.hits, pool.counts.misses) == (5, 5)
    with pytest.raises(TooManySlots, match="device_memory: the tasks of one batch take"):
        ask(0, 1, 2, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_more_tasks_than_there_is_room_for_passes_in_parts(name: str) -> None:
    whole = make_slm(name)
    tasks = some_tasks(whole)
    whole._set(tasks)
    paged = with_room(name, 2, tasks)
    rows = texts(30)
    names = random.Random(0).choices(NAMES, k=len(rows))
    for options in ({}, {"task": names}, {"distance": True}, {"abstain": 0.5}):
        here, there = (slm.predict(rows, max_new_tokens=3, **options) for slm in (paged, whole))
        assert [(a.task, a.label, a.text) for a in here] == [(a.task, a.label, a.text) for a in there]
        assert [a.route.tasks for a in here] == [a.route.tasks for a in there]
        if name == "bert":  # generators compute routes in smaller batches, so theirs may differ in the last bits
            assert [a.route for a in here] == [a.route for a in there]
        for one, other in zip(here, there, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.distance == (None if other.distance is None else pytest.approx(other.distance, abs=1e-5))


def test_a_batch_in_parts_reads_each_slot_once_and_passes_the_lower_layers_once() -> None:
    paged = with_room("bert", 3, some_tasks(make_slm("bert")))
    passed: list[int] = []
    for i, layer in enumerate(paged.model.backbone.layers):
        layer.register_forward_hook(lambda *_, i=i: passed.append(i))
    rows = [text for text in texts(60) if 4 < len(text.split()) < 12]
    first = paged.predict(rows)
    used = {task for answer in first for task in answer.route.tasks}
    counts, lower = paged.model.pool.counts, range(paged.model.config.first_layer)
    assert [passed.count(i) for i in lower] == [1] * len(lower)
    assert passed.count(lower.stop) > 2
    assert len(used) > 6
    hits, misses = counts.hits, counts.misses
    paged.predict(rows)  # values that are still present are used before they are evicted
    assert counts.hits > 2 * hits
    assert counts.misses - misses < misses


def test_rows_in_parts_are_all_there_once_with_no_more_slots_than_there_is_room_for() -> None:
    pool = with_room("bert", 4, some_tasks(make_slm("bert"))).model.pool
    draw = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(pool.slots, generator=draw)[:2] for _ in range(50)])
    ids[3], ids[7, 1] = -1, -1
    held = pool.rows(Route(torch.tensor([[2, 5]]), torch.ones(1, 2)))
    assert (held.slot_ids >= 0).all()
    parts = pool.parts(Route(ids, torch.ones(50, 2)))
    assert sorted(row for part in parts for row in part) == list(range(50))
    for part in parts:
        assert len(set(ids[part].flatten().tolist()) - {-1}) <= 4
    ready = [row for row in range(50) if set(ids[row].tolist()) <= {-1, 2, 5}]
    assert set(ready) <= set(parts[0])
    assert len(parts) < 50


def test_room_for_less_than_one_row_is_refused_with_the_least_that_works() -> None:
    slm = make_slm("bert")
    tasks, one = some_tasks(slm), slot_bytes(slm)
    slm.model._device_memory = 2 * one - 1
    with pytest.raises(InputError, match=rf"device_memory: expected at least {2 * one} bytes, .* got {2 * one - 1}"):
        slm._set(tasks)


def test_tasks_that_come_and_go_leave_what_a_fresh_model_has() -> None:
    whole = make_slm("bert")
    tasks = some_tasks(whole)
    whole._set(tasks[:-1])
    paged = with_room("bert", 4, tasks[1:])
    rows = texts(20)
    paged.predict(rows)
    pool = paged.model.pool
    paged.add(tasks[0])
    paged.forget(tasks[-1].name)
    assert paged.model.pool._pages is pool._pages  # present pages are kept
    assert_same(paged.predict(rows, batch_size=2), whole.predict(rows, batch_size=2))
    for slm in (paged, whole):
        slm.add(random_task(whole, "wide", rank=8))  # the buffers are rebuilt with half as many rows
    assert paged.model.known.most_rows == 1
    assert_same(paged.predict(rows, batch_size=1), whole.predict(rows, batch_size=1))
    whole.add(random_task(whole, "wider", rank=16))
    with pytest.warns(SlmWarning, match="device_memory: the slots of one row take"):
        paged.add(random_task(whole, "wider", rank=16))
    assert paged.model.known.most_rows == 1
    assert_same(paged.predict(rows, batch_size=1), whole.predict(rows, batch_size=1))
    with pytest.raises(InputError, match="the pool has it already"):
        paged.model.pool.with_task(tasks[0])
    with pytest.raises(InputError, match="the pool does not have it"):
        paged.model.pool.without("nobody")


def test_a_pool_that_outgrows_its_room_is_paged_until_its_tasks_take_half_of_it() -> None:
    whole = make_slm("bert")
    tasks = some_tasks(whole)
    grown = with_room("bert", 5, tasks[:2])
    assert type(grown.model.pool) is Pool
    for task in tasks[2:]:
        grown.add(task)
    assert isinstance(grown.model.pool, PagedPool)
    whole._set(tasks)
    assert_same(grown.predict(texts(12), batch_size=2), whole.predict(texts(12), batch_size=2))
    for task in tasks[3:]:
        grown.forget(task.name)
    assert isinstance(grown.model.pool, PagedPool)
    grown.forget(tasks[2].name)
    assert type(grown.model.pool) is Pool
    whole._set(tasks[:2])
    assert_same(grown.predict(texts(12), batch_size=2), whole.predict(texts(12), batch_size=2))


def test_an_imported_task_wider_than_the_room_gets_it_with_a_warning() -> None:
    whole = make_slm("bert")
    tasks = some_tasks(whole, rank=8)
    paged = with_room("bert", 4, tasks, rank=8)
    wide = replace(random_task(whole, "wide", topic="sky", rank=64), adapter=Adapter(pooling="mean"))
    with pytest.warns(SlmWarning, match="device_memory: the slots of one row take .* more than the .* given"):
        paged.add(wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlmWarning)  # told once
        paged.forget("sea0")
        paged.add(tasks[[task.name for task in tasks].index("sea0")])
    whole._set([*tasks, wide])
    rows = [sentence("sky", random.Random(i)) for i in range(4)] + texts(4)
    answers = paged.predict(rows, batch_size=1)
    assert "wide" in {answer.task for answer in answers}
    assert_same(answers, whole.predict(rows, batch_size=1))


def test_joint_learning_needs_all_values() -> None:
    slm = make_slm("bert")
    paged = with_room("bert", 3, some_tasks(slm))
    with pytest.raises(InputError, match="joint: trains over the values of all tasks, which do not fit device_memory"):
        paged.learn(easy("more"), joint=True)
    paged.learn(easy("more"), epochs=1, rank=4)
    assert "more" in paged.tasks


@pytest.fixture
def stored(tmp_path: Path, request: pytest.FixtureRequest) -> ScalableLM:
    """A model whose tasks are saved in a store with `.keys`, so that opening the store reads no values."""
    name = getattr(request, "param", "bert")
    slm = make_slm(name)
    slm.save_pretrained(tmp_path / "store")
    slm.add(some_tasks(slm))
    reopened(tmp_path / "store", name)
    return slm


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 30}, {"beams": 2}], ids=str)
@pytest.mark.parametrize("stored", FAMILIES, indirect=True)
def test_rows_of_a_task_whose_file_is_damaged_are_errors_and_the_rest_go_on(
    stored: ScalableLM, tmp_path: Path, request: pytest.FixtureRequest, options: dict
) -> None:
    name, rows = request.node.callspec.params["stored"], texts(30)
    options = options if name == "bert" else options | {"max_new_tokens": 4}
    good = stored.predict(rows, **(options | {"batch_size": 2}))
    gone = good[0].task
    assert gone is not None
    file = damage_values(stored, gone)
    paged = reopened(tmp_path / "store", name, device_memory=4 * slot_bytes(stored))
    found = answered(paged, rows, tmp_path, **options)
    for answer, record in zip(good, found, strict=True):
        if gone in answer.route.tasks:
            assert record["error"].startswith(f"task {gone!r}: {file}: damaged: SHA-256")
        else:
            same = {"task": answer.task, "label": answer.label, "text": answer.text}
            assert {key: record.get(key) for key in same} == same
    assert 0 < sum("error" in record for record in found) < len(rows)
    [line] = Store.open(tmp_path / "store").verify()
    assert str(file) in line
    with pytest.raises(WorkError, match=f"row 1: task {gone!r}: {file}: damaged"):
        paged.predict(rows, **options)
    with pytest.raises(WorkError, match=f"{file}: damaged"):  # if all values fit, opening reads them
        reopened(tmp_path / "store", name)


def answered(slm: ScalableLM, rows: Sequence[str], folder: Path, **options: int) -> list[dict]:
    """The records that `predict_file` writes for these texts."""
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    slm.predict_file(folder / "in.jsonl", folder / "out.jsonl", **options)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_opening_reads_no_values_that_it_has_no_room_for(stored: ScalableLM, tmp_path: Path) -> None:
    files = {file: file.read_bytes() for file in (tmp_path / "store" / "tasks").rglob("*.safetensors")}
    for file, data in files.items():
        file.write_bytes(bytes(len(data)))
    paged = reopened(tmp_path / "store", device_memory=4 * slot_bytes(stored))
    rows = texts(30)
    with pytest.raises(WorkError, match="damaged: SHA-256"):
        paged.predict(rows)
    for file, data in files.items():
        file.write_bytes(data)
    assert_same(paged.predict(rows, batch_size=2), stored.predict(rows, batch_size=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_files", [False, True])
def test_a_slot_is_written_as_whole_tasks_are(
    stored: ScalableLM, tmp_path: Path, dtype: torch.dtype, from_files: bool
) -> None:
    if from_files:
        tasks = list(reopened(tmp_path / "store").model.pool.tasks)
        assert all(isinstance(task.values, MappedValues) for task in tasks)
    else:
        wide, odd = random_task(stored, "wide", rank=11), random_task(stored, "odd", slots=2, rank=3)
        (module, (lora_a, lora_b)), *rest = odd.values.items()
        own = {module: (lora_a[:, :2], lora_b[:, :2])} | dict(rest[1:])  # another rank there, and none in the next
        tasks = [wide, odd, replace(odd, name="own", values=own)]
    at_once, one_by_one = (Buffers(tasks, 64, torch.device("cpu"), dtype) for _ in range(2))
    page = at_once.page
    for half in (half for buffers in (at_once, one_by_one) for pair in buffers.values.values() for half in pair):
        half.fill_(torch.nan)
    counts = [rows_of(task, page) for task in tasks]
    rows = [list(range(end - count, end)) for end, count in zip(accumulate(counts), counts, strict=True)]
    assert len(at_once.write(tasks, rows)) == len(tasks)
    for task, own_rows in zip(tasks, rows, strict=True):
        size = len(own_rows) // task.slots
        for slot in range(task.slots):
            slots_rows = own_rows[slot * size : (slot + 1) * size]
            one_by_one.write_slot(task, slot, slots_rows)
            for module, pair in at_once.values.items():
                given = task.values.get(module, [torch.zeros(task.slots, 0, half.shape[2]) for half in pair])
                for which, half in enumerate(pair):
                    expected = torch.zeros(size * page, half.shape[2], dtype=dtype)
                    expected[: given[which].shape[1]] = given[which][slot]
                    for buffers in (at_once, one_by_one):
                        assert torch.equal(buffers.values[module][which][slots_rows].flatten(0, 1), expected)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
@pytest.mark.parametrize("slots", [None, 4])
def test_files_whose_values_were_copied_take_no_memory(stored: ScalableLM, tmp_path: Path, slots: int | None) -> None:
    here = reopened(tmp_path / "store", device_memory=slots and slots * slot_bytes(stored))
    rows = texts(30)
    assert_same(here.predict(rows, batch_size=2), stored.predict(rows, batch_size=2))
    assert mapped(tmp_path / "store" / "tasks") == 0
    for one, other in zip(here.model.pool.tasks, stored.model.pool.tasks, strict=True):  # mapped again
        assert all(all(map(torch.equal, pair, other.values[module])) for module, pair in one.values.items())
    assert mapped(tmp_path / "store" / "tasks") > 0


def mapped(folder: Path) -> int:
    """KiB of the files of a folder that this process has mapped and in memory."""
    found, counts = 0, False
    for line in SMAPS.read_text().splitlines():
        if line[0] in "0123456789abcdef":
            counts = str(folder) in line
        elif counts and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


SIZES = [("2GB", 2 << 30), ("1.5 MiB", 3 << 19), ("700", 700), (12, 12), ("3k", 3072)]


@pytest.mark.parametrize(("given", "found"), SIZES)
def test_sizes_are_read_as_people_write_them(given: object, found: int) -> None:
    assert bytes_of(given, "device_memory") == found


@pytest.mark.parametrize("given", ["", "two", "-1", 0, -5, 1.5, True, "1PB", "GB"])
def test_what_is_no_size_is_refused(given: object, tmp_path: Path) -> None:
    make_slm("bert").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"device_memory: expected a number of bytes or a size such as '2GB', got "):
        reopened(tmp_path, device_memory=given)
