"""Shared fixtures. Each operator test runs once per available device and per backend that supports its operator."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never access the network
if not torch.cuda.is_available():
    # Runs Triton kernels on CPU tensors in NumPy. Read when kernels are defined, so set before importing the package.
    os.environ["TRITON_INTERPRET"] = "1"

from slm_fast import ops

gc.disable()  # until the test modules are imported: collections would take as long as the imports themselves
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `device` in tests/ops/test_<operator>.py over devices and the backends of that operator."""
    if "device" in metafunc.fixturenames:
        stem = metafunc.module.__name__.rpartition("test_")[2]
        runs = [(b.name, device) for device in DEVICES for b in ops.backends(device) if stem in b.operators]
        # If a backend supports only some sizes, also run without a forced backend, which chooses one by size.
        some = [d for d in DEVICES if any(f"{stem}:" in "".join(b.operators) for b in ops.backends(d))]
        runs += [("preferred", device) for device in some]
        metafunc.parametrize("device", runs, ids=["-".join(run) for run in runs], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In Triton's interpreter, a thousand times slower than a GPU, run only every fifth case of tests with more than
    15. SLM_FAST_INTERPRET_ALL=1 runs all."""
    if os.environ.get("SLM_FAST_INTERPRET_ALL") == "1":
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "[triton-cpu" in item.nodeid:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for many in cases.values() if len(many) > 15 for i, item in enumerate(many) if i % 5}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Exclude what was imported from garbage collections, which would look at a million objects each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def device(request: pytest.FixtureRequest):
    backend, device = request.param
    with nullcontext() if backend == "preferred" else ops.use_backend(backend):
        yield device


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> bool:
    """Whether this test runs in Triton's interpreter on a CPU, which is a thousand times slower than a GPU."""
    return "[triton-cpu" in request.node.nodeid


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the default to 64 random features: the statistics of 2,048 take seconds per task."""
    monkeypatch.setattr("slm_fast.configure.MAX_FEATURES", 64)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind the store URL `shelf.URL`. The test gets its own cache."""
    from shelf import put_up

    return put_up(tmp_path, monkeypatch)


@pytest.fixture
def cache(shelf: Path) -> Path:
    """The cache folder that the store at `shelf.URL` is downloaded to."""
    from shelf import URL

    from slm_fast.remote_store import cache_of

    return cache_of(URL)


@pytest.fixture(scope="session")
def all_keyed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from keyed_stores import keyed_store

    return keyed_store(tmp_path_factory.mktemp("keyed") / "store")


@pytest.fixture
def keyed(all_keyed: Path, tmp_path: Path) -> Path:
    """A store of three tasks whose `.keys` is complete."""
    shutil.copytree(all_keyed, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def keyed_in_memory(all_keyed: Path) -> Iterator[Path]:
    """The same, on tmpfs if possible: for tests that repeat commits many times, where the disk does not matter."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        shutil.copytree(all_keyed, Path(folder) / "begin")
        yield Path(folder) / "begin"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle SIGINT in this process and its children, although shells make background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
