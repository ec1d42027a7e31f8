"""Poisons unwritten memory in every operator test: it reads as NaN, or as an out-of-range slot ID, so a test fails if a
kernel forgets to write an element or reads it too early. test_poison.py checks this for each backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slm_fast.ops import dispatch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch fill the memory it allocates
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
    """Poison the masked-out elements of loads without `other`: undefined on a GPU, zero in Triton's interpreter."""
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
