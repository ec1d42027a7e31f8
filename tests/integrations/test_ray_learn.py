"""`slm-fast learn --ray` makes the same store as a single process, even if an actor dies."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slm_fast import __version__
from slm_fast.integrations import ray_learn
from slm_fast.store import Store
from tests.command import one_line, slm_fast
from tests.models import one_thread, tasks_as_files  # noqa: F401
from tests.rays import actors
from tests.served import until
from tests.stores import tree

NAMES = ("farm", "sea", "sky", "city")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, one CSV file per task, and `one`, the store that a single process learned from them."""
    folder = tmp_path_factory.mktemp("learn")
    tasks_as_files(folder, NAMES)
    done = slm_fast(*call(folder, "one"))
    assert done.returncode == 0, done.stderr
    return folder


def call(folder: Path, store: str, *more: object) -> list[str]:
    files = [f"--task={name}={folder / f'{name}.csv'}" for name in NAMES]
    options = ["--backbone", folder / "bert", "--epochs", 2, "--threads", 2, "--features", 64]
    return list(map(str, ["learn", folder / store, *options, *files, *more]))


def test_actors_learn_what_one_process_does_though_one_is_killed(cluster: str, folder: Path) -> None:
    def kill() -> None:
        until(lambda: Store.exists(folder / "two") and Store.open(folder / "two").files, 120)
        os.kill(actors("LearnActor")[0], signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill)
        done = slm_fast(*call(folder, "two", "--jobs", 2, "--ray", "local"))
        killer.result()
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("learned ") for line in done.stderr.splitlines()) == len(NAMES)
    assert tree(folder / "two") == tree(folder / "one")
    until(lambda: not actors("LearnActor"))


@pytest.mark.parametrize("how", ["died", "failed"])
def test_a_task_whose_actor_always_ends_is_named_and_the_others_land(
    how: str, cluster: str, folder: Path, monkeypatch
) -> None:
    one = Store.open(folder / "one")
    ready = {"ready": one.about, "version": __version__}
    found = {name: one.file(name).read_bytes() for name in NAMES}

    class Quick:  # a local class: Ray pickles it by value
        def ask(self, message: dict, data: bytes) -> tuple[dict, bytes, list[str]]:
            if "task" not in message:
                return ready, b"", []
            name = message["task"]["name"]
            if name == "sky" and how == "failed":
                raise RuntimeError("CUDA error: an illegal memory access\nmore lines")
            return {"learned": name}, found[name] if name != "sky" else os._exit(1), []

    monkeypatch.setattr(ray_learn, "LearnActor", Quick)
    done = slm_fast(*call(folder, how, "--jobs", 2, "--ray", "local"))
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if "sky" in line]
    assert [line.partition(" (")[0] for line in said] == [
        f"slm-fast: warning: task 'sky': its worker {how}",
        f"slm-fast: warning: task 'sky': its worker {how}",
        f"slm-fast: error: task 'sky': not learned: its worker {how}",
    ]
    if how == "failed":
        assert "its worker failed (RuntimeError: CUDA error: an illegal memory access); it is" in said[0]
    assert Store.open(folder / how).files == {name: digest for name, digest in one.files.items() if name != "sky"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ray", "local", "--joint"), "--ray: does not go with --joint"),
        (("--ray", "local", "--jobs", 2, "--warm-start"), "--jobs: does not go with --warm-start without a TASK"),
        (("--ray", "local", "--jobs", 9), "--jobs: expected at most what the cluster has, 3 processors, got 4"),
    ],
)
def test_what_ray_does_not_go_with_is_said_before_anything_is_learned(
    cluster: str, folder: Path, monkeypatch, more: tuple, said: str
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 3.0}}])
    one_line(slm_fast(*call(folder, "bad", *more)), 2, said)
    assert not (folder / "bad").exists()


def test_without_ray_its_extra_is_named(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("slm_fast.cli.arguments.find_spec", lambda name: None)
    one_line(slm_fast(*call(folder, "bad", "--ray", "local")), 2, "pip install 'slm-fast[ray]'")
