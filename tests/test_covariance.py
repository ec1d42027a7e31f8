"""Moments of queries, and covariances."""

from __future__ import annotations

import pytest
import torch

import slm_fast.covariance
from slm_fast.covariance import moments, pack, unpack, whitener
from slm_fast.errors import WorkError


@pytest.mark.parametrize("width", [1, 2, 7])
def test_unpacking_undoes_packing(width: int) -> None:
    square = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    symmetric = square + square.T
    assert len(pack(symmetric)) == width * (width + 1) // 2
    assert torch.equal(unpack(pack(symmetric)), symmetric)


def test_a_scatter_that_is_that_of_no_rows_is_said_to_be_so() -> None:
    scatter = torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64)  # an eigenvalue of -4
    with pytest.raises(WorkError, match="scatter: expected a positive definite covariance, got one that is not"):
        whitener(torch.tensor([1e6], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64), scatter)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_moments_are_the_same_however_many_rows_are_taken_at_once(
    slots: int, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(41, 6, generator=torch.Generator().manual_seed(2)).double()
    labels = torch.arange(41) % 4 if labelled else None
    whole = moments(query, slots, 0, labels, torch.square)
    monkeypatch.setattr(slm_fast.covariance, "ROWS_AT_ONCE", 7)
    for one, other in zip(whole, moments(query, slots, 0, labels, torch.square), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        whole.mean[whole.assignment[0]], query.square()[whole.assignment == whole.assignment[0]].mean(0)
    )


def test_a_slot_without_rows_stands_for_no_label() -> None:
    query = torch.tensor([[0.0, 1.0], [0.0, 1.0], [4.0, 4.0]]).double()
    found = moments(query, 3, 0, torch.tensor([0, 1, 1]))
    assert found.label.tolist().count(-1) == 1
    assert found.rows[found.label == -1].tolist() == [0]
