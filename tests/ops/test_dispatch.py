"""Backend selection: the preference table, and `use_backend`, which overrides it."""

from __future__ import annotations

import subprocess
import sys
from threading import Thread
from types import MappingProxyType

import pytest
import torch

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops import dispatch

REFERENCE = torch.ops.slm_fast.retrieve_reference


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch):
    """Operator of "probe", a new preferred backend with retrieve only; "absent", an unusable one, is also added."""
    library = torch.library.Library("slm_fast", "FRAGMENT")
    library.define("retrieve_probe() -> ()")
    absent = ops.Backend("absent", ("retrieve", "key_loss"), lambda: "no compiler was found")
    table = (*dispatch.BACKENDS, ops.Backend("probe", ("retrieve",)), absent)
    monkeypatch.setattr(dispatch, "BACKENDS", table)
    monkeypatch.setattr(dispatch, "PREFERENCE", MappingProxyType({"cpu": ("absent", "probe", "reference")}))
    yield torch.ops.slm_fast.retrieve_probe
    library._destroy()


def test_the_first_usable_backend_that_serves_the_operator_runs_it(probe):
    assert dispatch.operator("retrieve", "cpu") is probe
    assert dispatch.operator("key_loss", "cpu") is torch.ops.slm_fast.key_loss_reference


def test_the_list_of_backends_says_in_short_which_are_available(probe):
    assert repr(ops.backends()[-2:]) == "(Backend('probe', available), Backend('absent', not available))"


def test_a_forced_backend_overrides_the_preference_in_all_threads(probe):
    seen = []
    with ops.use_backend("reference"):
        thread = Thread(target=lambda: seen.append(dispatch.operator("retrieve", "cpu")))
        thread.start()
        thread.join()
        assert dispatch.operator("retrieve", "cpu") is REFERENCE
    assert seen == [REFERENCE]
    assert dispatch.operator("retrieve", "cpu") is probe


def test_nested_blocks_restore_the_outer_backend(probe):
    with ops.use_backend("reference"):
        with ops.use_backend("probe"):
            assert dispatch.operator("retrieve", "cpu") is probe
        assert dispatch.operator("retrieve", "cpu") is REFERENCE


def test_an_exception_in_the_block_restores_the_preference(probe):
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert dispatch.operator("retrieve", "cpu") is probe


def test_an_unknown_or_unusable_backend_is_an_error_that_lists_those_present(probe):
    for name in ("nonesuch", "absent"):
        with pytest.raises(InputError, match=rf"^backend: '{name}' .*present: reference.*, probe$"):  # noqa: SIM117
            with ops.use_backend(name):
                pass
    assert dispatch.operator("retrieve", "cpu") is probe


def test_a_forced_backend_that_does_not_serve_the_operator_is_an_error_not_a_fallback(probe):
    with ops.use_backend("probe"), pytest.raises(InputError, match=r"^backend: 'probe' does not run key_loss on cpu$"):
        ops.key_loss(torch.ones(1, 2), torch.ones(1, 2), 1, groups=1, mask_prob=0.0, seed=0)


def test_a_device_without_a_backend_is_an_error_that_lists_the_devices_served():
    tensor = torch.ones(1, 2, device="meta")
    with pytest.raises(InputError, match=r"retrieve: no backend for device 'meta'; devices served: cpu, cuda"):
        ops.retrieve(tensor, tensor, 1)
    with pytest.raises(InputError, match=r"key_loss: no backend for device 'meta'; devices served: cpu, cuda"):
        ops.key_loss(tensor, tensor, 1, groups=1, mask_prob=0.0, seed=0)
    x, ids = torch.ones(1, 2, 3, device="meta"), torch.zeros(1, 1, dtype=torch.int64, device="meta")
    for rows in (x, x.double(), x[:, 0]):
        with pytest.raises(InputError, match=r"multi_lora: no backend for device 'meta'; devices served: cpu, cuda"):
            ops.multi_lora(rows, rows, rows, ids, ids.float())


def test_backends_of_a_device_are_those_usable_on_it_the_preferred_one_first(probe):
    assert [b.name for b in ops.backends("cpu")] == ["probe", "reference"]
    assert ops.backends("meta") == ()
    assert {"reference", "probe", "absent"} <= {b.name for b in ops.backends()}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_each_device_has_the_reference_and_every_backend_named_for_it_serves_it(device_type):
    usable = ops.backends(device_type)
    assert "reference" in [b.name for b in usable]
    assert all(b.available and device_type in b.devices for b in usable)
    assert set(dispatch.PREFERENCE[device_type]) <= {b.name for b in ops.backends()}


def test_a_measurement_for_triton_is_not_followed_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "MEASURED", {("cuda", "adapted_linear", "narrow"): ("triton", "reference")})
    for missing in (None, "triton is not installed"):
        monkeypatch.setattr(dispatch, "TRITON_MISSING", missing)
        assert dispatch.fused_wins("cuda", "narrow") == (missing is None)


WITHOUT_NATIVE = """
import os, sys, threading, warnings
sys.modules["slm_fast._C"] = None  # as if it were not built
import torch
import torch._dynamo
seen = []
warnings.showwarning = lambda message, category, *_: seen.append(f"{category.__name__}: {message}")
warnings.simplefilter("always")
import slm_fast
from slm_fast import ops
from slm_fast.ops import dispatch
query, keys = torch.ones(2, 4), torch.ones(3, 4)
with ops.use_backend("reference"):
    ops.retrieve(query, keys, 1)
assert seen == []  # nothing was called, or only what was asked for
for path in sys.argv[1:]:  # the first call of each, in a process where nothing was called yet
    if os.fork() == 0:
        exec(path)
        exec(path)
        ops.retrieve(query, keys, 1)
        [warning] = seen
        assert str(dispatch.NATIVE_MISSING) in warning
        print(warning, flush=True)
        os._exit(0)
    os.wait()
"""
PATHS = {
    "retrieve": "ops.retrieve(query, keys, 1)",
    "prepare_keys": "ops.prepare_keys(keys)",
    "key_loss": "ops.key_loss(query, keys, 1, groups=1, mask_prob=0.1, seed=0)",
    "multi_lora": "ops.multi_lora(torch.ones(1, 2, 3), torch.ones(1, 1, 3), torch.ones(1, 1, 3), *ops.Route("
    "torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)))",
    "compiled": "torch.compile(lambda q, k: ops.retrieve(q, k, 1), fullgraph=True, backend='eager')(query, keys)",
}


def test_without_the_native_operators_the_first_call_warns_once_with_cause_and_cost():
    command = [sys.executable, "-c", WITHOUT_NATIVE, *PATHS.values()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    said = run.stdout.splitlines()
    assert len(said) == len(PATHS)
    for warning in said:
        assert warning.startswith("RuntimeWarning: slm_fast: the C++ operators are not there (slm_fast._C did not load")
        assert warning.endswith("times slower; `slm-fast doctor` says more")
