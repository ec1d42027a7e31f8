"""Fuzz tests: killed processes, concurrent writers and readers of one store, threads and interrupts in one process.

A few of each in `make test`; 500 kills, two minutes of writers and readers, 200 calls, 40 interrupts in `make fuzz`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from effort import EARNEST, SEED, times
from models import (
    easy,
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    two_tasks,
)
from stores import ABOUT, A, B, finish, make_task, start, store_of

from slm_fast.store import Store


def changes(path: Path, source: Path, report: int, rng: random.Random) -> None:
    """Add, remove and merge tasks at random. Writes "+name" or "-name" to `report` before each change, "!" after it."""
    held = sorted(Store.open(path).files)
    for number in range(10_000):
        store = Store.open(path)
        how = rng.randrange(3)
        if how == 0 or not held:
            name = f"t{os.getpid()}-{number}"
            os.write(report, f"+{name} ".encode())
            store.commit(add=[replace(A, name=name)])
            held.append(name)
        elif how == 1:
            name = held.pop(rng.randrange(len(held)))
            os.write(report, f"-{name} ".encode())
            store.commit(remove=[name])
        else:
            name = f"m{os.getpid()}-{number}"
            other = Store(source / name, ABOUT, {})
            other.commit(add=[replace(B, name=name)])
            os.write(report, f"+{name} ".encode())
            store.merge([other])
            held.append(name)
        os.write(report, b"! ")


def test_a_process_killed_at_any_moment_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    rng = random.Random(f"kills {SEED}")
    path = tmp_path / "store"
    store_of(path, A)
    before = {"a"}
    for kill in range(times(20, 500)):
        seed = rng.random()
        reading, writing = os.pipe()
        work = partial(changes, path, tmp_path / "other", writing, random.Random(seed))
        pid, answer = start(work)
        os.close(writing)
        time.sleep(rng.uniform(0.002, 0.08))
        os.kill(pid, signal.SIGKILL)
        finish((pid, answer))
        with os.fdopen(reading) as pipe:
            told = pipe.read().split()
        sure, open_change = set(before), None
        for word in told:
            if word == "!":
                sure = sure | {open_change[1:]} if open_change[0] == "+" else sure - {open_change[1:]}
                open_change = None
            else:
                open_change = word
        store = Store.open(path)
        assert store.verify() == [], kill
        found = set(store.files)
        allowed = [sure]
        if open_change is not None:
            allowed.append(sure | {open_change[1:]} if open_change[0] == "+" else sure - {open_change[1:]})
        assert found in allowed, kill
        before = found


def test_writers_and_readers_beside_each_other_lose_nothing_and_raise_no_false_alarm(tmp_path: Path) -> None:
    path, seconds = tmp_path / "store", times(4, 120)
    store_of(path, A)

    def write(number: int) -> str:
        until, rng, held, n = time.monotonic() + seconds, random.Random(f"{SEED} {number}"), [], 0
        while time.monotonic() < until:
            store = Store.open(path)
            if held and rng.random() < 0.5:
                store.commit(remove=[held.pop(rng.randrange(len(held)))])
            else:
                n += 1
                name = f"w{number}-{n}"
                store.commit(add=[make_task(name)])
                held.append(name)
        return " ".join(sorted(held))

    def read(number: int) -> str:
        until, looks = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            looks += 1
            if number == 0:
                assert Store.open(path).verify() == []
            elif number == 1:
                names = [task.name for task in Store.open(path).load()]
                assert "a" in names
                assert names == sorted(names)
            else:
                copy = Store(tmp_path / f"copy{looks % 3}", ABOUT, {})
                copy.merge([Store.open(path)])
                assert "a" in copy.files
        return "looked" if looks else "starved"

    limit = 2 * seconds + 60
    writers = [start(partial(write, number), limit) for number in range(2)]
    readers = [start(partial(read, number), limit) for number in range(3)]
    for reader in readers:
        assert finish(reader) == (0, "done: looked")
    held = {"a"}
    for writer in writers:
        status, answer = finish(writer)
        assert (status, answer[:5]) == (0, "done:"), answer
        held |= set(answer[5:].split())
    assert set(Store.open(path).files) == held
    assert Store.open(path).verify() == []


def test_a_model_keeps_up_with_what_other_processes_do_to_its_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    slm.save_pretrained(path)
    spare = random_task(slm, "sky")

    def write() -> str:
        for number in range(times(10, 100)):
            store = Store.open(path)
            store.commit(add=[replace(spare, name=f"sky{number}")], remove=[f"sky{number - 3}"] if number >= 3 else [])
        return "wrote"

    writer = start(write, 120)
    for _ in range(times(10, 100)):
        slm.refresh()
        assert {"farm", "sea"} <= set(slm.tasks)
        assert slm.tasks == slm.model.router.names
    assert finish(writer) == (0, "done: wrote")
    slm.refresh()
    assert slm.tasks == sorted(Store.open(path).files)
    assert slm.predict(mixed()) == reopened(path).predict(mixed())


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_four_threads_of_one_model_are_answered_as_alone(backbone: str) -> None:
    slm = make_slm(backbone)
    knows(slm, *(random_task(slm, name) for name in ("farm", "sea")))
    batches = [mixed(each, seed) for each, seed in ((2, 1), (3, 2), (4, 3), (7, 4))]
    want = [slm.predict(batch, max_new_tokens=3) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(slm.predict, batches[i % 4], max_new_tokens=3) for i in range(times(40, 200))]
        assert [call.result() for call in calls] == [want[i % 4] for i in range(len(calls))]


def test_an_interrupt_at_any_moment_leaves_pool_and_router_of_the_same_tasks(tmp_path: Path) -> None:
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    slm.save_pretrained(tmp_path / "store")
    task, rng, hit = easy("sky", rows=16), random.Random(f"interrupts {SEED}"), 0
    want = slm.predict(mixed(), task="sea")
    assert threading.current_thread() is threading.main_thread()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(times(12, 40)):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.005, 0.4))
                    slm.learn(task, epochs=1, progress=False)
                    slm.forget("sky")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hit += 1
            assert slm.tasks == slm.model.router.names == slm.model.pool.names
            assert len(slm.model.router.task_of_slot) == slm.model.pool.slots
            assert slm.predict(mixed(), task="sea") == want
            slm.refresh()
            assert slm.tasks == sorted(Store.open(tmp_path / "store").files)
            if "sky" in slm.tasks:
                slm.forget("sky")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hit or not EARNEST
