"""Exact sums that are independent of their history, compared with Python integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.exact_sum import COMPACT_AT_ONCE, ExactSum
from slm_fast.ops.sum_scatters import expand
from slm_fast.scatter import Compact

FINE = Fraction(1, 2**56)
numbers = st.one_of(
    st.floats(-(2.0**49), 2.0**49, width=32),
    st.floats(-1000, 1000, width=32),
    st.floats(-(2.0**-40), 2.0**-40, width=32),
)
terms = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=6))


def planes(found: ExactSum) -> tuple[list[int], list[int]]:
    return found.coarse.tolist(), found.fine.tolist()


def tensors(rows: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


@settings(deadline=None)
@given(terms)
def test_the_sum_is_that_of_fractions_with_each_term_rounded_once(rows: list[list[float]]) -> None:
    found = ExactSum.of(tensors(rows))
    for column, (coarse, fine) in enumerate(zip(*planes(found), strict=True)):
        expected = sum(round(Fraction(row[column]) / FINE) for row in rows)
        assert coarse * 2**46 + fine == expected
        total = found.total()[column].item()
        # Two planes, each rounded to 53 bits, then their sum.
        assert abs(Fraction(total) - expected * FINE) <= Fraction(1, 2**52) * (
            abs(Fraction(coarse, 2**10)) + abs(fine * FINE)
        )


@settings(deadline=None)
@given(terms, st.randoms(use_true_random=False))
def test_the_order_of_the_terms_does_not_show(rows: list[list[float]], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(rows, len(rows))
    assert planes(ExactSum.of(tensors(rows))) == planes(ExactSum.of(tensors(shuffled)))


@settings(deadline=None)
@given(terms, st.data())
def test_a_term_taken_away_leaves_the_sum_that_never_had_it(rows: list[list[float]], data: st.DataObject) -> None:
    gone = data.draw(st.integers(0, len(rows) - 1))
    left = ExactSum.of(tensors(rows)).minus(torch.tensor(rows[gone]))
    never = ExactSum.of(tensors([row for i, row in enumerate(rows) if i != gone] or [[0.0] * len(rows[0])]))
    assert planes(left) == planes(never)


def test_float64_sums_would_show_the_order_and_a_term_taken_away() -> None:
    # The reason for the class: plain float64 sums depend on their history.
    large, small = torch.tensor([2.0**40]), torch.tensor([2.0**-30])
    plain = (small.double() + large.double()) - large.double()
    assert plain.item() != small.item()
    assert ExactSum.of([small, large]).minus(large).total().item() == small.item()


def test_numbers_from_two_to_the_minus_33_up_lose_nothing() -> None:
    term = torch.tensor([1 + 2.0**-23, 3.0, 12345.678, -1.1, 2.0**51 + 2.0**28]) * torch.tensor([[2.0**-33], [1.0]])
    assert torch.equal(ExactSum.of([term.flatten()]).total().float(), term.flatten())


def test_a_hundred_thousand_tasks_fit_however_large_what_is_rounded_away() -> None:
    term = torch.tensor([2.0**-11 * (1 - 2.0**-24)])  # nearly the largest value that the fine plane holds alone
    one = ExactSum.of([term])
    assert one.coarse.item() == 0
    assert one.fine.item() > 2**44
    many = ExactSum.of([term], ExactSum(99_999 * one.coarse, 99_999 * one.fine))
    assert many.fine.item() == 100_000 * one.fine.item()
    assert many.total().item() == pytest.approx(100_000 * term.item(), rel=1e-15)


def test_massive_activations_of_a_hundred_thousand_tasks_fit() -> None:
    term = torch.tensor([4000.0**2 * 1000])  # 1,000 rows per task
    one = ExactSum.of([term])
    many = ExactSum.of([term], ExactSum(99_999 * one.coarse, 99_999 * one.fine))
    assert many.total().item() == 100_000 * term.double().item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**52, -(2.0**52), 3e38])
def test_a_term_that_is_not_finite_or_too_large_is_refused(bad: float) -> None:
    term = torch.tensor([1.0, bad, 0.0])
    for add in (lambda: ExactSum.of([term]), lambda: ExactSum.of([term], ExactSum.of([torch.ones(3)]))):
        with pytest.raises(WorkError, match=r"scatter: expected finite numbers below 2\^52, got"):
            add()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_is_too_large_is_refused_before_it_wraps_around(sign: int) -> None:
    term = sign * torch.tensor([2.0**51])
    both = ExactSum.of([term, term])  # just fits
    assert both.total().item() == sign * 2.0**52
    with pytest.raises(WorkError, match=r"scatter: expected a sum over all tasks below 2\^52, got a larger one"):
        ExactSum.of([term], both)
    assert both.minus(term).total().item() == sign * 2.0**51


def test_terms_of_another_shape_are_refused() -> None:
    with pytest.raises(WorkError, match=r"scatter: expected \[3\] as other tasks have, got \[6\]"):
        ExactSum.of([torch.zeros(3), torch.zeros(6)])


def test_plus_and_minus_leave_the_sum_they_start_from_as_it_was() -> None:
    start = ExactSum.of([torch.tensor([1.5])])
    ExactSum.of([torch.tensor([2.0])], start)
    start.minus(torch.tensor([1.5]))
    assert start.total().item() == 1.5


def compact(width: int, seed: int) -> Compact:
    draw = torch.Generator().manual_seed(seed)
    factor = torch.randint(-127, 128, (1 + seed % 5, width), generator=draw).to(torch.int8)
    exponent = torch.randint(-40, 13, (width,), generator=draw).to(torch.int8)
    return Compact(factor, exponent, torch.rand(width, generator=draw))


def test_a_compact_scatter_counts_as_its_upper_triangle() -> None:
    scatters = [compact(9, seed) for seed in range(2 * COMPACT_AT_ONCE + 3)]
    triangles = [expand(*scatter) for scatter in scatters]
    both = [triangles[0], *scatters[1:5], *triangles[5:9], *scatters[9:]]
    expected = ExactSum.of(triangles)
    for terms in (scatters, both, scatters[::-1]):
        assert planes(ExactSum.of(terms)) == planes(expected)
    assert planes(expected.minus(*scatters[3:])) == planes(ExactSum.of(triangles[:3]))
    assert planes(ExactSum.of(scatters[3:], ExactSum.of(scatters[:3]))) == planes(expected)


def test_a_compact_scatter_of_another_width_or_that_is_damaged_is_refused() -> None:
    with pytest.raises(WorkError, match=r"scatter: expected \[3\] as other tasks have, got \[6\]"):
        ExactSum.of([compact(2, 0), compact(3, 0)])
    damaged = compact(2, 0)._replace(diagonal=torch.tensor([0.0, torch.nan]))
    with pytest.raises(WorkError, match="scatter: diagonal: expected finite numbers"):
        ExactSum.of([compact(2, 0), damaged])
