"""`slm-fast predict --ray` writes the same bytes as a single process, even if an actor or the driver dies."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow.parquet
import pytest
import ray

from slm_fast import InputError, ScalableLM, WorkError, __version__, windows
from slm_fast.data import Row
from slm_fast.errors import SlmWarning
from slm_fast.integrations import ray_pool
from slm_fast.integrations.ray_cluster import Opening, Shares, check_alike
from slm_fast.integrations.ray_pool import StorePool
from slm_fast.options import PredictOptions
from slm_fast.predict_file import FileAnswered
from tests.command import one_line, slm_fast
from tests.integrations.conftest import PACKAGE
from tests.models import one_thread, sentence  # noqa: F401
from tests.rays import actors
from tests.served import until

WINDOW, ROWS = 64, 3000  # in rows: 47 windows


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", WINDOW)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of texts of many lengths, with and without IDs; one line in 500 is not JSON."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("rows") / "in.jsonl"
    texts = [sentence(rng.choice(("sea", "farm")), rng, words=rng.randint(1, 20)) for _ in range(ROWS)]
    lines = [json.dumps({"id": f"r{i}", "text": text} if i % 3 else text) for i, text in enumerate(texts)]
    path.write_text("".join("not json\n" if i % 500 == 7 else f"{line}\n" for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def pool(cluster: str, store: Path) -> Iterator[StorePool]:
    with StorePool(store, actors=2, threads=2) as pool:
        yield pool


def lines(path: Path) -> list[dict]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


@pytest.mark.parametrize(
    ("suffix", "more", "rows"),
    [
        (".jsonl", {}, range(ROWS)),
        (".jsonl.gz", {"shard": (2, 3), "top_k": None, "distance": True}, range(15 * WINDOW, 31 * WINDOW)),
        (".parquet", {"task": "sea"}, range(ROWS)),
    ],
)
def test_two_actors_write_the_bytes_of_one_process(
    pool: StorePool, store: Path, source: Path, tmp_path: Path, suffix: str, more: dict, rows: range
) -> None:
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    options = PredictOptions(**{name: more.pop(name) for name in ("top_k", "distance") if name in more})
    done = [ScalableLM.from_pretrained(store).predict_file(source, one, options, **more)]
    done.append(pool.predict_file(source, two, options, **more))
    assert two.read_bytes() == one.read_bytes()
    bad = sum(row % 500 == 7 for row in rows)
    assert done == [FileAnswered(0, len(rows), bad, done[0].first_error)] * 2
    assert (done[0].first_error or "").startswith(f"{source}: id ") == bool(bad)
    found = pyarrow.parquet.read_table(two).to_pylist() if suffix == ".parquet" else lines(two)
    assert [len(found), sum(row.get("error") is not None for row in found)] == [len(rows), bad]


def test_actors_of_a_store_at_a_url_go_on_with_what_one_process_has_begun(
    cluster: str, store: Path, source: Path, tmp_path: Path
) -> None:
    output, url = tmp_path / "out.jsonl", f"file://{store}"
    ScalableLM.from_pretrained(url).predict_file(source, output)
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[: ROWS // 2]))
    with StorePool(url, actors=1, threads=1) as pool:
        done = pool.predict_file(source, output)
    assert 0 < done.before < ROWS == done.before + done.answered
    assert output.read_bytes() == whole


def test_a_bad_row_ends_a_strict_run_where_it_ends_that_of_one_process(
    pool: StorePool, store: Path, source: Path, tmp_path: Path
) -> None:
    said = []
    for name, by in (("one", ScalableLM.from_pretrained(store)), ("two", pool)):
        with pytest.raises(WorkError, match="id 8: ") as caught:
            by.predict_file(source, tmp_path / f"{name}.jsonl", strict=True)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_what_a_program_writes_to_a_pipe_is_answered_as_soon_as_it_pauses(pool: StorePool) -> None:
    reading, writing = os.pipe()
    sink = io.StringIO()
    with os.fdopen(reading, "rb") as source:
        work = threading.Thread(target=pool.predict_file, args=(source, sink))
        work.start()
        for i in range(1, 4):
            os.write(writing, b'"sea1 sea2"\n')
            until(lambda i=i: len(sink.getvalue().splitlines()) == i)
        os.close(writing)
        work.join(60)
    assert {json.loads(line)["task"] for line in sink.getvalue().splitlines()} == {"sea"}


def test_the_windows_of_an_actor_that_is_killed_are_answered_again(
    pool: StorePool, store: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    ScalableLM.from_pretrained(store).predict_file(source, one)
    before = actors("StoreActor")

    def kill() -> None:
        until(two.exists)
        os.kill(before[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert pool.predict_file(source, two).answered == ROWS
    killer.join()
    assert before[0] not in actors("StoreActor")
    assert two.read_bytes() == one.read_bytes()


def test_what_a_killed_command_has_begun_is_gone_on_with(
    cluster: str, pool: StorePool, store: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    call = ["predict", store, "--input", source, "--dtype", "float32"]
    one_line(slm_fast(*call, "--output", one), 1, "6 rows failed; each is marked")
    code = f"from slm_fast import cli, windows; windows.WINDOW = {WINDOW}; cli.main({list(map(str, call))!r} + "
    code += f"['--output', {str(two)!r}, '--ray', {cluster!r}, '--actors', '1', '--threads', '1'])"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PACKAGE)}) as driver:
        until(lambda: two.exists() and two.stat().st_size, 120)
        driver.kill()
    assert 0 < two.stat().st_size < one.stat().st_size
    done = pool.predict_file(source, two)
    assert (done.before + done.answered, done.failed) == (ROWS, 6)
    assert done.before
    assert two.read_bytes() == one.read_bytes()


def test_a_store_that_changed_is_told_from_the_one_that_the_call_began_with(
    pool: StorePool, store: Path, tmp_path: Path, source: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(store, kept)
    by = pool.answering(PredictOptions())
    ScalableLM.from_pretrained(store).forget("farm")
    try:
        os.kill(actors("StoreActor")[0], signal.SIGKILL)
        with pytest.raises(WorkError, match="an actor has other tasks: the store was changed meanwhile"):
            list(by.answer(windows.windows_of([Row("sea1")] * 4 * WINDOW, None), lambda _: None))
    finally:
        shutil.rmtree(store)
        shutil.copytree(kept, store)


# Errors


def test_an_actor_that_dies_again_and_again_ends_the_call(cluster: str, store: Path, source: Path, monkeypatch) -> None:
    class Dies:  # a local class: Ray pickles it by value
        def __init__(self, opening) -> None:
            pass

        def version(self) -> str:
            return __version__

        def about(self) -> dict:
            return {"tasks": ["sea"], "kind": "encoder", "in_store": False, "warnings": []}

        def decides(self, options) -> dict:
            return {}

        def answer(self, window, options) -> None:
            os._exit(1)

    monkeypatch.setattr(ray_pool, "StoreActor", Dies)
    monkeypatch.setattr(ray_pool, "TRIES", 2)
    with StorePool(store, actors=1, threads=1) as pool, pytest.raises(WorkError) as caught:
        pool.predict_file(source, io.StringIO())
    assert str(caught.value).startswith("rows 1 to 64: their actor died, 2 times: ")
    assert "\n" not in str(caught.value)


def test_workers_without_the_package_are_told_of_in_one_line(cluster: str, store: Path, monkeypatch) -> None:
    here = ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", here)
    exec("class Lacking:\n    def __init__(self, opening): pass\n    def version(self): pass", vars(here))
    here.Lacking.__module__ = "only_here"
    monkeypatch.setattr(ray_pool, "StoreActor", here.Lacking)
    with pytest.raises(WorkError) as caught, StorePool(store, actors=1, threads=1):
        pass
    said = (
        f"Ray: its workers cannot import slm_fast {__version__}; install it on all nodes: ModuleNotFoundError: No mod"
    )
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_worker_that_is_late_is_told_of_and_another_version_refused(cluster: str, store: Path, monkeypatch) -> None:
    class Older:
        def __init__(self, opening) -> None:
            pass

        def version(self) -> str:
            return "0.0"

    monkeypatch.setattr(ray_pool, "StoreActor", Older)
    monkeypatch.setattr(ray_pool, "START", 0.0)
    with (
        pytest.warns(SlmWarning, match="1 of 1 actors do not run yet"),
        pytest.raises(WorkError, match=f"worker: is slm_fast 0.0, this is {__version__}"),
        StorePool(store, actors=1, threads=1),
    ):
        pass


def test_a_store_that_a_worker_does_not_see_is_told_of_with_its_node(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/nowhere: is not on node .*; each worker must see it under this path"):
        Opening.of(tmp_path / "nowhere").open()
    with pytest.raises(InputError, match="nowhere"):
        Opening.of(tmp_path, backbone=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (("--ray", "127.0.0.1:{port}"), 1, "Ray '127.0.0.1:{port}': cannot be reached: [Errno 111] Connection refused"),
        (("--ray", "nowhere"), 1, "Ray 'nowhere': cannot be reached: "),
        (("--actors", "2"), 2, "--actors: goes with --ray"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    store: Path, source: Path, tmp_path: Path, more: tuple, status: int, said: str, monkeypatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    call = ["predict", store, "--input", source, "--output", tmp_path / "out.jsonl"]
    one_line(slm_fast(*call, *(word.format(port=port) for word in more)), status, said.format(port=port))
    assert not (tmp_path / "out.jsonl").exists()


def test_without_ray_its_extra_is_named(store: Path, source: Path, monkeypatch) -> None:
    monkeypatch.setattr("slm_fast.cli.arguments.find_spec", lambda name: None)
    one_line(slm_fast("predict", store, "--input", source, "--ray", "local"), 2, "pip install 'slm-fast[ray]'")


def test_processors_are_shared_out_so_that_an_actor_fits_on_a_node(monkeypatch) -> None:
    def nodes(*resources: dict) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in resources])

    nodes({"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}, {"memory": 1.0})
    assert Shares.of() == Shares(3, 4)
    assert Shares.of(4) == Shares(4, 2)
    assert Shares.of(4, threads=4) == Shares(4, 1)
    assert Shares.of(12) == Shares(12, 1)
    with pytest.raises(InputError, match="--actors: expected at most what the cluster has, 12 processors, got 13"):
        Shares.of(13)
    for less in ({"actors": 0}, {"threads": 0}):
        with pytest.raises(InputError, match="expected at least 1, got 0"):
            Shares.of(**less)
    nodes({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0})
    assert Shares.of() == Shares(2, 8, 1)
    assert Shares.of(device="cpu") == Shares(2, 8)
    with pytest.raises(InputError, match="2 GPUs, got 3"):
        Shares.of(3)


def test_models_that_are_not_alike_are_told_apart() -> None:
    with pytest.raises(WorkError, match=r"an actor has dtype 'bfloat16', the first one 'float32'"):
        check_alike({"dtype": "bfloat16"}, {"dtype": "float32"})
