"""sum_scatters: every backend gives the bits of exact arithmetic, with each element of a task rounded once."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops.sum_scatters import MOST_TASKS, RANK, expand, sum_scatters

SIZES = [  # features, directions of each task: around the edges of tiles, panels, pairs and batches
    (1, [1]),
    (3, [2, 0, 1]),
    (5, []),
    (0, [2]),
    (63, [7]),
    (64, [8, 1]),
    (65, [9, RANK]),
    (130, [3] * 9),
    (321, [5, 6]),
]
RANGES = {"learned": (-14, -6), "small": (-40, -30), "large": (3, 12), "mixed": (-40, 12)}


def call(device, width, rows, exponents="learned", largest=127):
    draw = torch.Generator().manual_seed(width + len(rows))
    low, high = RANGES[exponents]
    factor = torch.randint(-largest, largest + 1, (sum(rows), width), generator=draw).to(torch.int8)
    exponent = torch.randint(low, high + 1, (len(rows), width), generator=draw).to(torch.int8)
    diagonal = torch.rand(len(rows), width, generator=draw) * exponent.float().exp2()
    return [part.to(device) for part in (factor, torch.tensor(rows, dtype=torch.int64), exponent, diagonal)]


def by_hand(factor, rows, exponent, diagonal):
    """In Python's integers and fractions."""
    width, begin = factor.shape[1], 0
    found = {(i, j): [0, 0] for i in range(width) for j in range(i, width)}
    for task, count in enumerate(rows.tolist()):
        own = factor[begin : begin + count].tolist()
        begin += count
        for (i, j), planes in found.items():
            unit = Fraction(2) ** int(exponent[task, i] + exponent[task, j])
            value = sum(row[i] * row[j] for row in own) * unit
            if i == j:
                value = Fraction(float(value) + diagonal[task, i].double().item())
            coarse = round(value * 2**10)
            planes[0] += coarse
            planes[1] += round((value - Fraction(coarse, 2**10)) * 2**56)
    return tuple(torch.tensor([planes[part] for planes in found.values()], dtype=torch.int64) for part in (0, 1))


@pytest.mark.parametrize("exponents", RANGES)
@pytest.mark.parametrize("rows", [[3], [1, 0, 4]])
def test_it_is_the_sum_by_hand(device, rows, exponents):
    arguments = call(device, 6, rows, exponents)
    for found, expected in zip(sum_scatters(*arguments), by_hand(*map(torch.Tensor.cpu, arguments)), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("exponents", RANGES)
@pytest.mark.parametrize(("width", "rows"), SIZES)
def test_every_backend_gives_the_bits_of_the_reference(device, width, rows, exponents):
    arguments = call(device, width, rows, exponents)
    with ops.use_backend("reference"):
        expected = sum_scatters(*arguments)
    for found, right in zip(sum_scatters(*arguments), expected, strict=True):
        assert found.dtype == torch.int64
        assert torch.equal(found, right)


def test_the_largest_factors_and_exponents_fit(device):
    factor, rows, exponent, diagonal = call(device, 70, [RANK] * MOST_TASKS)
    factor.fill_(127), exponent.fill_(12), diagonal.fill_(2.0**45)
    coarse, fine = sum_scatters(factor, rows, exponent, diagonal)
    product = RANK * 127**2 * 2**24
    assert coarse[0] == MOST_TASKS * (product + 2**45) * 2**10
    assert coarse[1] == MOST_TASKS * product * 2**10
    assert not fine.any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_bits_depend_neither_on_order_nor_on_threads(device, threads):
    factor, rows, exponent, diagonal = call(device, 200, [4, 9, 0, 30])
    expected, before = sum_scatters(factor, rows, exponent, diagonal), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        order = [2, 3, 0, 1]
        parts = factor.split(rows.tolist())
        found = sum_scatters(torch.cat([parts[i] for i in order]), rows[order], exponent[order], diagonal[order])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_strided_arguments_are_read_as_they_are(device):
    factor, rows, exponent, diagonal = call(device, 20, [3, 4])
    expected = sum_scatters(factor, rows, exponent, diagonal)
    apart = [part.repeat(1, 2)[:, :20] for part in (factor, exponent, diagonal)]
    found = sum_scatters(apart[0].T.contiguous().T, rows.repeat_interleave(2)[::2], *apart[1:])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_expanding_one_gives_its_upper_triangle():
    factor, _, exponent, diagonal = call("cpu", 150, [3])
    unit = exponent[0].double().exp2()
    whole = (factor.double().T @ factor.double()) * unit * unit[:, None] + diagonal[0].double().diag()
    row, column = torch.triu_indices(150, 150)
    assert torch.equal(expand(factor, exponent[0], diagonal[0]), whole[row, column])


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("factor", torch.zeros(5, 4), r"^factor: expected torch\.int8 with 2 axes on .*, got torch\.float32 \[5, 4\]"),
        ("rows", torch.zeros(2, 1, dtype=torch.int64), r"^rows: expected torch\.int64 with 1 axes"),
        ("rows", torch.tensor([2, 2]), r"^rows: expected at most 64 numbers .* with the sum 5, got \[2, 2\]"),
        ("rows", torch.tensor([6, -1]), r"^rows: expected at most 64 numbers from 0 to 256"),
        ("exponent", torch.zeros(2, 3, dtype=torch.int8), r"^exponent: expected \[2, 4\] for .*, got \[2, 3\]"),
        ("exponent", torch.full((2, 4), 13, dtype=torch.int8), r"^exponent: expected -40 to 12, got 13 to 13"),
        ("diagonal", torch.zeros(3, 4), r"^diagonal: expected \[2, 4\] for rows and factor, got \[3, 4\]"),
        ("diagonal", torch.full((2, 4), torch.nan), r"^diagonal: expected finite numbers of at most 2\^45"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(device, name, wrong, says):
    arguments = dict(zip(("factor", "rows", "exponent", "diagonal"), call(device, 4, [2, 3]), strict=True))
    with pytest.raises(InputError, match=says):
        sum_scatters(**(arguments | {name: wrong.to(device)}))


def test_the_native_operator_itself_checks_shapes_and_rows():
    if "native" not in [backend.name for backend in ops.backends("cpu")]:
        pytest.skip("no native kernels")
    arguments, op = call("cpu", 4, [2, 3]), torch.ops.slm_fast.sum_scatters_native
    for place, wrong in (
        (0, arguments[0].float()),
        (1, torch.tensor([2, 4])),
        (2, arguments[2][:1]),
        (3, arguments[0]),
    ):
        with pytest.raises(ValueError, match=r"^(factor|rows|exponent|diagonal): expected"):
            op(*arguments[:place], wrong, *arguments[place + 1 :])
