"""Task files for the router over random features: each tensor is checked by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from stores import make_task
from test_schema import FILE, SHAPES, parts, refusal

from slm_fast.errors import WorkError
from slm_fast.ops.sum_scatters import RANK
from slm_fast.random_features import RandomFeatureRouter, feature_matrix
from slm_fast.schema import check_fits, check_task
from slm_fast.store import task_to_bytes

QUERY, FEATURES = 4, 6
CONFIG = {"router": "gaussian", "features": FEATURES}
LABELS = torch.arange(12) % 2
ROUTER = RandomFeatureRouter(matrix=feature_matrix(QUERY, FEATURES, torch.device("cpu")))
PART = ROUTER.fit(torch.randn(12, QUERY, generator=torch.Generator().manual_seed(0)), 1, 0, LABELS)
TASK = dataclasses.replace(make_task("a"), router=PART)
WIDTH = QUERY + FEATURES


def test_a_task_that_was_written_is_read_and_fits() -> None:
    about, tensors = parts(TASK)
    found = check_task(json.dumps(about), tensors, FILE)
    assert task_to_bytes(found) == task_to_bytes(TASK)
    assert check_fits(found, {**SHAPES, "query": WIDTH}, CONFIG) is None


def test_a_task_of_before_constants_were_written_is_read_as_it_was_written() -> None:
    older = {name: tensor for name, tensor in PART.items() if name != "constants"}
    about, tensors = parts(dataclasses.replace(TASK, router=older))
    found = check_task(json.dumps(about), tensors, FILE)
    assert found.router.keys() == older.keys()
    assert check_fits(found, {**SHAPES, "query": WIDTH}, CONFIG) is None


def test_a_task_whose_labels_have_one_row_each_keeps_no_sample() -> None:
    part = ROUTER.fit(torch.randn(2, QUERY, generator=torch.Generator().manual_seed(1)), 1, 0, torch.arange(2))
    about, tensors = parts(dataclasses.replace(TASK, router=part))
    assert check_task(json.dumps(about), tensors, FILE).router["sample"].shape == (0, QUERY)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("factor", PART["factor"].float(), "factor: expected int8, got float32"),
        ("factor", torch.full_like(PART["factor"], -128), "factor: expected numbers from -127 to 127, got -128"),
        ("factor", torch.zeros(RANK + 1, WIDTH, dtype=torch.int8), "factor: expected at most 256 rows, got 257"),
        ("factor", PART["factor"][:, 1:], "factor: expected [R, 10], got"),
        ("exponent", torch.full_like(PART["exponent"], 13), "exponent: expected numbers from -40 to 12, got 13"),
        ("exponent", PART["exponent"][1:], "exponent: expected [10], got [9]"),
        ("diagonal", -torch.ones(WIDTH), "diagonal: expected numbers from 0 to"),
        ("diagonal", torch.full((WIDTH,), torch.nan), "diagonal: holds a number that is not finite"),
        ("mean_label", torch.tensor([0.0, 2.0]), "mean_label: expected numbers of 2 labels, or -1"),
        ("mean_label", torch.zeros(3), "mean_label: expected [2], got [3]"),
        ("constants", torch.ones(2), "constants: expected [4], got [2]"),
        ("constants", torch.tensor([0.6, 2.0, 0.0]), "constants: expected a temperature above 0"),
        ("constants", torch.tensor([-1.0, 2.0, 24.0]), "constants: expected numbers from 0 to"),
        ("sample", PART["sample"][:5], "sample: expected [m, Q] for sample_mean [m], got [5, 4] for [12]"),
        ("sample", torch.zeros(12, WIDTH), "sample: expected [m, Q] for sample_mean [m], got [12, 10] for [12]"),
        ("sample_mean", torch.full((12,), 2.0), "sample_mean: expected means of two rows or more"),
        ("count", torch.tensor([11.0, 1.0]), "sample_mean: expected means of two rows or more"),
    ],
)
def test_a_tensor_that_cannot_be_is_named(name: str, tensor: torch.Tensor, said: str) -> None:
    about, tensors = parts(TASK)
    assert refusal(check_task, json.dumps(about), {**tensors, name: tensor}, FILE).startswith(
        f"not a task file: {said}"
    )


@pytest.mark.parametrize(
    ("query", "features", "said"),
    [
        (WIDTH + 1, FEATURES, "mean: expected [M, 11], got [2, 10]"),
        (WIDTH, FEATURES - 1, "sample: expected queries of 5 numbers"),
        (WIDTH, 0, "router: expected count, distance, mean, scatter, got constants, count"),
    ],
)
def test_a_task_of_other_features_does_not_fit(query: int, features: int, said: str) -> None:
    with pytest.raises(WorkError) as caught:
        check_fits(TASK, {**SHAPES, "query": query}, {**CONFIG, "features": features}, file=Path("x"))
    assert str(caught.value).startswith(f"x: does not fit the model: {said}")
