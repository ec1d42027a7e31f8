"""Arguments that no operator takes: each is an InputError of one line that names it, on every backend."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from slm_fast import ops
from slm_fast.errors import InputError

ROWS = torch.ones(3, 8)
RETRIEVE = {"query": ROWS, "keys": torch.ones(4, 8), "k": 2}
KEY_LOSS = RETRIEVE | {"groups": 1, "mask_prob": 0.1, "seed": 3}
MULTI_LORA = {"x": torch.ones(3, 1, 8), "lora_a": torch.ones(4, 2, 8), "lora_b": torch.ones(4, 2, 6)}
MULTI_LORA |= {"slot_ids": torch.zeros(3, 2, dtype=torch.int64), "weights": torch.ones(3, 2)}
TENSOR, INTEGER, NUMBER = "a tensor", "an integer", "a number"
PREPARED, KEYS, MAYBE = ops.prepare_keys(ROWS), "a tensor or PreparedKeys", "a tensor or None"
WRONG = [
    (ops.retrieve, RETRIEVE, "query", [[1.0]], TENSOR, "list"),
    (ops.retrieve, RETRIEVE, "query", ROWS.numpy(), TENSOR, "ndarray"),
    (ops.retrieve, RETRIEVE, "keys", [[1.0]], KEYS, "list"),
    (ops.retrieve, RETRIEVE, "k", 2.0, INTEGER, "2.0"),
    (ops.retrieve, RETRIEVE, "k", None, INTEGER, "None"),
    (ops.retrieve, RETRIEVE, "k", "2", INTEGER, "'2'"),
    (ops.retrieve, RETRIEVE, "k", 2**63, "a 64-bit integer", "9223372036854775808"),
    (ops.retrieve, RETRIEVE, "groups", 1.0, INTEGER, "1.0"),
    (ops.retrieve, RETRIEVE, "temperature", "1", NUMBER, "'1'"),
    (ops.retrieve, RETRIEVE, "temperature", None, NUMBER, "None"),
    (ops.retrieve, RETRIEVE, "temperature", "1" * 999, NUMBER, "'111111111111...1111111111111'"),
    (ops.retrieve, RETRIEVE, "mask", [True], MAYBE, "list"),
    (ops.retrieve, RETRIEVE, "key_slot", [0], MAYBE, "list"),
    (ops.retrieve, RETRIEVE | {"metric": "dot"}, "bias", np.ones(4, np.float32), MAYBE, "ndarray"),
    (ops.key_loss, KEY_LOSS, "query", [1.0], TENSOR, "list"),
    (ops.key_loss, KEY_LOSS, "keys", ROWS.numpy(), TENSOR, "ndarray"),
    (ops.key_loss, KEY_LOSS, "keys", PREPARED, TENSOR, "PreparedKeys"),
    (ops.key_loss, KEY_LOSS, "k", None, INTEGER, "None"),
    (ops.key_loss, KEY_LOSS, "groups", 1.0, INTEGER, "1.0"),
    (ops.key_loss, KEY_LOSS, "mask_prob", "x", NUMBER, "'x'"),
    (ops.key_loss, KEY_LOSS, "seed", 1.5, INTEGER, "1.5"),
    (ops.key_loss, KEY_LOSS, "seed", None, INTEGER, "None"),
    *((ops.prepare_keys, {}, "keys", v, TENSOR, type(v).__name__) for v in ([1.0], ROWS.numpy(), PREPARED)),
    (ops.prepare_keys, {"keys": ROWS}, "groups", 1.0, INTEGER, "1.0"),
    (ops.prepare_keys, {"keys": ROWS}, "key_slot", [0], MAYBE, "list"),
    *((ops.multi_lora, MULTI_LORA, name, [1.0], TENSOR, "list") for name in MULTI_LORA),
    (ops.multi_lora, MULTI_LORA, "base", np.ones((3, 1, 6), np.float32), MAYBE, "ndarray"),
]


@pytest.fixture(params=[backend.name for backend in ops.backends("cpu")], autouse=True)
def _backend(request):
    with ops.use_backend(request.param):
        yield


@pytest.mark.parametrize(("function", "call", "name", "wrong", "expected", "got"), WRONG)
def test_an_argument_of_a_wrong_kind_is_an_error_that_names_it(function, call, name, wrong, expected, got):
    with pytest.raises(InputError, match=rf"^{name}: expected {expected}, got {re.escape(got)}$"):
        function(**(call | {name: wrong}))


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)], ids=["P", "BP"])
def test_a_mask_too_short_for_key_slot_is_the_same_error_everywhere(mask):
    key_slot = torch.tensor([0, 2, 2, 4])
    with pytest.raises(InputError, match=r"^key_slot: expected slots below 3, as mask has, got 4$"):
        ops.retrieve(**RETRIEVE, key_slot=key_slot, mask=mask)
    with pytest.raises(InputError, match=r"^key_slot: expected slots below 0, as mask has, got 4$"):
        ops.retrieve(**RETRIEVE, key_slot=key_slot, mask=mask[..., :0])


@pytest.mark.parametrize("key_slot", [[0, 2, 1, 3], [-1, 0, 1, 2]])
def test_slots_that_do_not_rise_from_0_are_the_same_error_everywhere(key_slot):
    for mask in (None, torch.ones(2, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"^key_slot: expected slots in rising order from 0$"):
            ops.retrieve(**RETRIEVE, key_slot=torch.tensor(key_slot), mask=mask)


def test_a_query_that_is_not_finite_is_told_with_key_slot_too():
    query = ROWS.clone()
    query[1, 2] = torch.nan
    for name in (backend.name for backend in ops.backends("cpu") if backend.name != "triton"):  # it does not look
        with ops.use_backend(name), pytest.raises(InputError, match=r"^query: row 1 holds a number that is not finite"):
            ops.retrieve(**RETRIEVE | {"query": query}, key_slot=torch.tensor([0, 1, 1, 2]))


def test_numpys_numbers_are_numbers():
    two, half = np.int64(2), np.float32(0.5)
    got = ops.retrieve(ROWS, ROWS, two, groups=two, weighting="softmax", temperature=half)
    expected = ops.retrieve(ROWS, ROWS, 2, groups=2, weighting="softmax", temperature=0.5)
    assert torch.equal(got.weights, expected.weights)
    loss = ops.key_loss(ROWS, ROWS, two, groups=two, mask_prob=half, seed=two)
    assert torch.equal(loss, ops.key_loss(ROWS, ROWS, 2, groups=2, mask_prob=0.5, seed=2))


def test_a_missing_or_unknown_argument_is_told_as_python_does():
    with pytest.raises(TypeError, match=r"^retrieve\(\) missing 1 required positional argument: 'k'$"):
        ops.retrieve([], [])
    with pytest.raises(TypeError, match="unexpected keyword argument 'grups'"):
        ops.key_loss([], [], 1, grups=1)


def test_in_a_compiled_function_the_error_is_the_same():
    compiled = torch.compile(lambda keys, k: ops.retrieve(ROWS, keys, k), backend="eager")
    with pytest.raises(InputError, match=r"^keys: expected a tensor or PreparedKeys, got list$"):
        compiled([1.0], 2)
    with pytest.raises(InputError, match=r"^k: expected at least 1, got 0$"):
        compiled(ROWS, 0)
