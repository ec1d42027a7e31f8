"""In every operator test, memory that nobody has written reads as NaN, or as an id that no slot has, so that an element
which a kernel forgets to write, or reads too early, cannot pass. test_poison.py shows that it does, in each backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slm_fast.ops import dispatch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what it allocates
    if dispatch.NATIVE_MISSING is None:
        from slm_fast import _C

        _C.poison_memory(True)
    if dispatch.TRITON_MISSING is None and dispatch.INTERPRETED:
        poison_masked_loads(monkeypatch)
    yield
    torch.use_deterministic_algorithms(False)
    if dispatch.NATIVE_MISSING is None:
        _C.poison_memory(False)


def poison_masked_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mask leaves out of a load is undefined on a GPU; Triton's interpreter makes it zero."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    load = InterpreterBuilder.create_masked_load

    def poisoned(builder, ptrs, mask, other, *options):
        if other is None:
            of = ptrs.get_element_ty()
            dtype = _get_np_dtype(of)
            numbers = np.resize(np.array([0xFF, 0x7F], np.uint8), ptrs.data.size * dtype.itemsize).view(dtype)
            other = TensorHandle(numbers.reshape(ptrs.data.shape), of)
        return load(builder, ptrs, mask, other, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", poisoned)
