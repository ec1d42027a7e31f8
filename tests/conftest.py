"""What every operator test shares: it runs once for each backend that serves its operator on each device present."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
if not torch.cuda.is_available():
    # Triton's kernels run as NumPy on CPU tensors. Read when they are defined, so it stands before the package.
    os.environ["TRITON_INTERPRET"] = "1"

from slm_fast import ops

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` in tests/ops/test_<operator>.py: a device, with one backend of that operator insisted on."""
    if "device" in metafunc.fixturenames:
        stem = metafunc.module.__name__.rpartition("test_")[2]
        runs = [(b.name, device) for device in DEVICES for b in ops.backends(device) if stem in b.operators]
        # A backend that serves only some sizes runs in turns with those that serve the rest, as it does for users.
        some = [d for d in DEVICES if any(f"{stem}:" in "".join(b.operators) for b in ops.backends(d))]
        runs += [("preferred", device) for device in some]
        metafunc.parametrize("device", runs, ids=["-".join(run) for run in runs], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter takes a thousand times as long as a GPU: of a test with many cases it runs every fifth, or
    all with SLM_FAST_INTERPRET_ALL=1."""
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


@pytest.fixture
def device(request: pytest.FixtureRequest):
    backend, device = request.param
    with nullcontext() if backend == "preferred" else ops.use_backend(backend):
        yield device


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> bool:
    """Whether this run is Triton's on a CPU, a thousand times as slow."""
    return "[triton-cpu" in request.node.nodeid


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models made in this process have 64 random features rather than 2,048, whose statistics cost a task seconds."""
    monkeypatch.setattr("slm_fast.configure.MAX_FEATURES", 64)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the store whose URL is `shelf.URL`; a cache that is this test's alone."""
    from shelf import put_up

    return put_up(tmp_path, monkeypatch)


@pytest.fixture
def cache(shelf: Path) -> Path:
    """The folder that this store is brought into."""
    from shelf import URL

    from slm_fast.remote_store import cache_of

    return cache_of(URL)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """An interrupt ends this process and those it starts, though shells have what runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
