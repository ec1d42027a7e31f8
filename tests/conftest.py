"""What every operator test shares: it runs once for each backend that serves its operator on each device present."""

from __future__ import annotations

import os

import pytest
import torch

from slm_fast import ops

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` in tests/ops/test_<operator>.py: a device, with one backend of that operator insisted on."""
    if "device" in metafunc.fixturenames:
        stem = metafunc.module.__name__.rpartition("test_")[2]
        runs = [(b.name, device) for device in DEVICES for b in ops.backends(device) if stem in b.operators]
        metafunc.parametrize("device", runs, ids=["-".join(run) for run in runs], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest):
    backend, device = request.param
    with ops.use_backend(backend):
        yield device


@pytest.fixture
def nan_memory():
    """Uninitialised memory reads as NaN, so an element that a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
