"""invariant_linear: every backend agrees with the reference, and a row's bits depend on nothing but the row."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops.invariant_linear import invariant_linear

SIZES = [  # rows, in-features, out-features: around the edges of tiles, panels, pieces and blocks
    (0, 5, 3),
    (3, 0, 4),
    (2, 4, 0),
    (1, 1, 1),
    (7, 127, 23),
    (8, 128, 24),
    (9, 129, 25),
    (33, 300, 49),
    (513, 130, 31),
]


def call(device, rows, width, features):
    random = torch.Generator().manual_seed(rows + width)
    return (torch.randn(size, width, generator=random, dtype=torch.float64).to(device) for size in (rows, features))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_reference(device, size):
    x, weight = call(device, *size)
    expected = torch.einsum("md,nd->mn", x, weight)
    magnitude = torch.einsum("md,nd->mn", x.abs(), weight.abs())
    found = invariant_linear(x, weight)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert bool(((found - expected).abs() <= 1e-14 * magnitude).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_has_the_same_bits_in_any_batch(device, size, threads):
    x, weight = call(device, *size)
    whole, before = invariant_linear(x, weight), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(device)
        assert torch.equal(invariant_linear(x[order], weight), whole[order])
        for first, last in ((0, 1), (1, 4), (len(x) // 2, len(x)), (0, 9)):
            assert torch.equal(invariant_linear(x[first:last], weight), whole[first:last])
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_not_finite_leave_the_others_as_they_are(device):
    x, weight = call(device, 9, 20, 30)
    whole = invariant_linear(x, weight)
    x[3, 5], x[8, 0] = torch.nan, torch.inf
    found, others = invariant_linear(x, weight), [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(found[others], whole[others])
    assert bool(found[3].isnan().all())
    assert not bool(found[8].isfinite().any())


def test_strided_arguments_are_read_as_they_are(device):
    x, weight = call(device, 9, 20, 30)
    expected = invariant_linear(x, weight)
    assert torch.equal(invariant_linear(x.T.contiguous().T, weight.T.contiguous().T), expected)
    assert torch.equal(invariant_linear(x.repeat(1, 2)[:, :20], weight.repeat(1, 3)[:, 20:40]), expected)


def test_a_forced_backend_without_it_does_not_stop_it():
    without = [backend.name for backend in ops.backends() if backend.available and not backend.has("invariant_linear")]
    if not without:
        pytest.skip("all backends present have it")
    x, weight = call("cpu", 9, 20, 30)
    expected = invariant_linear(x, weight)
    for name in without:
        with ops.use_backend(name):
            assert torch.equal(invariant_linear(x, weight), expected)


@pytest.mark.parametrize(
    ("x", "weight", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), r"^x: expected torch\.float64 \[rows, D\], got torch\.float32"),
        (
            torch.zeros(3).double(),
            torch.zeros(4, 3).double(),
            r"^x: expected torch\.float64 \[rows, D\], got .* \[3\]$",
        ),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3), r"^weight: expected torch\.float64"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 2).double(), r"^weight: expected \[N, 3\] on .* to match x, got"),
    ],
)
def test_arguments_that_do_not_fit(device, x, weight, says):
    with pytest.raises(InputError, match=says):
        invariant_linear(x.to(device), weight.to(device))
